"""Several processes that train together, on the CPU by gloo: they do what one would do."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from conftest import ROOT, SMALL, rows, run_program, same_weights, steps_done, wait_until
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.losses.masked import hidden_pixel_loss, level_cosine_loss
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer, quiet_libraries
from agglomerator.util import distributed

pytestmark = pytest.mark.slow
STEPS = 20
SETTINGS = Settings(
    dataset="digits",
    image_size=16,
    conv_image_size=4,
    n_channels=1,
    patch_dim=16,
    contr_dim=32,
    batch_size=32,
    dropout=0.0,
    learning_rate=0.002,
    lr_speed=1,
    max_epochs=1,
    limit_train=STEPS,
    accelerator="cpu",
    # What rounding leaves of a gradient of zero AdamW blows up to a whole step.
    precision="64-true",
    logger="none",
)


@pytest.mark.parametrize(
    ("flags", "looks_for_unused"),
    [
        (dict(devices="2"), False),
        (dict(devices="2", denoise_iter=0), True),
        (dict(devices="2", strategy="ddp_find_unused_parameters_true"), True),
        (dict(strategy="ddp_spawn"), False),
    ],
    ids=["several processes", "blind network", "as the name says", "one process"],
)
def test_every_ddp_strategy_has_the_options_of_the_project(tmp_path, flags, looks_for_unused):
    known = {name: dict(entry["init_params"]) for name, entry in StrategyRegistry.items()}
    settings = SETTINGS.replace(output_dir=str(tmp_path), **flags)
    strategy = build_trainer(settings, training=True, logs=False).strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is looks_for_unused
    assert strategy._ddp_kwargs["broadcast_buffers"] is False
    assert known == {name: entry["init_params"] for name, entry in StrategyRegistry.items()}


def test_one_process_needs_no_strategy(tmp_path):
    settings = SETTINGS.replace(output_dir=str(tmp_path))
    strategy = build_trainer(settings, training=True, logs=False).strategy
    assert isinstance(strategy, SingleDeviceStrategy)


class FixedViews(ImageDataModule):
    """Views of an image that depend on nothing else: itself, and its mirror image as a second."""

    def augmented_view(self, images, generator):
        view = self.view(images)
        if self.settings.n_views == 1:
            return view
        half = len(view) // 2
        return torch.cat((view[:half], view[half:].flip(-1)))


class Record(Callback):
    """Keeps the losses, the gradients of the first step and the figures of validation."""

    def __init__(self):
        self.losses, self.gradients, self.figures = [], {}, {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not self.gradients:
            learning = ((name, p.grad) for name, p in module.model.named_parameters())
            self.gradients = {name: g.clone() for name, g in learning if g is not None}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())

    def on_validation_end(self, trainer, module):
        names = "val_loss", "val_acc"
        self.figures = {name: trainer.callback_metrics[name] for name in names}
        self.figures["class_means"] = module.metrics.class_means.compute()


def _train(rank, world, folder, changes, port):
    """Train as one of so many processes; leaves what happened in a file."""
    if world > 1:
        os.environ |= by_hand(rank, world, port)
    torch.set_num_threads(1)
    quiet_libraries()
    settings = SETTINGS.replace(
        batch_size=SETTINGS.batch_size // world,
        devices=str(world),
        output_dir=f"{folder}/{world}",
        **changes,
    )
    pl.seed_everything(settings.seed, verbose=False)
    data = FixedViews(settings)
    data.setup()
    module = LitAgglomerator(Agglomerator(**dataclasses.asdict(settings)), settings, data)
    record = Record()
    build_trainer(settings, True, [record]).fit(module, datamodule=data)
    assert distributed.n_processes() == world
    found = {name: getattr(record, name) for name in ("losses", "gradients", "figures")}
    found["weights"] = module.model.state_dict()
    torch.save(found, f"{folder}/{world}_{rank}.pt")
    distributed.leave_process_group()


def by_hand(rank, world, port):
    """Environment variables of one of so many processes that a person starts."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return names | {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}


