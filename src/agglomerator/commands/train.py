"""`--mode=train`: one stage of training."""

import time
from contextlib import contextmanager, suppress

from agglomerator import cli
from agglomerator.commands.build import build_data, build_network
from agglomerator.commands.faults import as_user_error
from agglomerator.commands.report import (
    describe,
    finish,
    how_to_go_on,
    say_next,
    summarise,
    tell_blindness,
)
from agglomerator.config import INPUT_SETTINGS, MODEL_SETTINGS
from agglomerator.config.checks import check_spread
from agglomerator.plan import KEPT, OF_TRAINING, of_stage, resolve
from agglomerator.runs import checkpoints
from agglomerator.runs.checkpoint_callbacks import BestCheckpoint, LastCheckpoint
from agglomerator.runs.folder import RunFolder
from agglomerator.runs.metrics_file import keep_metrics
from agglomerator.runs.record import lock_run_folder, put_aside, put_figures_aside, recorded
from agglomerator.runs.signals import Stopped, StopSignals
from agglomerator.training.length import tell_length
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer
from agglomerator.util import distributed
from agglomerator.util.errors import SharedError, UserError
from agglomerator.util.files import copy_whole, written_whole
from agglomerator.util.machine import count_gpus
from agglomerator.util.terminal import say

# Settings of which a finished training cannot take up another value: it is told.
DECIDED = tuple(dict.fromkeys((*MODEL_SETTINGS, *INPUT_SETTINGS, "optimizer", *KEPT, *OF_TRAINING)))


def train(settings, given, advise=True):
    """Train one stage.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.
        advise: say at the end what comes next.

    Returns:
        The path of its best checkpoint, or of the last one where nothing was validated.
    """
    plan = resolve(settings, given, "train")
    check_spread(plan.settings)
    if plan.is_done:
        best = tell_done(plan.settings, plan.start, given)
    else:
        best = run_training(plan, given)
    if advise:
        say_next(plan.settings, best)
    return best


