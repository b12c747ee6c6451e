"""How batches are read: the order of a training, and workers that leave signals to the program."""

import os
import signal
import threading
from itertools import islice

from torch.utils.data import DataLoader, DistributedSampler


class TrainOrder(DistributedSampler):
    """The training images of a process in the order of the epoch. It begins where the trainer is in
    the epoch: a resumed run does not read again what it has seen."""

    def __init__(self, subset, trainer, settings):
        super().__init__(
            subset, trainer.world_size, trainer.global_rank, seed=settings.seed, drop_last=True
        )
        self.trainer, self.batch_size = trainer, settings.batch_size

    def __iter__(self):
        self.set_epoch(self.trainer.current_epoch)
        batches_done = self.trainer.fit_loop.batch_idx + 1
        yield from islice(super().__iter__(), batches_done * self.batch_size, None)


class TrainLoader(DataLoader):
    """A DataLoader that begins to read at the first batch. Otherwise its workers would begin before
    the trainer knows the epoch."""

    def __iter__(self):
        yield from super().__iter__()


def leave_signals(worker):
    """Ignore signals that end a run, in a worker. A cluster or a terminal sends them to all
    processes, but the main process answers them, and still needs batches."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def is_lost_worker(error):
    """Whether an error of PyTorch says that a worker process, which reads images, has ended."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
