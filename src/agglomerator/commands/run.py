"""The runs: train, test, freeze, and all of them in turn."""

import csv
import ctypes
import dataclasses
import os
import time

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Subset

from agglomerator import cli
from agglomerator.commands import report
from agglomerator.commands.report import command
from agglomerator.config import INPUT_SETTINGS, MODEL_SETTINGS, SharedError, UserError
from agglomerator.data import registry
from agglomerator.data.augment import normalize
from agglomerator.data.images import numbered
from agglomerator.data.module import ImageDataModule, is_lost_worker
from agglomerator.data.sets.folder import pages_of_files
from agglomerator.hierarchy import figures as hierarchy_figures
from agglomerator.hierarchy import scores as hierarchy_scores
from agglomerator.islands import baselines
from agglomerator.islands.figures import IslandFigures
from agglomerator.islands.live_view import WINDOW, samples
from agglomerator.islands.scores import MASKS
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.plan import resolve
from agglomerator.runs import checkpoints
from agglomerator.runs.folder import FROZEN, STAGE_PREFIX, run_folder, tested
from agglomerator.runs.record import lock_run_folder, make_room, put_aside, recorded
from agglomerator.runs.resume import (
    BestCheckpoint,
    LastCheckpoint,
    Stopped,
    StopSignals,
    keep_metrics,
)
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_loggers, build_trainer, quiet_libraries
from agglomerator.util import distributed
from agglomerator.util.files import written_whole
from agglomerator.util.terminal import say


def run(settings, given):
    """Do what the settings ask for.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.

    Raises:
        UserError: it cannot be done; nothing of an earlier run is lost.
    """
    quiet_libraries()
    keep_freed_memory()
    modes = {"train": train, "test": test, "freeze": freeze, "islands": islands, "all": run_all}
    WINDOW.wanted = settings.plot_islands
    try:
        with StopSignals():
            modes[settings.mode](settings, given)
        WINDOW.stay()
    except Stopped as stopped:
        say(f"\nStopped by {stopped.signal}. {stopped.go_on}")
        # Lightning kills a main process whose children end with another status than 0.
        raise SystemExit(stopped.code if rank_zero_only.rank == 0 else 0) from None
    except (RuntimeError, MemoryError) as error:
        fault = fault_of_machine(error, settings)
        if fault is None:
            raise
        raise fault from None


def fault_of_machine(error, settings):
    """The `UserError` for an error of memory or of another process; None if it is neither."""
    out_of_memory = "out of memory", "not enough memory", "can't allocate memory"
    of_torch = isinstance(error, RuntimeError) and any(each in str(error) for each in out_of_memory)
    if of_torch or isinstance(error, MemoryError):
        return UserError(
            f"--batch_size={settings.batch_size}: out of memory; use a smaller one (in training "
            "with --accumulate, for as many images to a step) or a smaller network."
        )
    if is_lost_worker(error):
        return UserError(
            f"--num_workers={settings.num_workers}: a process that reads images was ended from "
            "outside, mostly where memory or /dev/shm is short; use fewer, or less --batch_size."
        )
    if distributed.is_fault_of_others(error):
        return UserError(
            "another process of this training has ended or does not answer: what it said is the "
            "reason."
        )
    return None


