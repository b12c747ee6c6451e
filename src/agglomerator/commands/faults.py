"""System errors as one-line messages with a way out: memory, disks, lost workers, dead peers."""

from agglomerator.data.loaders import is_lost_worker
from agglomerator.util import distributed
from agglomerator.util.errors import UserError


def as_user_error(error, settings):
    """The `UserError` for an error of memory, of a file or of another process; None if it is none
    of these."""
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(
            f"{error.filename}: {error.strerror}; choose another place, free some space, or change "
            "the permissions."
        )
    words = "out of memory", "not enough memory", "can't allocate memory"
    of_torch = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    out_of_memory = of_torch or isinstance(error, MemoryError)
    if out_of_memory and settings.mode in ("islands", "explore"):
        return UserError(
            "out of memory; use fewer or smaller images, fewer --iters or a smaller network."
        )
    if out_of_memory:
        return UserError(
            f"--batch_size={settings.batch_size}: out of memory; use a smaller one (in training "
            "with --accumulate, for as many images to a step) or a smaller network."
        )
    if is_lost_worker(error):
        return UserError(
            f"--num_workers={settings.num_workers}: a process that reads images was killed, "
            "usually because memory or /dev/shm ran out; use fewer, or a smaller --batch_size."
        )
    if distributed.is_fault_of_others(error):
        return UserError(
            "another process of this training ended or does not answer; its own message tells why."
        )
    return None
