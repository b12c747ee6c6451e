"""All runs of an output folder side by side, from the files that they wrote."""

import json
import math
import os
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev

from agglomerator.config import FIELDS, GROUPS, MODEL_SETTINGS
from agglomerator.data.registry import DATA_SETS
from agglomerator.runs.folder import PREFIXES
from agglomerator.util.files import read_rows
from agglomerator.util.terminal import say

NO_MATTER = {"dataset", "n_classes", "num_workers", "checkpoint_every", "recompute"}
OF_MACHINE = "precision", "num_gpus", "num_nodes", "devices"  # which decide on it too
DECIDE = {*GROUPS["Data"], *GROUPS["Model"], *GROUPS["Training"], *OF_MACHINE} - NO_MATTER
COMPARED = [name for name in FIELDS if name in DECIDE]
OF_TEST = (*(name for name in MODEL_SETTINGS if name != "recompute"), "image_size", "n_channels",
           "normalization", "precision", "limit_test", "test_time_flip", "data_dir", "difficulty",
           "objects", "island_threshold", "island_loss")  # fmt: skip
FIRST = "contrastive", "masked"  # stages one
NAMES = "run", "stage", "dataset", "seed"
FIGURES = "val_acc", "val_loss", "test_error", "test_loss"


def runs_of(folder):
    """Collect what the runs below an output folder wrote. Earlier results that a run has put aside
    do not count. A line names files that cannot be read.

    Args:
        folder: path of the output folder.

    Returns:
        (rows, differing): a dictionary for each stage of each run, and the names of the columns of
        settings that differ among them. The columns are `run` (path of its folder), `stage`,
        `dataset`, `seed`; the differing settings, those of stage two, where they differ apart from
        stage one, as `supervised.learning_rate`; `from`, the checkpoint that it began from, if that
        is of another folder; `outcome`; `epochs`; `minutes`; `val_acc` and `val_loss` of the epoch
        that best.ckpt is of; `tested_with`, the settings of the test that are not those of the
        training; `test_images`, `test_error` and `test_loss`; and the scores of islands against
        masks, as `parts_ari_0` for level 0. None where a run has no such figure. The test of a
        network from elsewhere, or on another data set, has a row of its own, with its checkpoint as
        `from`.
    """
    runs = [_Run(place, folder) for place in sorted(_places(folder))]
    differing = _differing(runs)
    rows = [row for run in runs for row in run.rows(differing)]
    columns = (*differing, "from", "tested_with")
    return rows, [name for name in columns if any(row.get(name) for row in rows)]


def _places(folder):
    """The folders of runs below an output folder, also behind links, each once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(set(folders) - {"earlier"})
        tests = any(name.startswith("test_") and name.endswith(".json") for name in names)
        if real not in seen and (tests or any(name.endswith("run.json") for name in names)):
            yield Path(place)
        seen.add(real)


class _Run:
    """What lies in the folder of a run."""

    def __init__(self, place, root):
        self.place, self.name = place, str(place.relative_to(root))
        self.parts, self.tests = {}, {}
        for stage, prefix in PREFIXES.items():
            parts = _read(place / f"{prefix}run.json", list)
            self.parts |= {stage: parts} if parts else {}
            test = _read(place / f"test_{stage}.json", dict)
            self.tests |= {stage: test} if test else {}

    def flags(self, stage):
        """Settings of a stage; those that are newer than the run had their defaults."""
        flags = self.parts[stage][-1]["flags"]
        return _of_data({name: flags.get(name, FIELDS[name].default) for name in (*FIELDS,)})

    def rows(self, differing):
        found = []
        for stage in PREFIXES:
            test, row = self.tests.get(stage, {}), {"run": self.name, "stage": stage}
            own = not test or self._trained(test, stage)
            if stage in self.parts:
                row |= self._training(stage) | self._values(stage, differing)
                tested = test and own
                found.append(row | (self._differs(test, stage) | _figures(test) if tested else {}))
            if test and (stage not in self.parts or not own):
                settings = test.get("settings", {})
                where = {"dataset": test.get("dataset"), "seed": settings.get("seed")}
                row = {"run": self.name, "stage": stage} | where
                start = {"from": test.get("checkpoint"), "tested_with": _special(settings)}
                found.append(row | start | _figures(test))
        return found

    def _values(self, stage, differing):
        """The differing settings. Of a stage one that began after this stage there are none: it has
        not led to it."""
        began = {name: str(parts[0].get("started", "")) for name, parts in self.parts.items()}
        known = [
            name
            for name in self.parts
            if not (name in FIRST and stage not in FIRST and began[name] > began[stage])
        ]
        return {
            column: self.flags(of)[name] for column, (of, name) in differing.items() if of in known
        }

    def _trained(self, test, stage):
        """Whether a test is of a checkpoint of this folder, on the data set of its training."""
        here = self._is_own(test.get("checkpoint"))
        known = stage in self.parts and self.flags(stage)["dataset"]
        return here and known in (False, test.get("dataset"))

    def _differs(self, test, stage):
        """What of a test is not as in the training, as a text by the name `tested_with`."""
        flags = self.flags(stage)
        flags["normalization"] = flags["normalization"] or flags["dataset"]
        made = _of_data({"dataset": flags["dataset"]} | test.get("settings", {}))
        if flags["iters"] is None:
            flags["iters"] = 2 * flags["levels"]
        names = [name for name in OF_TEST if made.get(name, flags[name]) != flags[name]]
        tested, best = Path(str(test.get("checkpoint"))).name, f"{PREFIXES[stage]}best.ckpt"
        other = None if tested == best else tested
        return {"tested_with": " ".join(filter(None, (other, _as_flags(made, names)))) or None}

    def _training(self, stage):
        parts, flags = self.parts[stage], self.flags(stage)
        start = parts[0]["flags"].get("load_checkpoint_dir")
        return {
            "dataset": flags["dataset"],
            "seed": flags["seed"],
            "from": None if start is None or self._is_own(start) else start,
            "outcome": parts[-1].get("outcome") or "no end: killed, or at work",
            "minutes": _minutes(parts),
        } | _best_epoch(self.place / "logs" / stage / "metrics.csv", self._chosen_by(stage))

    def _is_own(self, checkpoint):
        """Whether a checkpoint, by its path, is of this folder, which may have been moved or copied
        with all others."""
        own = *(Path(self.name).parts or self.place.resolve().parts[-1:]), "checkpoints"
        return Path(str(checkpoint)).parts[-len(own) - 1 : -1] == own

    def _chosen_by(self, stage):
        return "val_loss" if stage == "masked" else self.flags(stage)["monitor"]


def _special(settings):
    """What a test of a network from elsewhere has beside the usual, as a text, or None."""
    names = [
        name
        for name in ("limit_test", "test_time_flip")
        if settings.get(name, FIELDS[name].default) != FIELDS[name].default
    ]
    return _as_flags(settings, names)


def _as_flags(settings, names):
    return " ".join(f"--{name}={settings[name]}" for name in names) or None


def _of_data(flags):
    """The settings without data_dir where that is just where a known data set lies."""
    known = flags["dataset"] in DATA_SETS and DATA_SETS[flags["dataset"]].read is not None
    return flags | {"data_dir": None} if known else flags


def _read(path, kind):
    """The content of a JSON file; None, and a line, if it cannot be read."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    parts = content if kind is list and isinstance(content, list) else []
    whole = all(isinstance(part, dict) and isinstance(part.get("flags"), dict) for part in parts)
    if isinstance(content, dict):
        whole = all(isinstance(content.get(name, {}), dict) for name in ("settings", "islands"))
    if not isinstance(content, kind) or not whole:
        say(f"{path}: cannot be read; left out.")
        return None
    return content


