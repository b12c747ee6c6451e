"""`--mode=test` and `--mode=freeze`: the figures, and the embeddings, of a checkpoint."""

import csv
import os

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Subset

from agglomerator.commands import report
from agglomerator.commands.build import build_data, build_network
from agglomerator.data import masks
from agglomerator.data.images import numbered
from agglomerator.hierarchy import figures as hierarchy_figures
from agglomerator.hierarchy import scores as hierarchy_scores
from agglomerator.hierarchy.probes import line_of, probe
from agglomerator.islands import baselines
from agglomerator.plan import resolve
from agglomerator.runs.folder import SPLITS
from agglomerator.runs.record import lock_run_folder, make_room
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_loggers, build_trainer
from agglomerator.util.errors import UserError
from agglomerator.util.files import write_json, written_whole
from agglomerator.util.terminal import say


@rank_zero_only
def test(settings, given):
    """Test a checkpoint on the whole test set, or what --limit_test leaves; writes the figures."""
    plan = resolve(settings, given, "test")
    settings, folder, name = plan.settings, plan.folder, plan.start.name
    lock_run_folder(folder.path, f"test_{folder.stage}")
    report.tell_blindness(settings)
    model, data = build_network(plan), build_data(plan)
    data.check_test()
    module = LitAgglomerator(model, settings, data, plan.own_classifier)
    trainer = build_trainer(settings, False, logs=settings.plot_islands)
    if not settings.classifies and len(data.classes) > 1:
        say("Stage one: classes by the nearest mean of the training images.")
        _tell_limits(data, "train")
        learned = data.limited("train")
        embedding, rows = embed(trainer, module, data, learned)
        module.metrics.class_means.update(embedding, learned.dataset.labels[rows])
    _tell_limits(data, "test")
    truth = masks.of_test(data)
    made = make_room(folder.of_test(), folder.path, settings, plan.start)
    trainer.test(module, datamodule=data, verbose=False)
    loss = trainer.callback_metrics["test_loss"]
    if not loss.isfinite():
        raise UserError(
            f"{name}: its results on these images are not finite, and tell no class"
            f"{'' if settings.precision == '32-true' else '; use --precision=32-true'}."
        )
    record = report.record_of(module, name, float(loss)) | made
    paths = report.write_test(folder, record, data.classes)
    paths.append(write_predictions(folder.predictions, module))
    say("\n".join(report.lines_of(record)))
    seed = plan.start.settings.get("seed")
    record["islands"] = island_scores(trainer, module, truth, record["images"], seed)
    write_json(folder.test_record, record, indent=2)
    say("\n".join(report.island_lines(record["islands"])))
    paths += folder.test_pictures() if settings.plot_islands else []
    say("Written: " + ", ".join(map(str, paths)))
    say(f"Next: {report.command(settings, mode='freeze', load_checkpoint_dir=name)}")


def island_scores(trainer, module, truth, tested, seed=None):
    """The scores of the islands of the test images. Where images have masks, only those are scored,
    against their masks and beside baselines.

    Args:
        truth: `MaskedImages`, or None.
        tested: number of images tested.
        seed: of the training, for the untrained network; None for --seed.
    """
    settings = module.settings
    found = settings.found_by
    if truth is not None:
        device, seed = trainer.strategy.root_device, settings.seed if seed is None else seed
        prior = masks.of_training(settings)
        return found | baselines.compare(module.model, truth, settings, device, prior, seed)
    both = zip(module.metrics.islands.compute(), module.metrics.position.compute(), strict=True)
    rows = [
        {"of": f"level {level}"} | scores | {"position": share}
        for level, (scores, share) in enumerate(both)
    ]
    return found | {"images": tested, "rows": rows}


def score_masked(plan, model, truth):
    """Score the islands of a network against masks, which needs no classes. Writes the figures.

    Args:
        plan: of the run.
        model: its network; it stays on the device of the run.
        truth: `MaskedImages`.
    """
    settings, start = plan.settings, plan.start
    device = build_trainer(settings, False, logs=False).strategy.root_device
    record = plan.folder.islands / "islands.json"
    prior = masks.of_training(settings)
    scores = baselines.compare(model, truth, settings, device, prior, settings.seed)
    made = make_room([record], plan.folder.path, settings, start)
    scores = settings.found_by | scores
    write_json(record, {"checkpoint": start.name} | scores | made)
    say("\n".join(report.island_lines(scores)))
    say(f"Written: {record}")


