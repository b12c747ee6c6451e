import dataclasses
import re

import pytest

from agglomerator.config import FIELDS, Settings
from agglomerator.plan import complete_from_checkpoint
from agglomerator.runs import checkpoints
from agglomerator.util.errors import UserError

# Settings that cannot work, and what the message must name: the flag with its value, and a way out.
REFUSED = {
    "patch": (dict(patch_size=3), "--patch_size=3", "one of 1, 2, 4."),
    "no channels": (dict(patch_size=4, patch_dim=16), "--patch_dim=16", "32"),
    "one column": (dict(patch_size=8, patch_dim=128), "--patch_size=8", "one of 1, 2, 4."),
    "one column of a prime": (
        dict(image_size=28, conv_image_size=7, patch_size=7, patch_dim=98),
        "--patch_size=7",
        "one of 1.",
    ),
    "odd channels": (dict(patch_dim=9), "--patch_dim=9", "2"),
    "grid": (dict(conv_image_size=7), "--conv_image_size=7", "8, 16, 32"),
    "grid of 28": (dict(image_size=28), "--conv_image_size=8", "7, 14, 28"),
    "state": (dict(denoise_iter=5), "--denoise_iter=5", "0 to 4"),
    "state from the end": (dict(denoise_iter=-6), "--denoise_iter=-6", "-1 to -5"),
    "state of given iterations": (dict(iters=2, denoise_iter=3), "--denoise_iter=3", "0 to 2"),
    "one level": (dict(levels=1), "--levels=1", "at least 2"),
    "channels": (dict(n_channels=2), "--n_channels=2", "1, 3"),
    "mode": (dict(mode="fit"), "--mode=fit", "train, test, freeze"),
    "logger": (dict(logger="mlflow"), "--logger=mlflow", "wandb, tensorboard, csv, none"),
    "temperature": (dict(temperature=0.0), "--temperature=0.0", "0.07"),
    "dropout": (dict(dropout=1.5), "--dropout=1.5", "at most 1"),
    "not a number": (dict(learning_rate=float("nan")), "--learning_rate=nan", "finite"),
    "batch": (dict(batch_size=0), "--batch_size=0", "at least 1"),
    "consensus": (dict(consensus_temperature=0.0), "--consensus_temperature=0.0", "0.05"),
    "agreement": (dict(agreement=-1.0), "--agreement=-1.0", "at least 0"),
    "radius": (dict(local_consensus_radius=-1), "--local_consensus_radius=-1", "at least 0"),
    "radius as text": (dict(local_consensus_radius="2"), "--local_consensus_radius='2'", "float"),
    "text": (dict(levels="2"), "--levels='2'", "int"),
    "boolean": (dict(levels=True), "--levels=True", "int"),
    "number": (dict(supervise=1), "--supervise=1", "bool"),
    "home": (dict(exp_name="~/x"), "--exp_name=~/x", "a name"),
    "no name": (dict(exp_name="."), "--exp_name=.", "a name"),
    "two lines": (dict(data_dir="a\nb"), "--data_dir=a\\nb", "one line"),
}

# What an unnamed run is called when its settings change.
NAMES = {
    "CIFAR10": Settings(),
    "digits": Settings(dataset="digits"),
    "MNIST": Settings().replace(dataset="MNIST"),
    "own": Settings(exp_name="own").replace(dataset="MNIST"),
}


def test_name_of_a_run():
    assert {name: s.exp_name for name, s in NAMES.items()} == {name: name for name in NAMES}
    assert all(dataclasses.asdict(s)["exp_name"] == name for name, s in NAMES.items())
    own = Settings(exp_name="CIFAR10")
    assert own == Settings() and own.replace(dataset="digits").exp_name == "CIFAR10"


def test_name_follows_the_data_set_of_the_checkpoint():
    shelved = checkpoints.read("pretrained:FashionMNIST")
    for settings, given, name in (
        (Settings(), set(), "FashionMNIST"),
        (Settings(exp_name="CIFAR10"), {"exp_name"}, "CIFAR10"),
        (Settings(dataset="MNIST"), {"dataset"}, "MNIST"),
    ):
        assert complete_from_checkpoint(settings, given, shelved).exp_name == name


@pytest.mark.parametrize("values, flag, way_out", REFUSED.values(), ids=REFUSED)
def test_message_names_flag_value_and_what_works(values, flag, way_out):
    with pytest.raises(UserError) as error:
        Settings(**values)
    message = str(error.value)
    assert message.startswith(f"{flag}: ")
    assert way_out in message.removeprefix(flag)
    assert "\n" not in message


@pytest.mark.parametrize("patch_dim", [6, 16, 32, 36, 100])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_advice_on_patches_works(patch_dim, patch_size):
    try:
        Settings(patch_dim=patch_dim, patch_size=patch_size)
    except UserError as error:
        width = int(re.search(r"as --patch_dim=(\d+)", str(error))[1])
        Settings(patch_dim=width, patch_size=patch_size)
        sizes = re.search(r"--patch_size of ([\d, ]+)", str(error))
        for size in sizes[1].split(", "):
            Settings(patch_dim=patch_dim, patch_size=int(size))
    else:
        assert patch_dim % (2 * patch_size**2) == 0


@pytest.mark.parametrize("image_size", [8, 15, 28, 30, 32, 256])
def test_three_grids_for_every_image_size(image_size):
    for stride in (1, 2, 4):
        grid = -(-image_size // stride)
        settings = Settings(image_size=image_size, conv_image_size=grid)
        assert settings.tokenizer_stride == stride
        assert settings.n_columns == grid**2


def test_iterations_are_twice_the_levels_unless_given():
    assert Settings(levels=3).n_iters == 6
    assert Settings(levels=3, iters=1).n_iters == 1
    assert Settings(iters=0, denoise_iter=0).n_iters == 0


def test_ends_of_the_limits_are_allowed():
    for state in (-5, 0, 4):
        Settings(denoise_iter=state)
    Settings(dropout=0.0)
    for radius in (0, 2, 0.5, 1.5, 1e300):
        Settings(local_consensus_radius=radius)
    Settings(limit_train=0.5, limit_val=0, limit_test=3)


def test_loggers_that_write_utf8_refuse_names_that_are_none():
    for logger, name in (("tensorboard", "exp_name"), ("wandb", "data_dir")):
        with pytest.raises(UserError, match=f"--{name}=a.*--logger=csv"):
            Settings(logger=logger, **{name: "a\udcff"})
    Settings(logger="csv", exp_name="a\udcff", data_dir="\udcff")
    Settings(logger="tensorboard", data_dir="\udcff")


def test_replace_checks_anew():
    settings = Settings()
    assert settings.replace(levels=3).levels == 3
    assert settings.levels == 2
    with pytest.raises(UserError, match="--patch_size=3"):
        settings.replace(patch_size=3)


def test_every_setting_has_a_help_text():
    for name, option in FIELDS.items():
        assert len(option.metadata["help"].split()) >= 3, name