def keep_freed_memory():
    """Have the C library keep the memory that tensors give back, for the next ones.

    glibc returns large blocks to the system at once, and every new one costs page faults, a tenth
    of a training step on a CPU. Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def run_all(settings, given):
    """Stage one, stage two from its best checkpoint, test, with a picture of the islands; with
    --resume_training from where this was stopped."""
    if settings.load_checkpoint_dir is not None:  # the name of the run may follow from it
        start = checkpoints.read(settings.load_checkpoint_dir)
        settings = checkpoints.complete(settings, given, start)
    try:
        say("Stage one: contrastive pre-training")
        stage_one = settings.replace(supervise=False, finetune=False)
        best = done_before(stage_one) or train(stage_one, given, advise=False)
        say("Stage two: the classifier")
        stage_two = settings.replace(supervise=True)
        last = checkpoint_paths(stage_two)[1]
        resume = settings.resume_training and last.is_file() and began_from(last, best)
        start = last if resume else best
        stage_two = stage_two.replace(resume_training=resume, load_checkpoint_dir=str(start))
        best = done_before(stage_two) or train(stage_two, given, advise=False)
    except Stopped as stopped:
        stopped.go_on = how_to_go_on(settings)
        raise
    distributed.leave_process_group()
    say("Test")
    test(settings.replace(plot_islands=True, load_checkpoint_dir=str(best)), given)


def began_from(path, start):
    """Whether the training of one checkpoint began from the weights of another."""
    weights = checkpoints.read(start).weights
    try:
        return checkpoints.read(path).began_from == checkpoints.fingerprint(weights)
    except UserError:
        if path.is_file():
            raise
        return False  # another process has found so, and moved it


def done_before(settings, start=None):
    """The best checkpoint of a stage that the run which is gone on with has completed, or None.

    Args:
        settings: of the stage.
        start: checkpoint to go on from; None: the run's last one, if there is any.
    """
    best, last = checkpoint_paths(settings)
    if start is None and settings.resume_training and last.is_file():
        start = checkpoints.read(last)
    wanted = of_stage(settings).max_epochs
    if start is None or start.epochs < wanted:
        return None
    flag = flag_of("max_epochs", settings)
    say(
        f"It is done: {start.name} has done {start.epochs} epochs; to go on, ask for more than "
        f"--{flag}={wanted}."
    )
    own = start.path.resolve().parent == best.parent.resolve()
    return best if own and best.is_file() else start.name


def train(settings, given, advise=True):
    """Train one stage; returns the path of its best checkpoint."""
    stage = settings.stage
    settings = of_stage(settings)
    start = checkpoint_to_start(settings)
    if start is None and stage == "supervised":
        raise UserError(
            "--supervise: trains a classifier on a trained network; name its checkpoint by "
            f"--load_checkpoint_dir, as {run_folder(settings) / 'checkpoints' / 'best.ckpt'}, or "
            "let everything learn by --finetune."
        )
    plan, model = network(settings, given, start, "train")
    settings = plan.settings
    folder = run_folder(settings)
    going_on = settings.resume_training and start is not None and start.stage == stage
    if going_on and start.resumable and (done := done_before(settings, start)):
        if advise:
            tell_next(settings, done)
        return done
    if going_on:
        settings = check_resumed(settings, start)
    if settings.compile:
        compile_network(model, settings)
    signals = StopSignals()
    best_path, last_path = checkpoint_paths(settings)
    best = BestCheckpoint(best_path, settings.monitor, settings.validate_every)
    last = LastCheckpoint(last_path, settings.checkpoint_every, signals)
    trainer = build_trainer(settings, stage, [best, last] if settings.limit_val else [last])
    if trainer.is_global_zero:
        lock_run_folder(folder, stage)
    data = load_data(plan)
    data.check_batch_size(trainer.world_size)
    module = LitAgglomerator(model, settings, data)
    if start is not None and not going_on:
        module.began_from = checkpoints.fingerprint(start.weights)
        if settings.resume_training:
            of = "the published format" if start.stage is None else f"the {start.stage} stage"
            say(f"{start.name} is of {of}: the {stage} stage starts from its weights.")
    tell_blindness(settings)
    own = going_on and start.path.resolve().parent == best_path.parent.resolve()
    if not own or start.path.name != last_path.name:
        put_aside(folder, stage, start, move=not own)
    prefix = STAGE_PREFIX[stage]
    metrics = folder / "logs" / stage / "metrics.csv"
    if trainer.is_global_zero:
        with written_whole(folder / f"{prefix}flags.cfg") as file:
            cli.write(settings, file)
        if going_on:
            keep_metrics(metrics, start.step)
    counts = {name: data.images_an_epoch(name, trainer.world_size) for name in ("train", "val")}
    steps = counts["train"] // settings.batch_size // trainer.world_size
    trainer.log_every_n_steps = max(1, min(10, steps))
    say(
        f"{settings.dataset}: {part_of(counts['train'], len(data.train))} images to train on, "
        f"{part_of(counts['val'], len(data.val))} to validate; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        f"on {trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}"
        f" x {trainer.world_size}; {settings.max_epochs} epochs, learning rate up to "
        f"{settings.learning_rate}"
    )
    began = time.monotonic()
    ckpt_path = str(start.path) if going_on else None
    try:
        with recorded(settings, folder / f"{prefix}run.json", going_on), signals:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except Stopped as stopped:
        stopped.go_on = how_to_go_on(settings)
        raise
    except SharedError:
        raise
    except (UserError, OSError):
        say(f"\nStopped. {how_to_go_on(settings)}")
        raise
    except Exception as error:
        fault = fault_of_machine(error, settings)
        if fault is not None:
            say(f"\nStopped. {how_to_go_on(settings)}")
            raise fault from None
        if not going_on or module.steps_made:
            raise
        raise UserError(
            f"--resume_training: {start.name} is not fit to go on from "
            f"({type(error).__name__}: {error}); without this flag its weights alone are taken."
        ) from None
    if not best_path.is_file():
        best_path = last_path
    minutes = (time.monotonic() - began) / 60
    since = " since it went on" if going_on else ""
    say(f"\n{stage} training: {trainer.current_epoch} epochs, {minutes:.1f} minutes{since}")
    report.summarise(trainer, best_path, last_path, metrics)
    device = trainer.strategy.root_device
    # A signal may have come after the last step; of --mode=all there is more to stop.
    stop = settings.mode == "all" and distributed.greatest(signals.received, device)
    finish(trainer.loggers)
    if stop:
        raise Stopped(stop)
    if advise:
        tell_next(settings, best_path)
    return best_path


def tell_next(settings, path):
    """Say what to do with the checkpoint that a training has left."""
    following = {"supervise": True} if settings.stage == "contrastive" else {"mode": "test"}
    say(f"Next: {command(settings, load_checkpoint_dir=path, **following)}")


@rank_zero_only
def finish(loggers):
    """End the runs of Weights & Biases: what follows is a run of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def checkpoint_paths(settings):
    """Paths of the best and the last checkpoint of the stage that the settings ask for."""
    prefix = STAGE_PREFIX[settings.stage]
    folder = run_folder(settings) / "checkpoints"
    return folder / f"{prefix}best.ckpt", folder / f"{prefix}last.ckpt"


