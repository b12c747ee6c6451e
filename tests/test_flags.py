import json
import subprocess
import sys

import pytest
from conftest import ROOT, run_program

from agglomerator import cli
from agglomerator.cli import _Number, _ShareOrNumber
from agglomerator.config import FIELDS, GROUPS, Settings

# The published flags and their defaults.
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
from agglomerator import cli
from agglomerator.util.errors import UserError
import dataclasses
cli.define()
for argv in json.loads(sys.argv[1]):
    cli.FLAGS.unparse_flags()
    try:
        settings, given = cli.parse(["main.py", *argv])
    except UserError as error:
        print(json.dumps({"error": str(error)}))
    else:
        named = {"given": sorted(given), "typed": sorted(given.typed)}
        print(json.dumps({"settings": dataclasses.asdict(settings)} | named))
assert "torch" not in sys.modules
"""


def parse_all(argvs):
    """What a fresh process reads from command lines: for each the settings and the names given."""
    argvs = json.dumps([[*map(str, argv)] for argv in argvs])
    command = [sys.executable, "-c", PARSE, argvs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def parse(*arguments):
    return parse_all([arguments])[0]


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
    assert found["given"] == found["typed"] == ["levels", "patch_dim", "supervise"]
    assert parse("--levels=5", f"--flagfile={path}")["typed"] == ["levels"]


def test_a_threshold_wins_over_the_loss_of_a_flagfile(tmp_path):
    path = tmp_path / "small.cfg"
    path.write_text("--island_loss=0.04\n--island_threshold=0.7\n")
    for words, found in (
        ((), (0.7, 0.04)),
        (("--island_threshold=0.9",), (0.9, None)),
        (("--island_threshold=0.9", "--island_loss=0.02"), (0.9, 0.02)),
    ):
        settings = parse(f"--flagfile={path}", *words)["settings"]
        assert (settings["island_threshold"], settings["island_loss"]) == found


# Lines of a flagfile as users write them, and what they say.
LINES = {
    "--levels 3": ("levels", 3),
    "--levels = 3  ": ("levels", 3),
    "levels=3": ("levels", 3),
    "  -levels=3\t# three": ("levels", 3),
    "--denoise_iter -2": ("denoise_iter", -2),
    "supervise": ("supervise", True),
    "--supervise  # stage two": ("supervise", True),
    "--supervise true": ("supervise", True),
    '--exp_name="my run"  // with a blank': ("exp_name", "my run"),
    "--exp_name='#1 of two'": ("exp_name", "#1 of two"),
    "--exp_name=#1": ("exp_name", "#1"),
    "--data_dir=C:\\my data\\it's here": ("data_dir", "C:\\my data\\it's here"),
    "--hierarchy=None": ("hierarchy", None),
    "--supervised_learning_rate=None": ("supervised_learning_rate", None),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_flagfiles_as_users_write_them(tmp_path, encoding):
    for i, line in enumerate(LINES):
        (tmp_path / f"{i}.cfg").write_bytes(f"# é\r\n{line}\r\n\r\n".encode(encoding))
    found = parse_all([f"--flagfile={tmp_path}/{i}.cfg"] for i in range(len(LINES)))
    for (line, (name, value)), each in zip(LINES.items(), found, strict=True):
        assert "error" not in each, (line, each)
        assert each["settings"][name] == value, line
        assert type(each["settings"][name]) is type(value)


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    wrong = ["--levels=two", "--patch_sise=3", "--levels", "--levels=2 --iters=3", "= 3", "--"]
    wrong += ['--exp_name="my run', "--exp_name=a --iters=3", "--flagfile=none.cfg", "--noiters"]
    for i, line in enumerate(wrong):
        (tmp_path / f"{i}.cfg").write_text(f"# first\n--patch_dim=64\n{line}\n--levels=2\n")
    found = parse_all([f"--flagfile={tmp_path}/{i}.cfg"] for i in range(len(wrong)))
    for i, each in enumerate(found):
        assert each["error"].startswith(f"{tmp_path}/{i}.cfg, line 3: "), wrong[i]


def test_flagfiles_lie_beside_the_one_that_names_them_or_in_the_working_directory(tmp_path):
    (tmp_path / "one.cfg").write_text(
        "--levels=3\n--flagfile two.cfg\n--flagfile=config/config_digits.cfg\n--iters=5\n"
    )
    (tmp_path / "two.cfg").write_text("--levels=4\n--iters=6\n--dropout=0.5\n")
    settings = parse("--flagfile", tmp_path / "one.cfg")["settings"]
    wanted = dict(levels=2, iters=5, dropout=0.5, dataset="digits")
    assert settings.items() >= wanted.items()
    (tmp_path / "two.cfg").unlink()
    message = parse("--flagfile", tmp_path / "one.cfg")["error"]
    assert message.startswith(f"{tmp_path / 'one.cfg'}, line 2: --flagfile=two.cfg: ")


def test_the_home_of_the_user_is_known_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.cfg").write_text("--data_dir=~/data\n--hierarchy ~\n")
    arguments = "--output_dir=~/x", "--images", "~/y", "--mode=islands", "--load_checkpoint_dir=~/z"
    settings = parse("--flagfile=~/some.cfg", *arguments)["settings"]
    names = dict(data_dir="data", hierarchy="", output_dir="x", images="y", load_checkpoint_dir="z")
    for name, end in names.items():
        assert settings[name] == str(tmp_path / end), name
    for name in names:  # an unset variable of the shell
        assert parse("--mode=islands", f"--{name}=")["error"].startswith(f"--{name}=: is empty; ")
    message = parse("--output_dir=~nobody-of-this-name/x")["error"]
    assert message.startswith("--output_dir=~nobody-of-this-name/x: ")


def test_a_run_without_a_name_has_that_of_its_data_set(tmp_path):
    found = parse("--dataset=digits")
    assert found["settings"]["exp_name"] == "digits" and found["given"] == ["dataset"]
    for flag, name in (("--exp_name=None", "digits"), ("--exp_name=own", "own")):
        assert parse("--dataset=digits", flag)["settings"]["exp_name"] == name


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
    for group in GROUPS:
        assert f"{group}:\n" in result.stdout
    for name, option in FIELDS.items():
        assert f"--{name}=" in result.stdout or f"--[no]{name} " in result.stdout
        assert " ".join(option.metadata["help"].split()[:3]) in result.stdout
    for foreign in ("absl", "verbosity", "pdb", "alsologtostderr"):
        assert foreign not in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_settings_are_written_as_a_flagfile(tmp_path):
    settings = Settings(levels=3, supervise=True, limit_val=2, temperature=0.1)
    settings = settings.replace(exp_name="a 'run' # 1", data_dir='a"b', output_dir="o ")
    with (tmp_path / "flags.cfg").open("w", encoding="utf-8") as file:
        cli.write(settings, file)
    found = parse(f"--flagfile={tmp_path / 'flags.cfg'}")["settings"]
    assert Settings(**found) == settings


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.cfg")), ids=lambda p: p.stem)
def test_every_config_is_in_order(path):
    found = parse(f"--flagfile={path}")
    assert "error" not in found
    assert found["settings"]["exp_name"] == path.stem.removeprefix("config_")
