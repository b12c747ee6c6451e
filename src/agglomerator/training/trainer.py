"""The one Trainer, with its loggers and what it shows while it runs."""

import logging
import netrc
import os
import sys
import time
import warnings
from datetime import timedelta
from urllib.parse import urlsplit

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies.launchers import subprocess_script
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from agglomerator.islands.live_view import IslandsView
from agglomerator.runs.checkpoint_callbacks import AtomicCheckpointIO
from agglomerator.runs.folder import RunFolder
from agglomerator.runs.metrics_file import MetricsLogger
from agglomerator.training.finite import StopUnlessFinite
from agglomerator.util.errors import UserError
from agglomerator.util.machine import device_of, devices_of, processes_here
from agglomerator.util.terminal import say

LAUNCHERS = TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment
OF_MPI = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"  # what mpirun tells its processes
TF32, PLAIN = "tf32", "32-true"  # what the flag adds to Lightning's names, and its name for float32
TIMEOUT = timedelta(minutes=10)  # a process that does not answer for so long counts as lost


def build_trainer(settings, training, callbacks=(), logs=True):
    """The Trainer of a run.

    Args:
        settings: of the run.
        training: it trains, on all devices; else it looks at each image once, on one device.
        callbacks: beside those that every run has.
        logs: whether metrics go to the loggers.

    Raises:
        UserError: Lightning refuses the flags of the machine.
    """
    s, folder = settings, RunFolder(settings)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    version = s.stage if training else f"{s.stage}_test"
    devices, num_nodes = devices_of(s)
    if training:
        check_precision(s.precision)
    try:
        trainer = pl.Trainer(
            accelerator=s.accelerator,
            # Every test image counts once and features keep their order on one device.
            devices=devices if training else device_of(s),
            num_nodes=num_nodes if training else 1,
            strategy=strategy_of(s) if training else "auto",
            precision=PLAIN if s.precision == TF32 else s.precision,
            max_epochs=s.max_epochs,
            accumulate_grad_batches=s.accumulate,
            check_val_every_n_epoch=s.validate_every,
            limit_train_batches=s.limit_train,
            limit_val_batches=s.limit_val,
            num_sanity_val_steps=0,
            benchmark=training,  # cuDNN tries its algorithms: the shapes of a training are few
            log_every_n_steps=10,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
            logger=build_loggers(s, folder.logs.parent, version, training) if logs else False,
            callbacks=callbacks_of(s, training, terminal, callbacks),
            plugins=[AtomicCheckpointIO(), *cluster_environment(training)],
            enable_checkpointing=training,
            enable_progress_bar=terminal,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--accelerator={s.accelerator} --precision={s.precision} --strategy={s.strategy} "
            f"--devices={s.devices}: {reason}"
        ) from None
    by_tf32 = allow_tf32(s.precision, trainer.strategy.root_device)
    if not by_tf32 and not trainer.precision.startswith(s.precision):
        say(f"--precision={s.precision}: this device computes in {trainer.precision}.")
    return trainer


def callbacks_of(settings, training, terminal, others):
    """All callbacks of a run, as a list: those that every run has, and others."""
    s, callbacks = settings, [*others, Progress() if terminal else EpochLines()]
    if training:
        callbacks[:0] = Pace(s.batch_size), StopUnlessFinite()
    if s.plot_islands and s.mode != "freeze":
        folder = RunFolder(s)
        pictures = {"kinds": s.figure_kinds, "dpi": s.figure_dpi, "projection": folder.projection}
        callbacks.append(IslandsView(folder.islands, s.stage, **s.found_by, **pictures))
    return callbacks


def cluster_environment(training):
    """Who starts the processes of a run, as a list for Trainer's `plugins`: the run itself, or a
    launcher, which Lightning then finds.

    Lightning also starts MPI to ask whether there are other processes, wherever mpi4py is
    installed, and a broken MPI ends the process without a word. So MPI counts only under mpirun.
    """
    launched = any(launcher.detect() for launcher in LAUNCHERS)
    launched |= any(name in os.environ for name in OF_MPI)
    return [] if training and launched else [LightningEnvironment()]


def check_precision(precision):
    """Raises UserError if nothing can learn in a precision."""
    if precision == "16-true":
        raise UserError(
            "--precision=16-true: gradients and their squares vanish in 16-bit floats of so small "
            "a range, and nothing learns; use 16-mixed, bf16-mixed or bf16-true."
        )