def how_to_go_on(settings):
    """The sentence that ends a training which was stopped."""
    changes = {}
    if settings.mode == "all":
        settings, changes = settings.replace(supervise=False, finetune=False), {"mode": "all"}
    last = checkpoint_paths(settings)[1]
    if not last.is_file():
        return "It had not come to its first checkpoint; nothing is kept."
    if settings.load_checkpoint_dir is not None:  # it may stand in a flagfile
        changes["load_checkpoint_dir"] = last
    return f"Go on by: {command(settings, resume_training=True, **changes)}"


def tell_blindness(settings):
    """Say so if the embedding does not depend on the image."""
    if settings.blind:
        say(
            f"--denoise_iter={settings.denoise_iter} --iters={settings.iters}: the top level of "
            f"{settings.levels} sees nothing of the image before state {settings.levels}: nothing "
            "can be learned of it."
        )


def check_resumed(settings, start):
    """Refuse to go on from what cannot be gone on from; tell which flags a resumed run keeps.

    Returns:
        The settings of the resumed run.
    """
    if not start.resumable:
        raise UserError(
            f"--resume_training: {start.name} holds weights alone, nothing to go on with; without "
            "this flag training starts from them."
        )
    before = start.settings.get("optimizer", "adamw")
    if before != settings.optimizer:
        raise UserError(
            f"--optimizer={settings.optimizer}: {start.name} was trained by {before}; go on by "
            f"--optimizer={before}."
        )
    kept = {}
    for name in ("learning_rate", "lr_speed", "weight_decay"):
        before = start.settings.get(name)
        if before is not None and before != getattr(settings, name):
            kept[name] = kept[flag_of(name, settings)] = before
            say(f"--{flag_of(name, settings)}: the resumed run keeps {before}.")
    names = "seed", "val_share", "batch_size", "accumulate", "limit_train", "augmentation"
    for name in (*names, "temperature", "agreement"):
        before = start.settings.get(name)
        if before is not None and before != getattr(settings, name):
            say(f"--{name}: was {before}; the run goes on otherwise than it would have.")
    return settings.replace(**kept)


