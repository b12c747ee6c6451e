"""What a run leaves behind in figures: the test's numbers, files and pictures, the summary."""

import csv
import json

import numpy as np
from matplotlib.figure import Figure


def write_test(folder, stage, record, confusion, classes):
    """Write test_<stage>.json, and the confusion matrix as confusion_<stage>.csv and .png.

    Args:
        folder: where to.
        stage: "contrastive", "supervised" or "finetuned".
        record: figures by name, from `record_of`.
        confusion: (n_classes, n_classes) counts, row: true class, column: predicted class.
        classes: names.

    Returns:
        The paths written.
    """
    paths = [folder / f"test_{stage}.json"]
    paths[0].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    paths.append(folder / f"confusion_{stage}.csv")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true \\ predicted", *classes])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            table.writerow([name, *row])
    paths.append(folder / f"confusion_{stage}.png")
    draw_confusion(confusion, classes, record).savefig(paths[2], dpi=120)
    return paths


def record_of(settings, stage, checkpoint, loss, top5, confusion, classes):
    """The figures of a test as a dictionary."""
    counts = confusion.sum(1)
    correct = confusion.diagonal()
    top1 = float(correct.sum() / counts.sum())
    record = {
        "dataset": settings.dataset,
        "stage": stage,
        "checkpoint": str(checkpoint),
        "classified_by": "nearest class mean" if stage == "contrastive" else "classifier",
        "images": int(counts.sum()),
        "loss": loss,
        "top1": top1,
        "error": 1 - top1,
    }
    if len(classes) > 5:
        record["top5"] = top5
    per_class = np.divide(correct, counts, out=np.full(len(classes), np.nan), where=counts > 0)
    record["per_class"] = {
        name: None if np.isnan(share) else float(share)
        for name, share in zip(classes, per_class, strict=True)
    }
    record["confusion_matrix"] = confusion.tolist()
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
    ax.set_title(f"{record['dataset']} test, {record['top1']:.2%} of {record['images']} correct")
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


def lines_of(record):
    """The figures of a test for the terminal."""
    lines = [
        f"loss      {record['loss']:.4f}",
        f"top-1     {record['top1']:.2%}  ({record['images']} test images, by "
        f"{record['classified_by']})",
    ]
    if "top5" in record:
        lines.append(f"top-5     {record['top5']:.2%}")
    lines.append("per class")
    width = max(map(len, record["per_class"]))
    for name, share in record["per_class"].items():
        lines.append(f"  {name:<{width}}  {'no images' if share is None else f'{share:7.2%}'}")
    return lines
