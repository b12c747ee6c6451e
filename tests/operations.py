"""Counts what a step asks of its device."""

import json
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
FREE |= {"promote_types", "_record_function_enter_new", "_record_function_exit"}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}


class Operations(TorchDispatchMode):
    """A context that counts the operations of PyTorch, each a kernel or more on a GPU. Views of a
    tensor, and memory without contents, are not counted: they launch nothing.

    Attributes:
        names: how often each operation was called, a Counter.
        reads: how many of them turn a tensor into numbers of Python. A GPU is waited for there.
        made: how many tensors were made of numbers of Python. To put one on a GPU is to wait.
    """

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.made = 0

    @property
    def total(self):
        return self.names.total()

    @property
    def reads(self):
        return sum(self.names[name] for name in READS)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        aliases = [x.alias_info for x in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.made += name == "lift_fresh"
        if not is_view and name not in FREE:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def traced(call):
    """Kernels on the GPU and launches by the host, of a call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = Counter(event.get("cat") for event in events)
    runtime = [
        each["name"] for each in events if each.get("cat") in ("cuda_runtime", "cuda_driver")
    ]
    return kinds["kernel"], sum("Launch" in name for name in runtime)


@contextmanager
def watched():
    """A context that lists the places in the code that wait for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        places = []
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for each in found:
                if "synchronizing CUDA" in str(each.message):
                    places.append(f"{Path(each.filename).name}:{each.lineno}")