def _minutes(parts):
    """Minutes of all parts of a training; None if one of them does not tell its end."""
    try:
        spans = [
            datetime.fromisoformat(part["ended"]) - datetime.fromisoformat(part["started"])
            for part in parts
        ]
    except (KeyError, TypeError, ValueError):
        return None
    return round(sum(span.total_seconds() for span in spans) / 60, 2)


def _best_epoch(path, chosen_by):
    """Epochs done, and the validation of the best one, the last of equals, from a metrics.csv."""
    if not path.is_file():
        return {}
    names, rows = read_rows(path)
    if names is not None and "train_loss_epoch" not in names:
        say(f"{path}: cannot be read; left out.")
        return {}
    rows = [row for row in rows if row.get("train_loss_epoch")]
    validated = [row for row in rows if row.get(chosen_by)]
    found = {"epochs": len(rows)}
    if validated:
        best_of = max if chosen_by == "val_acc" else min
        best = best_of(reversed(validated), key=lambda row: float(row[chosen_by]))
        found |= {name: float(best[name]) for name in ("val_acc", "val_loss") if best.get(name)}
    return found


def _figures(test):
    """The figures of a test."""
    found = {"test_images": test.get("images")}
    found |= {f"test_{name}": test.get(name) for name in ("error", "loss")}
    for row in test.get("islands", {}).get("rows", ()):
        of, _, level = row["of"].partition(" ")
        if of == "level" and level.isdigit():
            scores = {k: v for k, v in row.items() if k.startswith(("parts_", "objects_"))}
            found |= {f"{name}_{level}": value for name, value in scores.items()}
    return found


def _differing(runs):
    """Columns of settings that differ among the runs of a stage: name -> (stage, setting)."""
    columns, seen = {}, {}
    for stage in PREFIXES:
        having = [run for run in runs if stage in run.parts]
        for name in COMPARED:
            values = {run.name: json.dumps(run.flags(stage)[name]) for run in having}
            if len(set(values.values())) < 2:
                continue
            known = seen.get(name, {})
            if any(known.get(run) != value for run, value in values.items()):
                column = name if stage == "contrastive" else f"{stage}.{name}"
                columns[column] = stage, name
                seen[name] = known | values
    return columns


def over_seeds(rows, differing):
    """Means and spreads of the figures of trainings that differ in their seed alone.

    Args:
        rows, differing: from `runs_of`. Only finished trainings count.

    Returns:
        A list of dictionaries: `stage`, `dataset`, the differing settings, `test_images`, `seeds`,
        a text with all of them, `n`; of each figure the mean by its name and `<figure>_std`, the
        sample standard deviation, None of a single run.
    """
    groups = {}
    kept = [row for row in rows if row.get("outcome") == "finished"]
    names = "stage", "dataset", *differing, "test_images"
    for row in kept:
        groups.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    found = []
    for group in groups.values():
        row = {name: group[0].get(name) for name in names}
        row |= {"seeds": " ".join(str(each["seed"]) for each in group), "n": len(group)}
        for name in figures_of(group):
            values = [each[name] for each in group if _is_number(each.get(name))]
            row[name] = fmean(values) if values else None
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        found.append(row)
    return found


def figures_of(rows):
    """Names of the columns of rows that are figures of results."""
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if name.startswith(("parts_", "objects_"))]
    return ["minutes", *(name for name in FIGURES if name in names), *scores]


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)
