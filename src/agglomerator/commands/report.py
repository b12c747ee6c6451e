"""What a run prints and writes: how it starts and ends, the figures of a test, the next command."""

import csv
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from agglomerator.data.masks import MASKS
from agglomerator.hierarchy.scores import mistakes
from agglomerator.plan import stage_one
from agglomerator.runs.folder import RunFolder
from agglomerator.util.figure import Figure
from agglomerator.util.files import write_json, written_whole
from agglomerator.util.terminal import say


def _flag_of(settings, name):
    """The flag that decides a setting of the training, in brackets, if it is another than usual."""
    flag = settings.flag_of(name)
    return "" if flag == name else f" (--{flag})"


def describe(module, trainer):
    """A line of what is about to be trained: images, parameters, device, epochs."""
    settings, data = module.settings, module.data
    seen = {name: data.images_an_epoch(name, trainer.world_size) for name in ("train", "val")}
    device = trainer.accelerator.__class__.__name__.removesuffix("Accelerator")
    return (
        f"{settings.dataset}: {_part_of(seen['train'], len(data.train))} images to train on, "
        f"{_part_of(seen['val'], len(data.val))} to validate; "
        f"{sum(p.numel() for p in module.model.parameters()) / 1e6:.2f} M parameters; "
        f"on {device} x {trainer.world_size}; {settings.max_epochs} epochs"
        f"{_flag_of(settings, 'max_epochs')}, learning rate up to {settings.learning_rate}"
        f"{_flag_of(settings, 'learning_rate')}"
    )


def _part_of(n, whole):
    return str(n) if n == whole else f"{n} of {whole}"


def tell_blindness(settings):
    """Say so if the embedding does not depend on the image."""
    if settings.blind:
        say(
            f"--denoise_iter={settings.denoise_iter} --iters={settings.n_iters}: the image reaches "
            f"the top level of {settings.levels} only at state {settings.levels}, after the one "
            "that is read; the embedding does not depend on the image."
        )


def summarise(trainer, best, folder):
    """Say how a training ended and where everything lies: the best checkpoint, and the files of a
    `RunFolder`."""
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        if name in trainer.callback_metrics:
            say(f"  {name:<11} {float(trainer.callback_metrics[name]):.4f}")
    say(f"  best        {'none: nothing was validated' if best == folder.last else best}")
    say(f"  last        {folder.last}")
    say(f"  metrics     {folder.metrics}")
    tell_upload(trainer.loggers)


@rank_zero_only
def finish(loggers):
    """End the runs of Weights & Biases: what follows is a run of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def say_next(settings, path):
    """Say what to do with the checkpoint that a training has left."""
    following = {"mode": "test"} if settings.classifies else {"supervise": True}
    if settings.stage == "masked":  # its frozen embedding knows little of classes
        following["finetune"] = True
    if settings.n_classes == 1:
        following = {"mode": "freeze"}
    say(f"Next: {command(settings, load_checkpoint_dir=path, **following)}")


def how_to_go_on(settings):
    """The sentence that ends a training which was stopped."""
    changes = {}
    if settings.mode == "all":
        settings, changes = stage_one(settings), {"mode": "all"}
    last = RunFolder(settings).last
    if not last.is_file():
        return "It had not come to its first checkpoint; nothing is kept."
    if settings.load_checkpoint_dir is not None:  # it may stand in a flagfile
        changes["load_checkpoint_dir"] = last
    return f"Go on by: {command(settings, resume_training=True, **changes)}"


@rank_zero_only
def tell_upload(loggers):
    """Say how what was logged offline gets to Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger.experiment.offline:
            upload = f"wandb sync {Path(logger.experiment.dir).parent}"
            say(f"  wandb       logged offline; upload by: {upload}")


def command(settings, **changes):
    """The command line of this run with some flags changed, ready to copy."""
    if not settings.is_named:  # it may be that of the checkpoint's data set
        changes["exp_name"] = settings.exp_name
    changed = {"mode", "supervise", "resume_training", "load_checkpoint_dir"} | set(changes)
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            kept.append(argument)
        elif name in changed or name.removeprefix("no") in changed:
            if "=" not in argument and name in ("mode", "load_checkpoint_dir", "exp_name"):
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


def write_test(folder, record, classes):
    """Write the record of a test as JSON, and its confusion matrix as CSV and as a picture.

    Args:
        folder: the `RunFolder`.
        record: figures by name, from `record_of`.
        classes: names.

    Returns:
        The paths written; without classes there is no matrix.
    """
    paths = [folder.test_record, folder.confusion.with_suffix(".csv")]
    write_json(paths[0], record, indent=2)
    if "confusion_matrix" not in record:
        return paths[:1]
    confusion = np.array(record["confusion_matrix"])
    with written_whole(paths[1]) as file:
        table = csv.writer(file)
        table.writerow(["true \\ predicted", *classes])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            table.writerow([name, *row])
    figure = draw_confusion(confusion, classes, record)
    return paths + figure.write(folder.confusion, folder.figure_kinds, folder.figure_dpi)