@rank_zero_only
def test(settings, given):
    """Test a checkpoint on the test set, once, whole, in order; writes the figures."""
    start = checkpoint_needed(settings)
    trained_on = start.settings.get("dataset", settings.dataset)
    if "dataset" in given and trained_on != settings.dataset:
        say(f"{start.name} was trained on {trained_on}, not on {settings.dataset}.")
    settings = as_trained(settings, start)
    stage = settings.stage
    settings, module, data, folder = opened(settings, given, start, "test")
    trainer = build_trainer(settings, stage, logs=settings.plot_islands)
    if stage == "contrastive":
        say("Stage one: classes by the nearest mean of the training images.")
        tell_limits(data, "train")
        learned = data.limited("train")
        embedding, rows = embed(trainer, module, data, learned)
        module.metrics.class_means.update(embedding, learned.dataset.labels[rows])
    tell_limits(data, "test")
    made = make_room(folder, tested(stage), settings, start)
    trainer.test(module, datamodule=data, verbose=False)
    if not trainer.callback_metrics["test_loss"].isfinite():
        raise UserError(
            f"{start.name}: its results on these images are not finite, and tell no class"
            f"{'' if settings.precision == '32-true' else '; use --precision=32-true'}."
        )
    record = report.record_of(
        settings,
        stage,
        start.name,
        float(trainer.callback_metrics["test_loss"]),
        float(module.metrics.top5.compute()),
        module.metrics.confusion.compute().cpu().numpy(),
        data.classes,
        module.classified_by,
    )
    record |= made
    seed = start.settings.get("seed", settings.seed)
    record["islands"] = island_scores(trainer, module, data, settings.replace(seed=seed))
    confusion = np.array(record["confusion_matrix"])
    if data.hierarchy is not None:
        record["hierarchy"] = data.hierarchy.name
        record["mistakes"] = hierarchy_scores.mistakes(confusion, data.hierarchy)
    paths = report.write_test(folder, stage, record, confusion, data.classes)
    say("\n".join(report.lines_of(record)))
    if settings.plot_islands:
        names = f"{stage}_test", f"{stage}_test_iterations"
        paths += [folder / "islands" / f"{name}.png" for name in names]
    say("Written: " + ", ".join(map(str, paths)))
    say(f"Next: {command(settings, mode='freeze', load_checkpoint_dir=start.name)}")


def island_scores(trainer, module, data, settings):
    """The scores of the islands of the test images; where parts and objects are known, of the
    first ones, against these and beside baselines."""
    tested = min(trainer.num_test_batches[0] * settings.batch_size, len(data.test))
    found = {"threshold": settings.island_threshold, "images": tested}
    if set(MASKS) <= set(getattr(data.test.dataset, "extra", ())):
        found["images"] = min(tested, baselines.SCENES)
        device = trainer.strategy.root_device
        rows = baselines.compare(module.model, data, settings, device, found["images"])
    else:
        levels = enumerate(module.metrics.islands.compute())
        rows = [{"of": f"level {level}", **scores} for level, scores in levels]
    return found | {"rows": rows}


