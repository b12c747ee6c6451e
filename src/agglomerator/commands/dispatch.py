"""One run of the program: a command, its signals, and the errors of machines as lines."""

from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.all import run_all
from agglomerator.commands.evaluate import freeze, test
from agglomerator.commands.explore import explore
from agglomerator.commands.faults import as_user_error
from agglomerator.commands.islands import islands
from agglomerator.commands.runs import runs
from agglomerator.commands.train import train
from agglomerator.islands.live_view import WINDOW
from agglomerator.runs.signals import Stopped, StopSignals
from agglomerator.training.trainer import quiet_libraries
from agglomerator.util.machine import keep_freed_memory
from agglomerator.util.terminal import say

COMMANDS = {
    "train": train,
    "test": test,
    "freeze": freeze,
    "islands": islands,
    "explore": explore,
    "all": run_all,
    "runs": runs,
}


def run(settings, given):
    """Do what the settings ask for.

    Args:
        settings: of the command line.
        given: names of the settings that the user gave.

    Raises:
        UserError: it cannot be done; nothing of an earlier run is lost.
        SystemExit: a signal ended it.
    """
    quiet_libraries()
    keep_freed_memory()
    WINDOW.wanted = settings.plot_islands
    try:
        with StopSignals():
            COMMANDS[settings.mode](settings, given)
        WINDOW.stay()
    except Stopped as stopped:
        say(f"\nStopped by {stopped.signal}. {stopped.go_on}")
        # Lightning kills a main process whose children end with another status than 0.
        raise SystemExit(stopped.code if rank_zero_only.rank == 0 else 0) from None
    except (RuntimeError, MemoryError, OSError) as error:
        fault = as_user_error(error, settings)
        if fault is None:
            raise
        raise fault from None
