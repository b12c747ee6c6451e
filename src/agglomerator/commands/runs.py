"""`--mode=runs`: all runs of --output_dir in one table."""

from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from agglomerator.runs.table import NAMES, figures_of, over_seeds, runs_of
from agglomerator.util.errors import UserError
from agglomerator.util.files import write_rows
from agglomerator.util.terminal import aligned, say

SHOWN = "minutes", "val_acc", "test_error"  # of the figures, and the scores of islands


@rank_zero_only
def runs(settings, given):
    """Write and print a table of the runs in --output_dir, and one of means over seeds."""
    folder = Path(settings.output_dir)
    rows, differing = runs_of(folder) if folder.is_dir() else ([], [])
    if not rows:
        raise UserError(
            f"--output_dir={folder}: there is no run in it; name the folder that holds the "
            "folders of runs."
        )
    means = over_seeds(rows, differing)
    figures = [name for name in figures_of(rows) if name in SHOWN or name[-1].isdigit()]
    paths = [folder / "runs.csv", folder / "runs_over_seeds.csv"]
    for path, table in zip(paths, (rows, means), strict=True):
        write_rows(path, table)
    say("\n".join(aligned(_texts(rows, [*NAMES, *differing, *figures]))))
    several = [row for row in means if row["n"] > 1]
    if several:
        say("\nMeans over seeds, and standard deviations")
        spread = [row | {name: _with_spread(row, name) for name in figures} for row in several]
        names = ["stage", "dataset", "seeds", *differing, *figures]
        say("\n".join(aligned(_texts(spread, names))))
    say("Written: " + ", ".join(map(str, paths)))


def _texts(rows, names):
    return [list(names), *([_text(row.get(name)) for name in names] for row in rows)]


def _text(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_spread(row, name):
    mean, spread = row.get(name), row.get(f"{name}_std")
    return mean if spread is None else f"{mean:.4g} ± {spread:.2g}"
