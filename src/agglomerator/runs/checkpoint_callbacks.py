"""What a training writes as checkpoints, so that it can go on after an interruption.

A killed run continues from last.ckpt as if nothing had happened. Three things make that so. All
random numbers follow from seed, epoch and batch. The order of the batches follows from the progress
of the Trainer (`data.module`). And last.ckpt gets its name only when everything before it is
logged, so that only the rows of later steps have to go (`metrics_file`). Lightning's own callbacks
promise none of these.
"""

import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from agglomerator.runs.signals import Stopped
from agglomerator.util.distributed import greatest
from agglomerator.util.files import partial, written_whole

EVERY = 10  # steps between two moments at which several processes tell each other of signals


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
