"""How many devices and processes a run uses on this machine, by its flags and its launcher."""

import ctypes
import os
from pathlib import Path

from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.accelerators import AcceleratorRegistry

from agglomerator.util.errors import UserError


def count_gpus(accelerator):
    """Number of this machine's devices, other than CPUs, for a value of --accelerator."""
    known = set(AcceleratorRegistry) - {"cpu"}
    wanted = known if accelerator in ("auto", "gpu") else known & {accelerator}
    found = [AcceleratorRegistry[name]["accelerator"] for name in wanted]
    return max((each.auto_device_count() for each in found if each.is_available()), default=0)


def devices_of(settings):
    """The devices of each machine, as Lightning takes them, and the number of machines.

    Raises:
        UserError: this machine has fewer GPUs than --num_gpus.
    """
    s = settings
    if TorchElasticEnvironment.detect():  # torchrun has started the processes already
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if s.devices is not None:
        return s.devices, s.num_nodes
    gpus = count_gpus(s.accelerator)
    if gpus and s.num_gpus > gpus:
        raise UserError(f"--num_gpus={s.num_gpus}: this machine has {gpus}; use at most {gpus}.")
    return s.num_gpus if gpus else 1, s.num_nodes


def device_of(settings):
    """The one device of what does not train, as Lightning takes it: the first GPU that --devices
    lists, else any."""
    first, comma, _ = str(settings.devices).partition(",")
    return [int(first)] if comma and count_gpus(settings.accelerator) else 1


def processes_here(settings):
    """How many processes of a run share this machine: one per device in training, else one."""
    if settings.mode not in ("train", "all"):
        return 1
    devices = str(devices_of(settings)[0]).strip()
    if devices in ("auto", "-1"):
        return max(1, count_gpus(settings.accelerator))
    if "," in devices:
        return max(1, sum(bool(each.strip()) for each in devices.split(",")))
    return max(1, int(devices)) if devices.isdecimal() else 1  # Lightning refuses anything else


def memory():
    """Memory of this machine in bytes, or of the container if that is less."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        limit = 8 * 2**30
    try:
        return min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return limit


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensors.

    glibc returns large blocks to the system at once. Every new block then costs page faults, a
    tenth of a training step on a CPU. Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
