import resource
import sys

import pytest
import torch
from conftest import SMALL, contents, run_main, run_program

from agglomerator import Agglomerator

# What is wrong, and what the one line must say.
WRONG_FLAGS = {
    "unknown data set": (["--dataset=digit"], ["--dataset=digit", "did you mean digits"]),
    "misspelt flag": (["--patch_dims=8"], ["patch_dims", "patch_dim"]),
    "missing flagfile": (["--flagfile=config/none.cfg"], ["config/none.cfg"]),
    "word that is no flag": (["train"], ["train"]),
    "value of another type": (["--levels=two"], ["levels", "two"]),
    "patch that does not divide": (["--patch_size=3"], ["--patch_size=3", "one of 1, 2."]),
    "no such state": (["--denoise_iter=9"], ["--denoise_iter=9", "0 to 4"]),
    "wrong number of classes": (["--n_classes=7"], ["--n_classes=7", "--n_classes=10"]),
    "batch larger than the data": (["--batch_size=2000"], ["--batch_size=2000", "1150"]),
    "strategy that divides scalars": (["--strategy=fsdp"], ["--strategy=fsdp", "--strategy=ddp"]),
    "nothing to train on": (["--limit_train=0"], ["--limit_train=0"]),
    "folder out of the output folder": (["--exp_name=../up"], ["--exp_name=../up"]),
    "output folder that is a file": (
        ["--output_dir=README.md"],
        ["README.md"],
    ),
    "missing checkpoint": (
        ["--supervise", "--load_checkpoint_dir=none.ckpt"],
        ["--load_checkpoint_dir=none.ckpt"],
    ),
    "no checkpoint named": (["--mode=test"], ["--load_checkpoint_dir"]),
    "missing data, no internet": (
        ["--dataset=FashionMNIST", "--data_dir=nowhere"],
        ["--data_dir=nowhere", "FashionMNIST"],
    ),
}


@pytest.fixture
def output(tmp_path):
    """An output folder in which an earlier run left something."""
    folder = tmp_path / "output" / "small"
    for name in ("checkpoints/best.ckpt", "logs/contrastive/metrics.csv", "flags.cfg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of an earlier run")
    return tmp_path / "output"


def refuse(output, *flags, program=run_main, **options):
    """Run with flags that must be refused, nothing in output lost; returns the one line."""
    before = contents(output)
    flags = *SMALL, "--exp_name=small", f"--output_dir={output}", *flags
    result = program(*flags, ok=False, **options)
    assert result.status == 2
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert before <= contents(output)
    return result.stderr


@pytest.mark.parametrize("flags, words", WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags(output, tmp_path, flags, words):
    flags = [flag.replace("nowhere", str(tmp_path / "nowhere")) for flag in flags]
    message = refuse(output, *flags)
    for word in words:
        assert word.replace("nowhere", str(tmp_path / "nowhere")) in message


def test_checkpoint_of_other_shapes(output, tmp_path):
    model = Agglomerator(image_size=16, conv_image_size=4, patch_dim=8, n_channels=1, contr_dim=32)
    path = tmp_path / "narrow.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    message = refuse(output, "--supervise", f"--load_checkpoint_dir={path}")
    assert "--patch_dim=8" in message


def test_checkpoint_that_is_text(output, tmp_path):
    path = tmp_path / "text.ckpt"
    path.write_text("no checkpoint")
    assert str(path) in refuse(output, "--mode=test", f"--load_checkpoint_dir={path}")


@pytest.mark.slow
def test_first_run_of_a_user_says_one_line_too(output, tmp_path):
    # matplotlib and others fill their caches at home then, and like to say so.
    home = {"HOME": str(tmp_path / "home")}
    assert "--dataset=digit" in refuse(
        output, "--dataset=digit", program=run_program, environment=home
    )


@pytest.mark.slow
def test_compiling_without_a_compiler(output, tmp_path):
    nowhere = {"PATH": str(tmp_path)}
    said = refuse(output, "--compile", program=run_program, environment=nowhere)
    assert "--compile" in said


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is not kept elsewhere")
@pytest.mark.slow
def test_batch_larger_than_the_memory(output):
    flags = "--image_size=64", "--conv_image_size=32", "--patch_dim=4", "--head=grid"
    # The scores of 1024 columns against 1024 take 8 GiB for the 2 x 1024 views.
    limits = {resource.RLIMIT_AS: 8 * 2**30}
    message = refuse(output, *flags, "--batch_size=1024", program=run_program, limits=limits)
    assert "--batch_size=1024: out of memory; " in message
