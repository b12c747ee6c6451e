"""Interrupted runs: signals, last.ckpt, and metrics.csv.

A killed run continues from last.ckpt as if nothing had happened. Three things make that so. All
random numbers follow from seed, epoch and batch. The order of the batches follows from the progress
of the Trainer (`data.module`). And last.ckpt gets its name only when everything before it is
logged, so that only the rows of later steps have to go. Lightning's own callbacks promise none of
these.
"""

import csv
import io
import signal
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from agglomerator.util.distributed import greatest
from agglomerator.util.files import partial, read_rows, write_rows, written_whole

EVERY = 10  # steps between two moments at which several processes tell each other of signals

# Ctrl-C, and how clusters announce the end. There is no SIGUSR1 on Windows.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]


class Stopped(SystemExit):
    """A signal has ended the run. The exit status is 128 plus its number: 130 for SIGINT, 143 for
    SIGTERM. `go_on` holds a sentence that says how to continue."""

    def __init__(self, signum):
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum).name
        self.go_on = ""


class StopSignals:
    """A context that receives the signals which end a run. They raise `Stopped` at once; after
    `wait` they are only noted in `received`. A second Ctrl-C always ends the run at once."""

    def __enter__(self):
        self.received, self.at, self.waiting = 0, 0.0, False
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._listen()
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def wait(self):
        """From now on only note signals: a callback looks at `received` and ends the run."""
        self.waiting = True
        self._listen()  # Lightning has put handlers of its own in the place of these

    def _listen(self):
        for signum in SIGNALS:
            signal.signal(signum, self._receive)

    def _receive(self, signum, frame):
        # Launchers pass a Ctrl-C on, which comes twice then, in the same moment.
        again = signum == signal.SIGINT == self.received and time.monotonic() - self.at > 1
        if again or not self.waiting:
            raise Stopped(signum)
        self.received = self.received or signum
        self.at = time.monotonic()


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt after every epoch, every few minutes within an epoch, and when a signal ends
    the run.

    It is written under another name and renamed when its steps are logged. Within an epoch it is
    written between two steps, never between accumulated gradients, and by several processes only
    every tenth step. A signal during validation is answered at its end.

    Args:
        path: of the checkpoint.
        minutes: between two writes.
        signals: the `StopSignals` to answer to, by `Stopped` when the checkpoint is written.
    """

    def __init__(self, path, minutes, signals):
        self.path, self.next = Path(path), Path(f"{path}.next")
        self.minutes, self.signals = minutes, signals
        self.stop, self.written = 0, False

    def on_train_start(self, trainer, module):
        self.signals.wait()
        self.began = time.monotonic()
        if trainer.is_global_zero:
            for left in self.next, partial(self.next), partial(self.path):
                left.unlink(missing_ok=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        done = batch_idx + 1
        between = trainer.accumulate_grad_batches * (EVERY if trainer.world_size > 1 else 1)
        within = done % between == 0 and done < trainer.num_training_batches
        if within and self._due(trainer):
            self._write(trainer)

    def on_train_epoch_end(self, trainer, module):
        self._due(trainer)
        self._write(trainer)

    def on_train_batch_start(self, trainer, *unused):
        self._put_in_place(trainer)
        if self.stop:
            raise Stopped(self.stop)

    on_train_epoch_start = on_train_batch_start

    def on_train_end(self, trainer, module):
        self._put_in_place(trainer)
        trainer.strategy.barrier()  # the next stage looks at the file in every process

    def _due(self, trainer):
        """Whether to write now. All processes agree, whichever of them got the signal."""
        due = time.monotonic() - self.began >= 60 * self.minutes
        wish = greatest(2 * self.signals.received + due, trainer.strategy.root_device)
        self.stop = wish // 2
        return wish > 0

    def _write(self, trainer):
        trainer.save_checkpoint(self.next)
        self.written = True
        self.began = time.monotonic()

    def _put_in_place(self, trainer):
        if self.written and trainer.is_global_zero:
            self.next.replace(self.path)
        self.written = False


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best validation, the latest of equal ones. It finds its file
    again when the run's folder has moved.

    Args:
        path: of the checkpoint.
        monitor: "val_acc", the highest, or "val_loss", the lowest.
        every: epochs between two validations.
    """

    def __init__(self, path, monitor, every):
        super().__init__(
            path.parent,
            filename=path.stem,
            monitor=monitor,
            mode="max" if monitor == "val_acc" else "min",
            every_n_epochs=every,
            save_on_train_epoch_end=True,  # during validation the epoch is not complete
            enable_version_counter=False,
        )

    @property
    def state_key(self):
        """Names its state in a checkpoint. That of Lightning depends on `every` too, and the best
        score would be lost with another."""
        return f"BestCheckpoint of {self.monitor}"

    def check_monitor_top_k(self, trainer, current=None):
        better = super().check_monitor_top_k(trainer, current)
        return better or (current is not None and bool(current == self.best_model_score))

    def load_state_dict(self, state):
        here = Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"
        if here.is_file() and state["best_model_path"]:
            state = state | {"dirpath": self.dirpath, "best_model_path": str(here)}
            state["best_k_models"] = {str(here): state["best_model_score"]}
            state["kth_best_model_path"] = str(here)
        super().load_state_dict(state)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with written_whole(Path(path), "wb") as file:
            torch.save(checkpoint, file)


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