def by_slurm(rank, world, port):
    """The same, as SLURM's srun sets them."""
    names = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": world, "NTASKS_PER_NODE": world}
    names |= {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NNODES": 1, "NODELIST": "localhost"}
    slurm = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return slurm | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train(folder, world, **changes):
    """What each of so many processes left."""
    mp.spawn(_train, (world, str(folder), changes, free_port()), nprocs=world)
    return [torch.load(folder / f"{world}_{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("learns", ["contrastive", "prototypes", "supervise", "finetune"])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, learns):
    changes = {} if learns == "contrastive" else {learns: True}
    (one,) = train(tmp_path, 1, **changes)
    two = train(tmp_path, 2, **changes)
    assert len(one["losses"]) == STEPS and one["gradients"]
    same = dict(atol=1e-5, rtol=1e-5)
    for found in two:
        torch.testing.assert_close(found["gradients"], one["gradients"], **same)
        torch.testing.assert_close(found["weights"], one["weights"], **same)
    of_both = [(a + b) / 2 for a, b in zip(*(found["losses"] for found in two), strict=True)]
    torch.testing.assert_close(of_both, one["losses"], **same)
    contrasts = learns in ("contrastive", "prototypes")
    names = ["val_acc", "class_means"] + ["val_loss"] * (not contrasts)
    for name in names:  # the contrastive loss of validation is that of each process's batches
        torch.testing.assert_close(two[0]["figures"][name], one["figures"][name], **same)
    torch.testing.assert_close(two[0]["weights"], two[1]["weights"], atol=0, rtol=0)


def _learn_masked(rank, world, folder, port):
    """The losses of masked pre-training of a share of 4 images, and their mean gradients."""
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    torch.manual_seed(0)
    flags = dict(image_size=16, conv_image_size=4, patch_dim=8, pretraining="masked", head="mean")
    model = Agglomerator(**flags).double()
    images, mine = torch.randn(4, 3, 16, 16, dtype=torch.float64), slice(rank, None, world)
    hidden = model.masked.draw(4, torch.Generator().manual_seed(1), images.device)[mine]
    pixels, states = model.reconstruct(images[mine], hidden)
    losses = hidden_pixel_loss(pixels, images[mine], hidden), level_cosine_loss(model, states)
    sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for each in (*losses, *gradients.values()):
        torch.distributed.all_reduce(each.data)
        each.data /= world
    torch.save((losses, gradients), f"{folder}/{world}.pt")
    distributed.leave_process_group()


def test_losses_of_masked_pretraining_are_those_of_the_whole_batch(tmp_path):
    found = []
    for world in (1, 2):
        mp.spawn(_learn_masked, (world, str(tmp_path), free_port()), nprocs=world)
        found.append(torch.load(tmp_path / f"{world}.pt"))
    assert found[0][0][1] > 0 and "masked.patch" in found[0][1]
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-5)


@contextlib.contextmanager
def launch(folder, *launcher, environment=(), **options):
    """The program started on two processes, of which none is left in the end."""
    flags = *SMALL, "--exp_name=two", f"--output_dir={folder}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(environment)
    command = [sys.executable, *launcher, *flags, *(f"--{n}={v}" for n, v in options.items())]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "src/main.py"
BY_ITSELF = "src/main.py", "--devices=2"


@pytest.mark.parametrize("launcher", [TORCHRUN, BY_ITSELF], ids=["torchrun", "by itself"])
def test_all_stages_in_two_processes(tmp_path, launcher):
    few = dict(max_epochs=1, limit_train=4, limit_val=2, limit_test=2, iters=1)
    with launch(tmp_path, *launcher, mode="all", **few) as run:
        stdout, stderr = run.communicate(timeout=200)
    assert run.returncode == 0, stderr
    assert stdout.count("epoch 1/1") == 2 and stdout.count("CPU x 2") == 2
    assert stdout.count("(64 test images, by classifier)") == 1
    folder = tmp_path / "two"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert (folder / "islands" / "supervised_test.png").is_file()
    _, *table = (folder / "predictions_supervised.csv").read_text().splitlines()
    indices = [int(row.split(",")[0]) for row in table]
    assert len(indices) == 64 and indices == sorted(set(indices))
    assert not (folder / "earlier").exists()


@pytest.mark.parametrize("environment", [by_hand, by_slurm])
def test_processes_that_others_start_train_together_and_end_together(tmp_path, environment):
    few = dict(max_epochs=1000, limit_train=4, limit_val=2, iters=1)
    port = free_port()
    with contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(
                launch(tmp_path, *BY_ITSELF, environment=environment(rank, 2, port), **few)
            )
            for rank in range(2)
        )
        last = tmp_path / "two" / "checkpoints" / "last.ckpt"
        wait_until(last.is_file, one)
        two.send_signal(signal.SIGUSR1)  # one is enough
        said = [run.communicate(timeout=60) for run in (one, two)]
    assert one.returncode == 128 + signal.SIGUSR1, said
    assert "CPU x 2" in said[0][0] and "Stopped by SIGUSR1. Go on by: " in said[0][0]
    assert [stderr for _, stderr in said] == ["", ""] and not said[1][0]
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] % 4 == 0 and len(checkpoint["epoch_so_far"][0]) == 2


