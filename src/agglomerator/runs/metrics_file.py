"""The metrics of a training as a CSV file."""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from agglomerator.util.files import read_rows, write_rows


class MetricsWriter(ExperimentWriter):
    """Writes metrics.csv, and never loses the rows that are there.

    Columns of every row: `epoch`, from 0; `step`, of the optimizer, from 0. About every tenth step
    has a row with `train_loss_step`, `learning_rate`, `images/s` (trained in a second, over the
    epoch so far), and with --agreement `train_agreement_step`. Every epoch has one row, that of its
    last step, with all figures of the epoch: `train_loss_epoch`, `train_acc` (stage two),
    `train_agreement_epoch`; where it was validated `val_loss`, `val_acc` and of each level k
    `val_islands_<score>_k`, the scores of `islands/scores.py`; the weights of the
    contributions `wl`, `wBU`, `wTD`, `wA`. Figures that a row does not have are empty.
    """

    def __init__(self, log_dir):
        super().__init__(log_dir)
        self.last, self.begins = None, 0  # row of the file, and where it begins
        self.path = Path(self.metrics_file_path)
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file))

    def _check_log_dir_exists(self):
        """Lightning would remove the rows of an interrupted run here."""

    def _rewrite_with_new_header(self, names):
        write_rows(self.path, read_rows(self.path)[1], names)

    def log_metrics(self, metrics, step=None):
        """Take in figures. Lightning logs those of an epoch in two parts, which become one row."""
        super().log_metrics(metrics, step)
        *others, row = self.metrics
        before = others[-1] if others else self.last
        if before is not None and _is_same_moment(before, row):
            self.metrics = [*others[:-1], before | row]
            if not others:
                with self.path.open("r+b") as file:
                    file.truncate(self.begins)
                self.last = None

    def save(self):
        try:
            if self.metrics:
                last = self.metrics[-1]
                super().save()
                line = io.StringIO()
                csv.DictWriter(line, self.metrics_keys).writerow(last)
                self.last = last
                self.begins = self.path.stat().st_size - len(line.getvalue().encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _is_same_moment(row, other):
    """Whether two rows hold different figures of one step of one epoch."""
    when = "epoch", "step"
    same = all(name in row and row[name] == other.get(name) for name in when)
    return same and not (row.keys() & other.keys()) - set(when)


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger with a `MetricsWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self):
        if self._experiment is None:
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment


def keep_metrics(path, step):
    """Remove the rows of a metrics.csv from a step on: the resumed run writes them again."""
    if not path.is_file():
        return
    names, rows = read_rows(path)
    if names is None:
        path.unlink()
    else:
        kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) < step]
        write_rows(path, kept, names)