@rank_zero_only
def freeze(settings, given):
    """Write the embeddings and labels of all images as .npy files, in data-set order; draw and
    score how the classes lie in the embedding of the test images."""
    start = checkpoint_needed(settings)
    settings = as_trained(settings, start)
    stage = settings.stage
    settings, module, data, folder = opened(settings, given, start, "freeze")
    trainer = build_trainer(settings, stage, logs=False)
    made = make_room(folder, FROZEN, settings, start)
    for name in ("train", "val", "test"):
        tell_limits(data, name)
        subset = data.limited(name)
        embedding, rows = embed(trainer, module, data, subset)
        labels = subset.dataset.labels[rows]
        save_array(folder / f"features_{name}.npy", embedding.numpy())
        save_array(folder / f"labels_{name}.npy", labels.numpy())
        write_rows(folder / f"images_{name}.csv", subset.dataset, rows)
        say(
            f"{folder}/features_{name}.npy  {tuple(embedding.shape)}, labels_{name}.npy, "
            f"images_{name}.csv"
        )
        if name == "train" and module.by_class_means:
            module.metrics.class_means.update(embedding, labels)
    if not embedding.isfinite().all():
        raise UserError(
            f"{start.name}: its embedding is not finite, and cannot be drawn or scored."
        )
    with torch.no_grad():
        predicted = module.logits(embedding.to(module.model.wl)).argmax(1).cpu()
    arrays = embedding.numpy(), labels.numpy(), predicted.numpy()
    said = module.classified_by
    record = hierarchy_scores.record_of(settings, stage, start.name, *arrays, data, said) | made
    points, figures = hierarchy_figures.draw(*arrays[:2], record["scores"], settings, data)
    say("\n".join(hierarchy_scores.lines_of(record)))
    paths = hierarchy_figures.write(folder, record, figures)
    say("Written: " + ", ".join(map(str, paths)))
    loggers = build_loggers(settings, folder / "logs", "freeze")
    hierarchy_figures.log(loggers, points, figures, *arrays[::2], data)
    report.tell_upload(loggers)
    finish(loggers)


def as_trained(settings, start):
    """The settings with the stage of a checkpoint, where it names it."""
    if start.stage is None and not settings.supervise:
        say(f"{start.name} does not name its stage: taken as stage one (--supervise: stage two).")
    if start.stage is None:
        return settings
    return settings.replace(
        supervise=start.stage != "contrastive", finetune=start.stage == "finetuned"
    )


@rank_zero_only
def islands(settings, given):
    """Draw the islands of a checkpoint's network, of test images or of the user's own."""
    start = checkpoint_needed(settings)
    plan, model = network(settings, given, start, "islands")
    settings = plan.settings
    folder = run_folder(settings) / "islands"
    lock_run_folder(folder.parent, "islands")
    album = IslandFigures(folder, settings.island_threshold)
    if settings.images is None:
        data = load_data(plan)
        images, labels = samples(data.test, len(data.classes))
        of_test = data.crop(images), [data.classes[label] for label in labels]
        pages, kind, subject = [of_test], "test", f"{settings.dataset}, test images"
    else:
        pages, kind, subject = pages_of_files(settings), "images", "own images"
    for number, (images, names) in enumerate(pages, 1):
        name = kind if number == 1 else f"{kind}_{number}"
        title = f"Islands of agreement, {settings.exp_name}\n{subject}"
        with torch.no_grad():
            states = model.states(normalize(images, *registry.normalization_of(settings))).float()
        levels, iterations = album.figures(images, names, states, title)
        paths = album.write(name, levels), album.write(f"{name}_iterations", iterations)
        say("Written: " + ", ".join(map(str, paths)))


def opened(settings, given, start, use):
    """What test and freeze begin with: settings, module, data, and the run's folder, held against
    others that do the same. A training may run beside them."""
    plan, model = network(settings, given, start, use)
    settings = plan.settings
    folder = run_folder(settings)
    lock_run_folder(folder, use if use == "freeze" else f"{use}_{settings.stage}")
    data = load_data(plan)
    return settings, LitAgglomerator(model, settings, data, plan.own_classifier), data, folder


def part_of(n, whole):
    return str(n) if n == whole else f"{n} of {whole}"