def test_freeze_in_two_processes_writes_once_and_in_order(stage_one_checkpoint, tmp_path):
    flags = dict(mode="freeze", load_checkpoint_dir=stage_one_checkpoint)
    stdouts = []
    for name, launcher in (("one", BY_ITSELF[:1]), ("two", TORCHRUN)):
        with launch(tmp_path / name, *launcher, **flags) as run:
            stdout, stderr = run.communicate(timeout=200)
        assert run.returncode == 0, stderr
        stdouts.append(stdout.replace(str(tmp_path / name), ""))
    assert stdouts[0] == stdouts[1] and stdouts[1].count("Written") == 1
    for path in (tmp_path / "one" / "two").glob("*.npy"):
        found = np.load(tmp_path / "two" / "two" / path.name)
        np.testing.assert_allclose(found, np.load(path), atol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_one_process_ends_the_other(tmp_path, victim):
    with launch(tmp_path, *BY_ITSELF, max_epochs=1000) as run:
        while not run.stdout.readline().startswith("epoch 1/"):
            assert run.poll() is None
        (child,) = children(run.pid)
        os.kill((run.pid, child)[victim], signal.SIGKILL)
        stderr = run.communicate(timeout=60)[1]  # open until both have ended
    assert run.returncode != 0
    assert "another process of this training ended" in stderr
    assert "Traceback" not in stderr


OPTIONS = {
    "published": dict(iters=1),
    "masked": dict(iters=2, iters_spread=1, pretraining="masked", level_cosine=0.1),
    "agreement": dict(consensus="agreement_repel", head="dissimilarity", iters_spread=1),
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, option):
    flags = dict(max_epochs=2, lr_speed=2, limit_val=2, batch_size=8) | option
    stage, prefix = ("masked", "masked_") if "pretraining" in option else ("contrastive", "")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with launch(whole, *BY_ITSELF, **flags) as run:
        stderr = run.communicate(timeout=100)[1]
    assert run.returncode == 0, stderr
    last = parts / "two" / "checkpoints" / f"{prefix}last.ckpt"
    with launch(parts, *BY_ITSELF, checkpoint_every=0, **flags) as run:
        wait_until(last.is_file, run)
        run.send_signal(signal.SIGTERM)
        stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and not stderr
    assert stdout.count("Stopped by SIGTERM. Go on by: ") == stdout.count("Stopped") == 1
    assert steps_done(parts / "two", prefix)[1]  # in the middle of an epoch
    with launch(parts, *BY_ITSELF, resume_training=True, **flags) as run:
        stderr = run.communicate(timeout=100)[1]
    assert run.returncode == 0, stderr
    for launcher in (BY_ITSELF, TORCHRUN):
        with launch(parts, *launcher, resume_training=True, **flags) as run:
            stdout, stderr = run.communicate(timeout=100)
        assert run.returncode == 0, stderr
        assert [line.split(": ")[0] for line in stdout.splitlines()] == ["It is done", "Next"]
    assert rows(parts / "two", stage) == rows(whole / "two", stage)
    for name in ("best", "last"):
        path = f"two/checkpoints/{prefix}{name}.ckpt"
        assert same_weights(parts / path, whole / path)


def test_processes_that_validate_unequal_numbers_of_batches(tmp_path):
    """287 images: 12 batches of 13 in one, 11 in the other."""
    flags = OPTIONS["masked"] | dict(batch_size=13, limit_train=2, max_epochs=1)
    with launch(tmp_path, *BY_ITSELF, **flags) as run:
        stderr = run.communicate(timeout=100)[1]
    assert run.returncode == 0, stderr
    (row,) = [row for row in rows(tmp_path / "two", "masked") if row["val_loss"]]
    assert float(row["val_loss"]) > 0


def children(pid):
    """Processes that a process has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = (map(int, line.split()) for line in listed.splitlines())
    return [child for child, parent in pairs if parent == pid]


def test_mpi_is_not_started_without_mpirun(tmp_path):
    """Lightning would import mpi4py to ask, which starts MPI and may end the process."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("import os; os._exit(1)")
    run_program(*SMALL, "--max_epochs=1", "--limit_train=1", "--limit_val=0",
                f"--output_dir={tmp_path}", environment={"PYTHONPATH": str(tmp_path)})  # fmt: skip
