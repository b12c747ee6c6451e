"""The runs: train, test, freeze, all; and the one place that builds the Trainer."""

import csv
import dataclasses
import logging
import netrc
import os
import shlex
import shutil
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from agglomerator import checkpoints, flags, report
from agglomerator.data import sets
from agglomerator.data.module import Data
from agglomerator.islands import IslandsView
from agglomerator.model import Agglomerator
from agglomerator.settings import INPUT_SETTINGS, MODEL_SETTINGS, UserError
from agglomerator.stages import Stage, stage_of

STAGE_PREFIX = {"contrastive": "", "supervised": "supervised_", "finetuned": "finetuned_"}


def run(settings, given):
    """Do what the settings ask for.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.

    Raises:
        UserError: it cannot be done; nothing of an earlier run is lost.
    """
    quiet_libraries()
    if settings.mode == "all":
        run_all(settings, given)
    else:
        {"train": train, "test": test, "freeze": freeze}[settings.mode](settings, given)


def run_all(settings, given):
    """Stage one, stage two from its best checkpoint, test, with a picture of the islands."""
    say("Stage one: contrastive pre-training")
    stage_one = dataclasses.replace(settings, supervise=False, finetune=False)
    best = train(stage_one, given, advise=False)
    say("Stage two: the classifier")
    stage_two = settings.replace(
        supervise=True, resume_training=False, load_checkpoint_dir=str(best)
    )
    best = train(stage_two, given, advise=False)
    say("Test")
    test(settings.replace(plot_islands=True, load_checkpoint_dir=str(best)), given)