def run_training(plan, given):
    """Train as a `Plan` says; returns as `train` does."""
    settings, folder = plan.settings, plan.folder
    model = build_network(plan, training=True)
    signals = StopSignals()
    best_checkpoint = BestCheckpoint(folder.best, settings.chosen_by, settings.validate_every)
    last_checkpoint = LastCheckpoint(folder.last, settings.checkpoint_every, signals)
    callbacks = [best_checkpoint] * bool(settings.limit_val) + [last_checkpoint]
    trainer = build_trainer(settings, True, callbacks)
    if trainer.is_global_zero:
        lock_run_folder(folder.path, folder.stage)
    data = build_data(plan)
    data.check_batch_size(trainer.world_size)
    module = LitAgglomerator(
        model, settings, data, began_from=plan.began_from, starts_from=classifier_start(plan)
    )
    steps = data.images_an_epoch("train", trainer.world_size) // settings.batch_size
    trainer.log_every_n_steps = max(1, min(10, steps // trainer.world_size))
    tell_start(plan, given, len(data.train))
    prepare_folder(plan, trainer)
    say(describe(module, trainer))
    fit(plan, trainer, module, signals)
    validated = best_checkpoint.best_model_path or plan.goes_on_in_place
    best = folder.best if validated and folder.best.is_file() else folder.last
    summarise(trainer, best, folder)
    # A signal may have come after the last step; of --mode=all there is more to stop.
    device, goes_on = trainer.strategy.root_device, settings.mode == "all"
    stop = goes_on and distributed.greatest(signals.received, device)
    finish(trainer.loggers)
    if stop:
        raise Stopped(stop)
    return best


def classifier_start(plan):
    """What the classifier begins from where it has not learned these classes yet: "prototypes",
    "class_means", or None for the weights that it has, as always with --head=mean."""
    start, s = plan.start, plan.settings
    if start is None or plan.goes_on or not s.classifies or s.head == "mean":
        return None
    if s.classifier_start == "weights":
        return None
    if not plan.own_classifier:
        return "class_means"
    if s.prototypes and start.stage == "contrastive":
        return "prototypes"
    return "class_means" if start.stage in (None, "contrastive", "masked") else None


def tell_start(plan, given, n_images):
    """Say what follows from the number of images, and what the training begins from where that is
    not what the flags suggest."""
    settings, start = plan.settings, plan.start
    length = tell_length(settings, given, n_images)
    if length is not None:
        say(length)
    if start is not None and settings.resume_training and not plan.goes_on:
        of = "the published format" if start.stage is None else f"the {start.stage} stage"
        of = "its teacher" if settings.is_taught else f"of {of}"
        say(f"{start.name} is {of}: the {settings.stage} stage starts from its weights.")
    if "agreement_cue" in given and settings.stage == "contrastive" and not settings.agreement:
        say("--agreement_cue: does nothing without --agreement, such as --agreement=10.")
    if "num_gpus" in given and settings.num_gpus > 1 and not count_gpus(settings.accelerator):
        say(f"--num_gpus={settings.num_gpus}: no GPU here; for processes on the CPU use --devices.")
    tell_blindness(settings)


def prepare_folder(plan, trainer):
    """Put what an earlier run left aside, and write the settings of this one."""
    folder, start = plan.folder, plan.start
    if plan.goes_on_in_place and start.path.name == folder.last.name:
        put_figures_aside(folder)
    else:
        put_aside(folder, start, move=not plan.goes_on_in_place)
    if trainer.is_global_zero:
        with written_whole(folder.flags) as file:
            cli.write(plan.settings, file)
        if plan.goes_on:
            keep_metrics(folder.metrics, start.step)
            if not plan.goes_on_in_place:
                bring_best(start, folder.best)


def bring_best(start, best):
    """Copy the best checkpoint of a training that goes on in another folder: the training may never
    be as good again.

    Args:
        start: the `Checkpoint` that it goes on from.
        best: path of the copy.
    """
    source = start.path.with_name(best.name)
    with suppress(UserError):  # a damaged one
        if source.is_file() and checkpoints.read(source).epochs <= start.epochs:
            copy_whole(source, best)
            say(f"The best so far, {source}, was copied to {best}.")


def fit(plan, trainer, module, signals):
    """Run the Trainer; records how long it took and how it ended."""
    ckpt_path = str(plan.start.path) if plan.goes_on else None
    began = time.monotonic()
    with (
        told_how_to_go_on(plan, module),
        recorded(plan.settings, plan.folder.record, plan.goes_on),
        signals,
    ):
        trainer.fit(module, datamodule=module.data, ckpt_path=ckpt_path, weights_only=True)
    minutes = (time.monotonic() - began) / 60
    since = " since it went on" if plan.goes_on else ""
    stage = plan.settings.stage
    say(f"\n{stage} training: {trainer.current_epoch} epochs, {minutes:.1f} minutes{since}")


@contextmanager
def told_how_to_go_on(plan, module):
    """A context that says how to continue when a training ends early, and turns errors of machines
    into lines."""
    try:
        yield
    except Stopped as stopped:
        stopped.go_on = how_to_go_on(plan.settings)
        raise
    except SharedError:
        raise
    except Exception as error:
        known = isinstance(error, UserError)
        fault = error if known else as_user_error(error, plan.settings)
        if fault is not None:
            say(f"\nStopped. {how_to_go_on(plan.settings)}")
            raise fault from None
        if not plan.goes_on or module.steps_made:
            raise
        raise UserError(
            f"--resume_training: {plan.start.name} is not fit to go on from "
            f"({type(error).__name__}: {error}); without this flag its weights alone are taken."
        ) from None


def done_before(settings, given):
    """The best checkpoint of a stage if --resume_training finds it complete, or None."""
    last = RunFolder(settings).last
    if settings.resume_training and last.is_file():
        start = checkpoints.read(last)
        if start.epochs >= of_stage(settings).max_epochs:
            return tell_done(of_stage(settings), start, given)
    return None


def tell_done(settings, start, given):
    """Say that a training is complete, and which flags it did not have; returns the path of its
    best checkpoint."""
    best = RunFolder(settings).best
    ended = start.settings.get("lr_speed", 0) <= start.epochs
    anew = (
        ", but its schedule has ended: to learn more, train anew from its weights, by "
        "--load_checkpoint_dir without --resume_training"
    )
    say(
        f"It is done: {start.name} has done {start.epochs} epochs; to go on, ask for more than "
        f"--{settings.flag_of('max_epochs')}={settings.max_epochs}{anew * ended}."
    )
    for name in DECIDED:
        flag, before = settings.flag_of(name), start.settings.get(name)
        if flag in given and before not in (None, getattr(settings, name)):
            say(
                f"--{flag}={getattr(settings, name)}: {start.name} was trained with {before}; to "
                "train with the new value, leave out --resume_training, or give a new --exp_name."
            )
    own = start.path.resolve().parent == best.parent.resolve()
    return best if own and best.is_file() else start.name