def tell_limits(data, name):
    """Say which part of a split --limit_train, --limit_val or --limit_test leaves."""
    kept, whole = len(data.limited(name)), len(data.whole(name))
    if kept < whole:
        s = data.settings
        limit = getattr(s, f"limit_{name}")
        kind = {"train": "training", "val": "validation", "test": "test"}[name]
        say(f"--limit_{name}={limit}: {kept} of {whole} {kind} images, drawn by --seed={s.seed}.")


def embed(trainer, module, data, subset):
    """Embeddings (N, contr_dim) of a subset in its order, and which images of its data set they
    are of, (N,): those that cannot be read may be left out. On the CPU."""
    if not len(subset):
        return torch.empty(0, data.settings.contr_dim), torch.empty(0, dtype=torch.int64)
    data.trainer = trainer
    batches = trainer.predict(
        module, data.in_order(Subset(numbered(subset.dataset), subset.indices))
    )
    embedding, rows = zip(*batches, strict=True)
    return torch.cat(embedding), torch.cat(rows)


def write_rows(path, dataset, rows):
    """Write which image each row of the features is of: its number in the data set (of the training
    set, for those held out), label, class and, where there is one, file."""
    with written_whole(path) as file:
        table = csv.writer(file)
        table.writerow(["index", "label", "class", "file"])
        for index in rows.tolist():
            label = int(dataset.labels[index])
            name = "" if dataset.paths is None else os.fsdecode(dataset.paths[index])
            table.writerow([index, label, dataset.classes[label], name])


def save_array(path, array):
    """Write a .npy file so that it is there whole or not at all."""
    with written_whole(path, "wb") as file:
        np.save(file, array)


def of_stage(settings):
    """Settings with the length and rate of stage two in their place, where stage two is asked."""
    s = settings
    if s.stage == "contrastive":
        return s
    length = s.supervised_epochs
    return s.replace(
        lr_speed=length or s.lr_speed,
        max_epochs=length or s.max_epochs,
        learning_rate=s.supervised_learning_rate or s.learning_rate,
    )


def flag_of(name, settings):
    """The flag from which a stage has its `max_epochs` or `learning_rate`."""
    own = {"max_epochs": "supervised_epochs", "learning_rate": "supervised_learning_rate"}
    flag = own.get(name, name)
    return name if settings.stage == "contrastive" or not getattr(settings, flag) else flag


def checkpoint_to_start(settings):
    """The checkpoint that training starts from, or None."""
    if settings.load_checkpoint_dir is not None:
        return checkpoints.read(settings.load_checkpoint_dir)
    if settings.resume_training:
        last = checkpoint_paths(settings)[1]
        if last.is_file():
            return checkpoints.read(last)
        say(f"--resume_training: there is no {last} yet; begins from the start.")
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


def network(settings, given, start, use):
    """The `Plan` of a run and its network, with the weights of the checkpoint if there is one."""
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    plan = resolve(settings, given, start, use)
    if start is None:
        checkpoints.check_size(plan.settings)
        return plan, Agglomerator(**dataclasses.asdict(plan.settings))
    wanted = {name: getattr(plan.settings, name) for name in (*MODEL_SETTINGS, *INPUT_SETTINGS)}
    n_classes = wanted.pop("n_classes")
    new = use == "train" and not plan.own_classifier
    return plan, checkpoints.build(start, n_classes if new else None, **wanted)


def compile_network(model, settings):
    """Have what training calls compiled when it first computes; raises UserError if that cannot
    be."""
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--compile: nothing can be compiled here ({reason}); install a C++ compiler as g++, "
            "or leave the flag out."
        ) from None
    if settings.agreement:
        model.with_levels = torch.compile(model.with_levels)
    else:
        model.compile()


def load_data(plan):
    """The data of a run, downloaded; the test set is read."""
    data = ImageDataModule(plan.settings, plan.class_map, plan.split_seed)
    data.prepare_data()
    data.setup()
    return data