def train(settings, given, advise=True):
    """Train one stage; returns the path of its best checkpoint."""
    stage = stage_of(settings)
    settings = of_stage(settings)
    folder = run_folder(settings)
    start = checkpoint_to_start(settings, folder)
    if start is None and stage == "supervised":
        raise UserError(
            "--supervise: trains a classifier on a trained network; name its checkpoint by "
            f"--load_checkpoint_dir, as {folder / 'checkpoints' / 'best.ckpt'}, or let everything "
            "learn by --finetune."
        )
    settings, model = network(settings, given, start)
    data = load_data(settings)
    module = Stage(model, settings, data)
    going_on = settings.resume_training and start is not None and start.stage == stage
    if settings.resume_training and start is not None and not going_on:
        of = "the published format" if start.stage is None else f"the {start.stage} stage"
        say(f"{start.path} is of {of}: the {stage} stage starts from its weights.")
    prefix = STAGE_PREFIX[stage]
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename=f"{prefix}best",
        monitor="val_loss",
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        folder / "checkpoints",
        filename=f"{prefix}last",
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    keepers = [best, last] if settings.limit_val else [last]
    trainer = build_trainer(settings, stage, [*keepers, LearningRateMonitor("step")])
    if settings.mode == "all" and trainer.world_size > 1:
        raise UserError("--mode=all: runs in one process; with several run one stage at a time.")
    data.check_batch_size(trainer.world_size)
    check_sight(settings)
    if going_on:
        check_resumed(settings, start)
    else:
        put_aside(folder, stage, start)
    folder.mkdir(parents=True, exist_ok=True)
    rank_zero_only(flags.write)(settings, folder / f"{prefix}flags.cfg")
    steps = len(data.train) // settings.batch_size // trainer.world_size
    trainer.log_every_n_steps = max(1, min(10, steps))
    say(
        f"{settings.dataset}: {len(data.train)} images to train on, {len(data.val)} to validate; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        f"on {trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
        f" x {trainer.world_size}; {settings.max_epochs} epochs, learning rate up to "
        f"{settings.learning_rate}"
    )
    if going_on:
        keep_metrics(trainer.loggers[0], start.step)
    began = time.monotonic()
    ckpt_path = str(start.path) if going_on else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        saved = (folder / "checkpoints" / f"{prefix}last.ckpt").is_file()
        say(
            f"Stopped. Go on by: {command(settings, resume_training=True)}"
            if saved
            else "Stopped in the first epoch, of which nothing is kept."
        )
        raise SystemExit(130) from None
    best_path = Path(best.best_model_path or last.best_model_path)
    minutes = (time.monotonic() - began) / 60
    say(f"\n{stage} training: {trainer.current_epoch} epochs, {minutes:.1f} minutes")
    summarise(trainer, best_path, last.best_model_path)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            rank_zero_only(logger.experiment.finish)()  # the next stage is a run of its own
    if advise:
        following = {"supervise": True} if stage == "contrastive" else {"mode": "test"}
        say(f"Next: {command(settings, load_checkpoint_dir=best_path, **following)}")
    return best_path


def check_sight(settings):
    """Refuse to train a network whose embedding does not depend on the image.

    What the tokens send to level 0 takes an iteration to climb each level.
    """
    n_states = settings.n_iters + 1
    if settings.denoise_iter % n_states < settings.levels:
        raise UserError(
            f"--denoise_iter={settings.denoise_iter} --iters={settings.iters}: the top level of "
            f"{settings.levels} sees nothing of the image before state {settings.levels}; use "
            f"--denoise_iter=-1 and --iters of at least {settings.levels}."
        )


def check_resumed(settings, start):
    """Refuse to go on where there is nothing to do; tell which flags a resumed run keeps."""
    if start.epochs >= settings.max_epochs:
        raise UserError(
            f"--max_epochs={settings.max_epochs}: {start.path} has done {start.epochs} epochs; "
            "ask for more, or start the next stage from it."
        )
    for name in ("learning_rate", "lr_speed", "weight_decay"):
        kept = start.settings.get(name)
        if kept is not None and kept != getattr(settings, name):
            say(f"--{name}: the resumed run keeps {kept}.")


def summarise(trainer, best_path, last_path):
    """Say how a training ended and where everything lies."""
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        if name in trainer.callback_metrics:
            say(f"  {name:<11} {float(trainer.callback_metrics[name]):.4f}")
    say(f"  best        {best_path}")
    say(f"  last        {last_path}")
    say(f"  metrics     {Path(trainer.loggers[0].log_dir) / 'metrics.csv'}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger._offline:
            upload = f"wandb sync {Path(logger.experiment.dir).parent}"
            say(f"  wandb       logged offline; upload by: {upload}")


@rank_zero_only
def test(settings, given):
    """Test a checkpoint on the test set, once, whole, in order; writes the figures."""
    start = checkpoint_needed(settings)
    trained_on = start.settings.get("dataset", settings.dataset)
    if "dataset" in given and trained_on != settings.dataset:
        say(f"{start.path} was trained on {trained_on}, not on {settings.dataset}.")
    if start.stage is None and not settings.supervise:
        say(f"{start.path} does not name its stage: taken as stage one (--supervise: stage two).")
    if start.stage is not None:
        settings = settings.replace(
            supervise=start.stage != "contrastive", finetune=start.stage == "finetuned"
        )
    stage = stage_of(settings)
    settings, model = network(settings, given, start)
    data = load_data(settings)
    folder = run_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    module = Stage(model, settings, data)
    trainer = build_trainer(settings, f"{stage}_test", logs=settings.plot_islands)
    if stage == "contrastive":
        say("Stage one: classes by the nearest mean of the training images.")
        trainer.limit_predict_batches = settings.limit_train
        module.set_class_means(*embed(trainer, module, data, data.train))
    trainer.test(module, datamodule=data, verbose=False)
    record = report.record_of(
        settings,
        stage,
        start.path,
        float(trainer.callback_metrics["test_loss"]),
        float(module.top5.compute()),
        module.confusion.compute().cpu().numpy(),
        data.classes,
    )
    confusion = np.array(record["confusion_matrix"])
    paths = report.write_test(folder, stage, record, confusion, data.classes)
    say("\n".join(report.lines_of(record)))
    if settings.plot_islands:
        paths.append(folder / "islands" / f"{stage}_test.png")
    say("Written: " + ", ".join(map(str, paths)))
    say(f"Next: {command(settings, mode='freeze', load_checkpoint_dir=start.path)}")


@rank_zero_only
def freeze(settings, given):
    """Write the embeddings and labels of all images as .npy files, in data-set order."""
    start = checkpoint_needed(settings)
    settings, model = network(settings, given, start)
    data = load_data(settings)
    folder = run_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    module = Stage(model, settings, data)
    trainer = build_trainer(settings, stage_of(settings), logs=False)
    for name in ("train", "val", "test"):
        embedding, labels = embed(trainer, module, data, getattr(data, name))
        save_array(folder / f"features_{name}.npy", embedding.numpy())
        save_array(folder / f"labels_{name}.npy", labels.numpy())
        say(f"{folder}/features_{name}.npy  {tuple(embedding.shape)}, labels_{name}.npy")


def embed(trainer, module, data, subset):
    """Embeddings (N, contr_dim) and labels (N,) of a subset, in its order, on the CPU."""
    data.trainer = trainer
    batches = trainer.predict(module, data.in_order(subset))
    embedding, labels = zip(*batches, strict=True)
    return torch.cat(embedding), torch.cat(labels)


def save_array(path, array):
    """Write a .npy file so that it is there whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def build_trainer(settings, stage, callbacks=(), logs=True):
    """The Trainer of a run.

    Raises:
        UserError: Lightning refuses the flags of the machine.
    """
    s = settings
    callbacks = list(callbacks)
    training = bool(callbacks)
    on_gpus = s.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    terminal = sys.stderr.isatty()
    callbacks.append(Progress() if terminal else EpochLines())
    if training:
        callbacks.insert(0, ImagesPerSecond(s.batch_size))
    folder = run_folder(s)
    if s.plot_islands and s.mode != "freeze":
        callbacks.append(IslandsView(folder / "islands", stage.removesuffix("_test")))
    devices = s.devices
    if devices is None:
        devices = s.num_gpus if on_gpus else 1
        if on_gpus and devices > torch.cuda.device_count():
            raise UserError(
                f"--num_gpus={devices}: this machine has {torch.cuda.device_count()}; use fewer."
            )
    try:
        return pl.Trainer(
            accelerator=s.accelerator,
            # Every test image counts once and features keep their order on one device.
            devices=devices if training else 1,
            num_nodes=s.num_nodes if training else 1,
            strategy=s.strategy if training else "auto",
            precision=s.precision,
            max_epochs=s.max_epochs,
            accumulate_grad_batches=s.accumulate,
            check_val_every_n_epoch=s.validate_every,
            limit_train_batches=s.limit_train,
            limit_val_batches=s.limit_val,
            limit_test_batches=s.limit_test,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            use_distributed_sampler=False,
            sync_batchnorm=training and on_gpus,
            default_root_dir=folder,
            logger=build_loggers(s, folder / "logs", stage) if logs else False,
            callbacks=callbacks,
            plugins=AtomicCheckpointIO(),
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name first, so that it is there whole or not at all."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, f"{path}.partial", storage_options)
        os.replace(f"{path}.partial", path)


def build_loggers(settings, folder, stage):
    """The CSV logger, and the one that --logger names."""
    loggers = [CSVLogger(folder, name="", version=stage, flush_logs_every_n_steps=10)]
    if settings.logger == "tensorboard":
        loggers.append(TensorBoardLogger(folder, name="", version=stage, default_hp_metric=False))
    if settings.logger == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        offline = not has_wandb_account()
        if offline:
            os.environ.setdefault("WANDB_MODE", "offline")  # or it asks for an account
        (folder / stage).mkdir(parents=True, exist_ok=True)
        name = f"{settings.exp_name} {stage}"
        loggers.append(WandbLogger(name, folder / stage, project="Agglomerator", offline=offline))
    return loggers


@rank_zero_only
def keep_metrics(logger, step):
    """Keep the rows before a step of the CSV that an interrupted run has left; Lightning would
    begin a new file."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        rows = [row for row in table if int(row["step"]) < step]
    logger.experiment.metrics_keys = table.fieldnames
    with path.open("w", newline="", encoding="utf-8") as file:
        kept = csv.DictWriter(file, table.fieldnames)
        kept.writeheader()
        kept.writerows(rows)


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


def of_stage(settings):
    """Settings with the length and rate of stage two in their place, where stage two is asked."""
    s = settings
    if stage_of(s) == "contrastive":
        return s
    length = s.supervised_epochs
    return s.replace(
        lr_speed=length or s.lr_speed,
        max_epochs=length or s.max_epochs,
        learning_rate=s.supervised_learning_rate or s.learning_rate,
    )


def run_folder(settings):
    """The folder of a run."""
    return Path(settings.output_dir) / settings.exp_name


def checkpoint_to_start(settings, folder):
    """The checkpoint that training starts from, or None."""
    if settings.load_checkpoint_dir is not None:
        return checkpoints.read(settings.load_checkpoint_dir)
    last = folder / "checkpoints" / f"{STAGE_PREFIX[stage_of(settings)]}last.ckpt"
    if settings.resume_training:
        if not last.is_file():
            raise UserError(
                f"--resume_training: there is no {last}; name a checkpoint by "
                "--load_checkpoint_dir."
            )
        return checkpoints.read(last)
    return None


def checkpoint_needed(settings):
    """The checkpoint of a run that cannot do without."""
    if settings.load_checkpoint_dir is None:
        folder = run_folder(settings) / "checkpoints"
        raise UserError(
            f"--mode={settings.mode}: needs a checkpoint; name it by --load_checkpoint_dir, as "
            f"--load_checkpoint_dir={folder / 'best.ckpt'}."
        )
    return checkpoints.read(settings.load_checkpoint_dir)


def network(settings, given, checkpoint):
    """The settings, completed from the checkpoint, and the network with its weights if any."""
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    if checkpoint is None:
        settings = sets.complete(settings, given)
        return settings, Agglomerator(**dataclasses.asdict(settings))
    settings = checkpoints.complete(settings, given, checkpoint)
    wanted = {name: getattr(settings, name) for name in (*MODEL_SETTINGS, *INPUT_SETTINGS)}
    return settings, checkpoints.build(checkpoint, **wanted)


def load_data(settings):
    """The data of a run, downloaded and read."""
    data = Data(settings)
    rank_zero_only(data.prepare_data)()
    data.setup()
    return data


@rank_zero_only
def put_aside(folder, stage, start):
    """Move what an earlier run of the same stage and name left, so that nothing is lost.

    The checkpoint to start from is copied: other processes may be about to read it.
    """
    prefix = STAGE_PREFIX[stage]
    names = [f"checkpoints/{prefix}best.ckpt", f"checkpoints/{prefix}last.ckpt"]
    names += [f"logs/{stage}", f"{prefix}flags.cfg", f"test_{stage}.json"]
    names += [f"confusion_{stage}.csv", f"confusion_{stage}.png"]
    if stage == "contrastive":
        names.append("islands")
    left = [name for name in names if (folder / name).exists()]
    if not left:
        return
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    aside = folder / "earlier" / f"{now}_{stage}"
    for name in left:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        needed = start is not None and (folder / name).samefile(start.path)
        (shutil.copy2 if needed else shutil.move)(folder / name, aside / name)
    say(f"An earlier run of this name was moved to {aside}.")


def command(settings, **changes):
    """The command line of this run with some flags changed, ready to copy."""
    changed = {"mode", "supervise", "resume_training", "load_checkpoint_dir"} | set(changes)
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            kept.append(argument)
        elif name in changed or name.removeprefix("no") in changed:
            if not value and name in ("mode", "load_checkpoint_dir"):
                next(arguments, None)
        else:
            kept.append(argument)
    stage_two = settings.supervise or settings.finetune
    if stage_two and "supervise" not in changes and "--finetune" not in kept:
        kept.append("--supervise")
    for name, value in changes.items():
        kept.append(f"--{name}" if value is True else f"--{name}={value}")
    return shlex.join([python(), sys.argv[0], *kept])


def python():
    """How the user's shell finds the Python that runs this."""
    on_path = shutil.which("python")
    if on_path and Path(on_path) == Path(sys.executable) and "PIPENV_ACTIVE" not in os.environ:
        return "python"
    here = Path.cwd()
    path = Path(sys.executable)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@rank_zero_only
def say(text):
    print(text, flush=True)


def quiet_libraries():
    """Silence what other packages say and a user of this one can do nothing about."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torchmetrics")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")


class ImagesPerSecond(Callback):
    """Logs images trained per second, over the epoch so far."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def on_train_epoch_start(self, trainer, module):
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        images = (batch_idx + 1) * self.batch_size * trainer.world_size
        rate = images / (time.perf_counter() - self.began)
        module.log("images/s", rate, on_step=True, on_epoch=False, prog_bar=True)


class Progress(TQDMProgressBar):
    """The progress bar of a terminal: epoch, loss, accuracy, images/s."""

    def get_metrics(self, trainer, module):
        items = super().get_metrics(trainer, module)
        items.pop("v_num", None)
        items.pop("train_loss_epoch", None)
        return items


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
        parts = [
            f"{name} {metrics[name]:{form}}"
            for name, form in self.FORMATS.items()
            if name in metrics
        ]
        say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  " + "  ".join(parts))