def record_of(module, checkpoint, loss):
    """The figures of a test that has ended, as a dictionary.

    Args:
        module: the `LitAgglomerator` that was tested.
        checkpoint: its name.
        loss: mean over the images.
    """
    settings, metrics, data = module.settings, module.metrics, module.data
    confusion = np.atleast_2d(metrics.confusion.compute().cpu().numpy())  # of a class a number
    counts, correct = confusion.sum(1), confusion.diagonal()
    record = {
        "dataset": settings.dataset,
        "stage": settings.stage,
        "checkpoint": checkpoint,
        "classified_by": module.classified_by,
        "test_time_flip": settings.test_time_flip,
        "images": int(counts.sum()),
        "loss": loss,
    }
    if len(data.classes) < 2:
        return record | {"classified_by": None}
    top1 = float(correct.sum() / counts.sum())
    shares = np.divide(correct, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    record |= {"top1": top1, "error": 1 - top1}
    if len(data.classes) > 5:
        record["top5"] = float(metrics.top5.compute())
    record["per_class"] = {
        name: None if np.isnan(share) else float(share)
        for name, share in zip(data.classes, shares, strict=True)
    }
    record["confusion_matrix"] = confusion.tolist()
    if data.hierarchy is not None:
        record["hierarchy"] = data.hierarchy.name
        record["mistakes"] = mistakes(confusion, data.hierarchy)
    return record


def draw_confusion(confusion, classes, record):
    """The confusion matrix as a figure, in per cent of the true class."""
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    n = len(classes)
    side = min(3 + 0.45 * n, 20)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    ax = figure.subplots()
    picture = ax.imshow(share, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(picture, ax=ax, label="% of the true class", shrink=0.8)
    ax.set(xlabel="predicted class", ylabel="true class")
    title = f"{record['dataset']} test, {record['top1']:.2%} of {record['images']} correct"
    figure.suptitle(title)
    if n <= 30:
        ax.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(n), classes)
    if n <= 20:
        for row, column in np.argwhere(confusion > 0):
            value = share[row, column]
            text = f"{value:.0f}" if value >= 1 else "<1"
            colour = "white" if value < 55 else "black"
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


_FIT = {"ari": ("ARI", ".3f"), "iou": ("IoU", ".3f")}
ISLAND_COLUMNS = {  # group of columns -> key of a score -> title and format
    "islands": {
        "cosine": ("cosine", ".3f"),
        "total_variation": ("TV", ".3f"),
        "number": ("number", ".1f"),
        "size": ("columns", ".1f"),
        "inside": ("inside", ".1%"),
    },
    **{mask: {f"{mask}_{key}": column for key, column in _FIT.items()} for mask in MASKS},
    **{
        f"{mask}, clusters": {f"clustered_{mask}_{key}": column for key, column in _FIT.items()}
        for mask in MASKS
    },
    "position": {"position": ("explains", ".1%")},
}


def island_lines(record):
    """The scores of islands as a table for the terminal."""
    rows, n_images, known = record["rows"], record["images"], record.get("masks")
    found_by = f"of neighbours with a cosine of at least {record['threshold']}"
    if record.get("loss") is not None:
        found_by = f"by merges that lose at most {record['loss']:g} (a quarter on each lower level)"
    lines = [f"islands of {n_images} test images{' with masks' if known else ''}, {found_by}"]
    if known:
        several = record["masks_for_ari"]
        masks = ", ".join(
            f"{name} of {n} (ARI: of {several[name]} with two segments or more)"
            if several[name] < n
            else f"{name} of {n}"
            for name, n in known.items()
        )
        some = record["clustered"] < n_images
        first = f", of the first {record['clustered']} images" if some else ""
        lines.append(f"  masks: {masks}; ARI of the foreground, mean best intersection over union")
        lines.append(f"  clusters: average linkage, given the true number of segments{first}")
    width = max(len(row["of"]) for row in rows)
    table = [f"  {name:<{width}}" for name in ("", "", *(row["of"] for row in rows))]
    for group, columns in ISLAND_COLUMNS.items():
        block = [""] * (len(rows) + 1)
        for key, (title, form) in columns.items():
            if any(key in row for row in rows):
                cells = (format(row[key], form) if key in row else "-" for row in rows)
                block = [
                    f"{line}  {cell:>7}" for line, cell in zip(block, (title, *cells), strict=True)
                ]
        if block[0]:
            wide = max(len(block[0]), len(group) + 2)
            for i, cell in enumerate((group, *block)):
                table[i] += f"{cell:>{wide}}"
    return lines + [line.rstrip() for line in table]


def lines_of(record):
    """The figures of a test for the terminal, without those of its islands."""
    lines = [f"loss      {record['loss']:.4f}"]
    if record["stage"] == "contrastive":  # it compares the images of a batch
        lines[0] += f"  (in batches of {record['settings']['batch_size']})"
    if "top1" not in record:
        return lines
    lines.append(
        f"top-1     {record['top1']:.2%}  ({record['images']} test images, by "
        f"{record['classified_by']}{', with mirror images' * record['test_time_flip']})"
    )
    if "top5" in record:
        lines.append(f"top-5     {record['top5']:.2%}")
    if record.get("mistakes"):
        lines.append(
            f"mistakes  {record['mistakes']['distance']:.3f} apart in the hierarchy "
            f"{record['hierarchy']}, random wrong classes {record['mistakes']['random']:.3f}"
        )
    lines.append("per class")
    width = max(map(len, record["per_class"]))
    for name, share in record["per_class"].items():
        lines.append(f"  {name:<{width}}  {'no images' if share is None else f'{share:7.2%}'}")
    return lines
