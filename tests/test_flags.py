import json
import subprocess
import sys

import pytest
from conftest import ROOT, run_program

from agglomerator import flags
from agglomerator.flags import _Number, _ShareOrNumber
from agglomerator.settings import FIELDS, Settings

# The table of SPEC section 2.
DEFAULTS = dict(
    dataset="CIFAR10", exp_name="CIFAR10", patch_size=1, patch_dim=128, levels=2, iters=None,
    image_size=32, conv_image_size=8, n_channels=3, n_classes=10, denoise_iter=-1, dropout=0.3,
    temperature=0.07, contr_dim=512, mode="train", supervise=False, batch_size=1024,
    learning_rate=0.05, weight_decay=5e-4, lr_speed=2000, max_epochs=10000, resume_training=False,
    load_checkpoint_dir=None, seed=42, num_workers=8, num_gpus=1, limit_train=1.0, limit_val=1.0,
    limit_test=1.0, plot_islands=False, consensus_self=False, local_consensus_radius=0,
)  # fmt: skip

PARSE = """
import json, sys
sys.path.insert(0, "src")
from agglomerator import flags
from agglomerator.settings import UserError
import dataclasses
flags.define()
try:
    settings, given = flags.parse(["main.py", *sys.argv[1:]])
except UserError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"settings": dataclasses.asdict(settings), "given": sorted(given)}))
assert "torch" not in sys.modules
"""


def parse(*arguments):
    """What a fresh process reads from a command line: the settings and the names given."""
    command = [sys.executable, "-c", PARSE, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_defaults_are_those_of_the_published_flags():
    found = parse()
    assert found["given"] == []
    assert found["settings"].items() >= DEFAULTS.items()
    for name, value in DEFAULTS.items():
        assert type(found["settings"][name]) is type(value), name


def test_later_flag_wins_over_the_flagfile(tmp_path):
    path = tmp_path / "some.cfg"
    path.write_text("# a comment\n--levels=4\n--patch_dim=64\n\n--supervise\n")
    found = parse("--patch_dim=32", f"--flagfile={path}", "--levels=3", "--nosupervise")
    settings = found["settings"]
    assert (settings["levels"], settings["patch_dim"], settings["supervise"]) == (3, 64, False)
    assert set(found["given"]) == {"levels", "patch_dim", "supervise"}


def test_values_are_read_as_users_write_them():
    arguments = "--iters", "None", "--limit_train=10", "--limit_val=0.5", "--limit_test", "1"
    settings = parse(*arguments, "--learning_rate=1e-3", "--mode", "test")["settings"]
    assert settings["iters"] is None
    assert settings["limit_train"] == 10
    assert settings["limit_val"] == 0.5
    assert settings["learning_rate"] == 1e-3
    assert settings["mode"] == "test"


@pytest.mark.parametrize(
    "text, value",
    [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("10", 10), ("0", 0), ("20.0", 20), (".5", 0.5)],
)
def test_share_or_number(text, value):
    """A whole number counts batches, a number with a point is a share of them."""
    found = _ShareOrNumber().parse(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1.5", "many", "1e"])
def test_neither_share_nor_number(text):
    with pytest.raises(ValueError):
        _ShareOrNumber().parse(text)


@pytest.mark.parametrize("text, value", [("0", 0), ("2", 2), ("1.5", 1.5), ("2.0", 2)])
def test_radius_may_be_a_fraction(text, value):
    found = _Number().parse(text)
    assert found == value
    assert type(found) is type(value)


def test_radius_that_is_no_number_is_refused():
    assert parse("--local_consensus_radius=wide")["error"] == (
        "--local_consensus_radius=wide: must be a number."
    )


def test_misspelt_flag_suggests_the_right_one():
    for wrong, right in (("patch_sise", "patch_size"), ("learningrate", "learning_rate")):
        message = parse(f"--{wrong}=1")["error"]
        assert wrong in message and right in message
        assert "\n" not in message


def test_share_below_zero_is_refused():
    assert "--limit_train=-1" in parse("--limit_train=-1")["error"]


def test_help_is_grouped_and_ours_alone():
    result = run_program("--help")
    assert not result.stderr
    for title in flags.GROUPS.values():
        assert f"{title}:\n" in result.stdout
    for name, option in FIELDS.items():
        assert f"--{name}=" in result.stdout or f"--[no]{name} " in result.stdout
        assert " ".join(option.metadata["help"].split()[:3]) in result.stdout
    for foreign in ("absl", "verbosity", "pdb", "alsologtostderr"):
        assert foreign not in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_settings_are_written_as_a_flagfile(tmp_path):
    settings = Settings(levels=3, supervise=True, limit_val=2, temperature=0.1)
    with (tmp_path / "flags.cfg").open("w", encoding="utf-8") as file:
        flags.write(settings, file)
    found = parse(f"--flagfile={tmp_path / 'flags.cfg'}")["settings"]
    assert Settings(**found) == settings


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.cfg")), ids=lambda p: p.stem)
def test_every_config_is_in_order(path):
    found = parse(f"--flagfile={path}")
    assert "error" not in found
    assert found["settings"]["exp_name"] == path.stem.removeprefix("config_")