@rank_zero_only
def freeze(settings, given):
    """Write the embeddings and labels of all images as .npy files, in data-set order; draw and
    score how the classes lie in the embedding of the test images."""
    plan = resolve(settings, given, "freeze")
    settings, folder, name = plan.settings, plan.folder, plan.start.name
    lock_run_folder(folder.path, "freeze")
    model, data = build_network(plan), build_data(plan)
    module = LitAgglomerator(model, settings, data, plan.own_classifier)
    trainer = build_trainer(settings, False, logs=False)
    made = make_room(folder.of_freeze(), folder.path, settings, plan.start)
    for split in SPLITS:
        _tell_limits(data, split)
        embedding, labels = write_features(folder.features(split), trainer, module, split, name)
        if split == "train":
            learned = embedding.numpy(), labels.numpy()
        if split == "train" and module.by_class_means:
            module.metrics.class_means.update(embedding, labels)
    if len(data.classes) < 2 or not len(embedding):
        of = {"dataset": settings.dataset, "stage": settings.stage, "checkpoint": name}
        write_json(folder.frozen_record, of | made)
        say("Without classes, or without test images, there is no more to draw or to score.")
        return
    with torch.no_grad():
        predicted = module.logits(embedding.to(module.model.wl)).argmax(1).cpu()
    arrays = embedding.numpy(), labels.numpy(), predicted.numpy()
    by = module.classified_by
    record = hierarchy_scores.record_of(settings, name, *arrays, data, by) | made
    record["probes"] = probe(learned, arrays[:2], settings.seed)
    points, figures = hierarchy_figures.draw(*arrays[:2], record["scores"], settings, data)
    say("\n".join(hierarchy_scores.lines_of(record)))
    if record["probes"] is not None:
        say(line_of(record["probes"]))
    paths = hierarchy_figures.write(folder, record, figures)
    say("Written: " + ", ".join(map(str, paths)))
    loggers = build_loggers(settings, folder.logs.parent, "freeze")
    hierarchy_figures.log(loggers, points, figures, *arrays[::2], data)
    report.tell_upload(loggers)
    report.finish(loggers)


def _tell_limits(data, name):
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
        return torch.empty(0, data.settings.embedding_dim), torch.empty(0, dtype=torch.int64)
    data.trainer = trainer
    batches = trainer.predict(
        module, data.in_order(Subset(numbered(subset.dataset), subset.indices))
    )
    embedding, rows = zip(*batches, strict=True)
    return torch.cat(embedding), torch.cat(rows)


def write_features(paths, trainer, module, split, name):
    """Write the embeddings of a split as --limit_... leaves it, their labels, and which image each
    row is of; returns embeddings (N, contr_dim) and labels (N,).

    Args:
        paths: of the three files, from `RunFolder.features`.
        name: of the checkpoint.

    Raises:
        UserError: an embedding is not finite. Nothing is written then.
    """
    subset = module.data.limited(split)
    embedding, rows = embed(trainer, module, module.data, subset)
    if not embedding.isfinite().all():
        raise UserError(f"{name}: its embedding of {split} images is not finite.")
    labels = subset.dataset.labels[rows]
    for path, array in zip(paths, (embedding, labels), strict=False):
        with written_whole(path, "wb") as file:
            np.save(file, array.numpy())
    write_images(paths[2], subset.dataset, rows)
    names = ", ".join(path.name for path in paths[1:])
    say(f"{paths[0]}  {tuple(embedding.shape)}, {names}")
    return embedding, labels


def write_predictions(path, module):
    """Write the most probable class of each tested image and its probability, in data-set order;
    returns the path."""
    dataset = module.data.test.dataset
    # torchmetrics makes a number of what has one element.
    rows, predicted, probability = torch.atleast_1d(*module.metrics.predictions.compute())
    named = {
        "prediction": predicted.tolist(),
        "predicted_class": [dataset.classes[label] for label in predicted],
        "probability": [f"{share:.6f}" for share in probability.tolist()],
    }
    write_images(path, dataset, rows, named)
    return path


def write_images(path, dataset, rows, more=None):
    """Write a table with a row for each image: its number in the data set (of the training set, for
    those held out), label, class and, where there is one, file.

    Args:
        path: of the CSV file.
        dataset: `ImageSet` or `ImageFiles`.
        rows: (N,) numbers of the images.
        more: further columns, lists of N by name.
    """
    more = more or {}
    with written_whole(path) as file:
        table = csv.writer(file)
        table.writerow(["index", "label", "class", "file", *more])
        for index, *others in zip(rows.tolist(), *more.values(), strict=True):
            label = int(dataset.labels[index])
            name = "" if dataset.paths is None else os.fsdecode(dataset.paths[index])
            table.writerow([index, label, dataset.classes[label], name, *others])