def allow_tf32(precision, device):
    """Let float32 products and convolutions on an NVIDIA GPU keep 10 bits of each factor, or not:
    PyTorch alone lets convolutions and does not let products.

    Returns:
        Whether they do.
    """
    allowed = precision == TF32 and device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    return allowed


def strategy_of(settings):
    """The strategy of a training, as Trainer takes it: one of Lightning's DDP strategies with the
    options of this project, or the name of another one."""
    s = settings
    shared = s.strategy.lower() == "auto" and processes_here(s) * devices_of(s)[1] > 1
    name = "ddp" if shared else s.strategy.lower()  # as Lightning takes it
    if name not in StrategyRegistry or StrategyRegistry[name]["strategy"] is not DDPStrategy:
        return name
    options = {
        "timeout": TIMEOUT,
        # Batch norm is equal in all processes already; each has class sums of its own.
        "broadcast_buffers": False,
        # Some parameters of a blind network get no gradient, so that DDP has to look for them.
        "find_unused_parameters": s.blind,
    }
    return DDPStrategy(**options | StrategyRegistry[name]["init_params"])


def build_loggers(settings, folder, version, training=False):
    """The CSV logger of a training, and the one that --logger names, with a folder `version`."""
    loggers = []
    if training:
        loggers.append(MetricsLogger(folder, name="", version=version, flush_logs_every_n_steps=10))
    if settings.logger == "tensorboard":
        loggers.append(TensorBoardLogger(folder, name="", version=version, default_hp_metric=False))
    if settings.logger == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        offline = not has_wandb_account()
        if offline:
            os.environ.setdefault("WANDB_MODE", "offline")  # or it asks for an account
        (folder / version).mkdir(parents=True, exist_ok=True)
        name = f"{settings.exp_name} {version}"
        loggers.append(WandbLogger(name, folder / version, project="Agglomerator", offline=offline))
        loggers[-1]._wandb_init.pop("anonymous", None)  # wandb warns of this, even if it is None
    return loggers


def has_wandb_account():
    """Whether Weights & Biases would log in without asking."""
    import wandb

    wanted = wandb.Settings()
    if wanted.mode in ("offline", "disabled") or wanted.api_key:
        return wanted.mode not in ("offline", "disabled")
    host = urlsplit(wanted.base_url).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Pace(Callback):
    """Logs the learning rate of each step, and images trained per second over the epoch so far: as
    tensors on the CPU, since to put a number on an accelerator is to wait for it."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.first = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0 or self.first is None:  # a resumed run may begin within an epoch
            self.first, self.began = batch_idx, time.perf_counter()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        module.log("learning_rate", torch.tensor(rate), on_step=True, on_epoch=False)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        images = (batch_idx + 1 - self.first) * self.batch_size * trainer.world_size
        rate = images / (time.perf_counter() - self.began)
        module.log("images/s", torch.tensor(rate), on_step=True, on_epoch=False)


class Progress(TQDMProgressBar):
    """The progress bar of a terminal: epoch, loss, accuracy, images/s. It reads them every tenth
    step; Lightning reads what is logged for a bar after every one."""

    def __init__(self):
        super().__init__(refresh_rate=10)

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self.on_train_epoch_start(trainer, module)  # of which a resumed run may be in the middle

    def get_metrics(self, trainer, module):
        items = super().get_metrics(trainer, module)
        items.pop("v_num", None)
        logged = trainer.callback_metrics
        steps = "train_loss_step", "images/s"
        return items | {name: float(logged[name]) for name in steps if name in logged}


class EpochLines(Callback):
    """One line an epoch, for output that is not a terminal."""

    FORMATS = {
        "train_loss": ".4f",
        "train_acc": ".2%",
        "val_loss": ".4f",
        "val_acc": ".2%",
        "images/s": ".0f",
    }

    def on_train_epoch_end(self, trainer, module):
        metrics = trainer.logged_metrics | trainer.callback_metrics
        validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
        parts = [
            f"{name} {metrics[name]:{form}}"
            for name, form in self.FORMATS.items()
            if name in metrics and (validated or not name.startswith("val_"))
        ]
        say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  " + "  ".join(parts))


def quiet_libraries():
    """Silence messages of other packages that a user of this one can do nothing about."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It says that it ends all processes because one has died.
    logging.getLogger(subprocess_script.__name__).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torchmetrics")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
