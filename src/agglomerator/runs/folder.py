"""The files of a run: all their names."""

from pathlib import Path


def run_folder(settings):
    """The folder of a run."""
    return Path(settings.output_dir) / settings.exp_name


STAGE_PREFIX = {"contrastive": "", "supervised": "supervised_", "finetuned": "finetuned_"}


# What freeze writes, first the record of it.
FROZEN = ["embedding.json"]


FROZEN += [
    f"{kind}_{part}.npy" for kind in ("features", "labels") for part in ("train", "val", "test")
]


FROZEN += [f"images_{part}.csv" for part in ("train", "val", "test")]


FROZEN += [f"{name}.{kind}" for name in ("embedding", "dendrogram") for kind in ("png", "pdf")]


def tested(stage):
    """What a test of a stage writes, first the record of it."""
    names = [f"test_{stage}.json", f"confusion_{stage}.csv", f"confusion_{stage}.png"]
    return names + [f"islands/{stage}_test{end}.png" for end in ("", "_iterations")]
