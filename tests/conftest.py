"""What the tests share: the program as a user runs it, and small runs that several tests look at.

The runs train on scikit-learn's digits, tiny networks for a few batches.
"""

import contextlib
import csv
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# Two test processes on two cores: more threads would only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
HOME = tempfile.TemporaryDirectory(prefix="agglomerator-home-")

SMALL = (
    "--dataset=digits",
    "--image_size=16",
    "--conv_image_size=4",
    "--n_channels=1",
    "--patch_dim=16",
    "--contr_dim=32",
    "--batch_size=32",
    "--accelerator=cpu",
    "--learning_rate=0.005",
    "--logger=none",
)


SMALL_SETTINGS = dict(
    dataset="digits", image_size=16, conv_image_size=4, n_channels=1, patch_dim=16, contr_dim=32,
    batch_size=32, learning_rate=0.005, logger="none", accelerator="cpu",
)  # fmt: skip


@dataclass
class Result:
    """What a run of the program left: exit status, what it said, and its --output_dir."""

    status: int
    stdout: str
    stderr: str
    output: Path | None = None


def slow(*values):
    """One set of a test's parameters that only `.ci/run` tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


def clean_environment():
    """Environment variables of the program: no display, no GPU, no Weights & Biases account, no way
    to the internet."""
    names = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in names if name in os.environ}
    nowhere = "http://127.0.0.1:9"
    env |= {"HOME": HOME.name, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env | {"http_proxy": nowhere, "https_proxy": nowhere}


ENVIRONMENT = clean_environment()


def run_program(*flags, ok=True, environment=(), limits=()):
    """Run `python src/main.py` from the project's folder: nobody at the keyboard, no display, no
    Weights & Biases account, no way to the internet.

    Args:
        flags: of the command line.
        ok: that it ends with exit status 0 is demanded; else that it does not.
        environment: further environment variables, name to value.
        limits: limits of the system that it runs under, those of `resource` to bytes.
    """

    def limit():
        for kind, size in dict(limits).items():
            resource.setrlimit(kind, (size, size))

    done = subprocess.run(
        [sys.executable, "src/main.py", *map(str, flags)],
        cwd=ROOT, env=ENVIRONMENT | dict(environment), preexec_fn=limit if limits else None,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    said = f"{done.args}\n{done.stdout}\n{done.stderr}"
    assert (done.returncode == 0) == ok, said
    assert "Traceback" not in done.stderr, said
    return Result(done.returncode, done.stdout, done.stderr)


def run_main(*flags, ok=True, environment=()):
    """What `run_program` does, in this process, which saves seconds: for what is no matter of the
    process itself. An error that would leave a traceback is raised."""
    import main
    from agglomerator import cli
    from agglomerator.data import registry
    from agglomerator.islands.live_view import WINDOW
    from agglomerator.runs import record

    words = ["src/main.py", *map(str, flags)]
    if "patch_dim" not in cli.FLAGS:
        cli.define()
    cli.FLAGS.unparse_flags()
    # What CUDA once finds hidden it never finds again in a process.
    here = {n: v for n, v in ENVIRONMENT.items() if n != "CUDA_VISIBLE_DEVICES"}
    here |= {n: v for n, v in os.environ.items() if n == "CUDA_VISIBLE_DEVICES"}
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            contextlib.chdir(ROOT),
            mock.patch.dict(os.environ, here | dict(environment), clear=True),
            mock.patch.object(sys, "argv", words),
            mock.patch.object(cli, "define"),  # once is enough
            # A process begins without data and window, and looks for the way to the internet.
            mock.patch.object(urllib.request, "_opener", None),
            mock.patch.dict(registry._READ, clear=True),
            mock.patch.multiple(WINDOW, wanted=False, process=None),
        ):
            main.main(main.parse(words))
    except SystemExit as end:
        status = end.code
    finally:
        cli.FLAGS.unparse_flags()
        while record._HELD:  # the run's folder is free again, as at the end of a process
            record._HELD.popitem()[1].close()
    result = Result(status, stdout.getvalue(), stderr.getvalue())
    assert (status == 0) == ok, result
    return result


def run_words(*words):
    """What the program says when it is run in this process with these flags."""
    return run_main(*words).stdout


def run_here(**flags):
    """The program's work in this process, which saves its start: settings as a user gives them."""
    from agglomerator.commands.dispatch import run
    from agglomerator.config import Settings

    run(Settings(**flags), set(flags))


def small_run(folder, *flags, program=run_main):
    """A run of the small settings with a fresh output folder, in this process unless `program` is
    `run_program`."""
    result = program(*SMALL, f"--output_dir={folder}", *flags)
    result.output = folder
    return result


def contents(folder):
    """The contents of all files below a folder."""
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder, stage="contrastive"):
    """Rows of a run's metrics.csv, without the column that tells the time."""
    with (folder / "logs" / stage / "metrics.csv").open(newline="") as file:
        return [{n: v for n, v in row.items() if n != "images/s"} for row in csv.DictReader(file)]


def weights(path):
    """The weights of a checkpoint, name to tensor."""
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def same_weights(one, other):
    """Whether two checkpoints hold the same weights, to the bit."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def steps_done(folder, first=""):
    """Steps of both stages that are safe in last.ckpt, and whether an epoch is in its middle. The
    name of stage one's begins with `first`."""
    total, middle = 0, False
    for prefix in (first, "supervised_"):
        path = folder / "checkpoints" / f"{prefix}last.ckpt"
        if path.is_file():
            last = torch.load(path, map_location="cpu", weights_only=True)
            total += last["global_step"]
            progress = last["loops"]["fit_loop"]["epoch_progress"]["current"]
            middle = progress["processed"] < progress["started"]
    return total, middle


def wait_until(condition, process, seconds=120):
    """Wait for what a process brings about, which must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory):
    """Stage one: 2 epochs of 35 batches, steps of 3 batches, a schedule of 1 epoch, islands."""
    return small_run(
        tmp_path_factory.mktemp("stage_one"),
        "--exp_name=small",
        "--max_epochs=2",
        "--lr_speed=1",
        "--accumulate=3",
        "--plot_islands",
    )


@pytest.fixture(scope="session")
def stage_one_checkpoint(stage_one):
    return stage_one.output / "small" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def stage_two(stage_one_checkpoint, tmp_path_factory):
    """Stage two from the checkpoint of stage one: 2 epochs of 4 batches."""
    return small_run(
        tmp_path_factory.mktemp("stage_two"),
        "--exp_name=small",
        "--max_epochs=2",
        "--lr_speed=2",
        "--limit_train=4",
        "--supervise",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
    )


@pytest.fixture(scope="session")
def stage_two_checkpoint(stage_two):
    return stage_two.output / "small" / "checkpoints" / "supervised_best.ckpt"


def save_published(path, weights):
    """Write a checkpoint as Lightning 1.5 on torch 1.10 left it: beside the tensors it pickles the
    annealing function of the scheduler as getattr(OneCycleLR, ...), which safe loaders refuse."""
    anneal = torch.optim.lr_scheduler.OneCycleLR._annealing_cos
    state = {"step": 43, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    group = {"lr": 0.002, "betas": (0.9, 0.999), "params": [0]}
    content = {
        "epoch": 1,
        "global_step": 43,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": weights,
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {0: state}, "param_groups": [group]}],
        "lr_schedulers": [{"total_steps": 86000, "anneal_func": anneal, "_last_lr": [0.0021]}],
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    torch.save(content, path)
    return path
