"""Speed on one GPU: a table, printed line by line.

    python tests/benchmarks/gpu.py [--minutes 4] [--only PARTS] [--data_dir DIR]
    python tests/benchmarks/gpu.py --count          # on a CPU: operations and waits of a step

Parts, in this order; what does not fit into the minutes is named at the end:

    peak      FLOP/s of a matrix product, 8192 x 8192
    steps     a training step of the shipped networks and the paper's, eager ("graph": replayed as
              one CUDA graph), from views at hand to the moved weights
    views     augmented and normalised images a second
    waits     where a training by the Trainer waits for the GPU
    tests     the CUDA tests of the project
    fashion   seconds of config_FashionMNIST.cfg, --mode all (only with --data_dir, its archives or
              files; --minutes is its limit too)
    compiled  the step with --compile; "kernels": the same without CUDA graphs

A step is that of `LitAgglomerator` and its optimizer, two views of each of a batch of random
images. Times are means of 10 steps after 3. FLOP are those of matrix products and convolutions of
forward and backward, counted by PyTorch; the share is that of the product in the same arithmetic.
Kernels are those on the GPU, launches those of the host, waits what CUDA's sync debug mode finds.

On an NVIDIA H200 (torch 2.11, matrix product 794 TFLOP/s in bf16, 407 in tf32, 51 in float32), at
commit 1318ba8, views/s, share of the peak and kernels of a step with 1024 images:

                    bf16                 bf16, graph    tf32                  float32
    CIFAR10         40168  2.2 %  1965   66738  3.6 %   35720   3.7 %  1738   33090  28 %  1800
    FashionMNIST    28888  1.2 %  2001   53622  2.3 %   41279   3.5 %  1709   32271  22 %  1786
    CIFAR10_paper   45194  5.0 %  1270   46146  5.1 %   44403   9.6 %  1054   25660  44 %  1073

with 128 images 4434, 3964, 6385 (bf16), as a graph 32426, 30005, 29004; with 4096: 71765, 56608,
46330. CIFAR10, 1024, compiled by the default mode: 54343 (1134 kernels; 42 s to compile). Views of
2048 images: 150061 images/s by RandAugment, 1829470 mirrored and shifted. The step itself waits for
nothing; a training of 43 steps waited 770 times, its start, validation and checkpoints included.
Since then a step has about half as many operations, and CIFAR10 is another network (then 4x4
columns of 128 and two views an image); that was not measured on a GPU.
"""

import argparse
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from operations import Operations, traced, watched  # noqa: E402
from steps import Step, Trained, settings_of  # noqa: E402

from agglomerator.data.module import ImageDataModule  # noqa: E402
from agglomerator.training.trainer import quiet_libraries  # noqa: E402
from agglomerator.util.random import seeded_generator  # noqa: E402

NETWORKS = "CIFAR10", "FashionMNIST", "CIFAR10_paper"
BATCHES = 1024, 128, 4096
ARITHMETIC = "bf16", "tf32", "float32"
WARM_UP, MEASURED = 3, 10
PARTS = "peak", "steps", "views", "waits", "tests", "fashion", "compiled"


class Clock:
    """What remains of the minutes."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes
        self.left_out = []

    def left(self):
        return self.end - time.monotonic()

    def allows(self, what, seconds):
        if self.left() < seconds:
            self.left_out.append(what)
        return self.left() >= seconds


def line(name, *cells):
    print(f"{name:<40}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


@contextmanager
def arithmetic(kind):
    """A context of matrix products and convolutions in "float32", "tf32" or "bf16"."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if kind == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = kind != "float32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def seconds_of(call, count=MEASURED):
    """Mean seconds of a call on the GPU, after WARM_UP that do not count."""
    for _ in range(WARM_UP):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


_FLOP = {}  # of an image, by network
_TOLD = set()  # errors whose place in the code was printed


def flop_of(name, batch):
    """FLOP of forward and backward, counted once for a network."""
    if name not in _FLOP:
        step = Step(name, 128)
        with FlopCounterMode(display=False) as counter:
            step.module.training_step(step.batch, 0).backward()
        _FLOP[name] = counter.get_total_flops() / 128
    return _FLOP[name] * batch


def row_of_step(name, batch, how, kind, peaks):
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with arithmetic(kind):
        flop, step = flop_of(name, batch), Step(name, batch, how)
        began = time.monotonic()
        call = step.captured() if how == "graph" else step
        call()
        torch.cuda.synchronize()
        first = time.monotonic() - began
        seconds = seconds_of(call)
        memory = torch.cuda.max_memory_allocated() / 2**30
        with watched() as waits:
            call()
        traces = traced(call) if batch == BATCHES[0] else ("", "")
    views = step.module.settings.n_views * batch
    share = f"{flop / seconds / peaks[kind]:.1%}" if kind in peaks else "?"
    line(
        f"{name}, {batch}, {kind}, {how}", f"{views / seconds:.0f}", f"{1e3 * seconds:.2f}",
        *traces, len(waits), share, f"{memory:.2f}", f"{first:.1f}",
    )  # fmt: skip
    if waits:
        print(f"    waits: {dict(Counter(waits))}", flush=True)


def rows_of_steps(hows, args, cost, until=0.0):
    """Rows of all networks, batches and arithmetics, the most telling first, until a share of the
    minutes is left. Returns the number of faults."""
    line(
        "step: network, batch, arithmetic", "views/s", "ms", "kernels", "launches", "waits",
        "of peak", "GiB", "first s",
    )  # fmt: skip
    faults = 0
    for kind, batch, how, name in itertools.product(ARITHMETIC, BATCHES, hows, args.networks):
        what = f"{name}, {batch}, {kind}, {how}"
        if args.clock.allows(what, cost + until * 60 * args.minutes):
            faults += not guarded(what, row_of_step, name, batch, how, kind, args.peaks)
    return faults


def guarded(what, function, *arguments):
    """Call a function; an error is printed. Returns whether all went well: it returns no fault."""
    try:
        return not function(*arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{what}: {reason}", flush=True)
        if reason not in _TOLD and not isinstance(error, torch.cuda.OutOfMemoryError):
            _TOLD.add(reason)
            for row in traceback.format_tb(error.__traceback__)[-3:]:
                print("    " + "\n    ".join(row.splitlines()[:2]), flush=True)
        return False


def peak(args):
    line("matrix product, 8192 x 8192", "TFLOP/s")
    for kind in ARITHMETIC:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        with arithmetic(kind):
            args.peaks[kind] = 2 * 8192**3 / seconds_of(lambda a=a, b=b: a @ b)
        line(f"  {kind}", f"{args.peaks[kind] / 1e12:.0f}")


def steps(args):
    return rows_of_steps(["eager", "graph"], args, 8, 0.5)


def compiled(args):
    return rows_of_steps(["compiled", "kernels"], args, 30)


def views(args):
    line("views of a batch", "images/s", "ms", "kernels", "launches", "waits")
    for name, batch, kind in itertools.product(
        ("CIFAR10", "FashionMNIST"), (256, 2048, 8192), ("randaugment", "flip")
    ):
        s = settings_of(name, f"--augmentation={kind}")
        data, numbers = ImageDataModule(s), itertools.count()
        shape = batch, s.n_channels, s.image_size, s.image_size
        images = torch.randint(256, shape, dtype=torch.uint8, device="cuda")

        def call(data=data, images=images, numbers=numbers):
            return data.augmented_view(images, seeded_generator(0, next(numbers)))

        seconds = seconds_of(call)
        with watched() as found:
            call()
        line(
            f"  {name}, {kind}, {batch}", f"{batch / seconds:.0f}", f"{1e3 * seconds:.2f}",
            *traced(call), len(found),
        )  # fmt: skip


def waits(args):
    line("a training by the Trainer, digits", "images/s", "waits", "per step")
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            trained = Trained(name, "cuda", folder, "--precision=bf16-mixed")
            with watched() as places:
                trained.fit()
        rate, n = trained.images_a_second, trained.n_steps
        line(f"  {name}", f"{rate:.0f}", len(places), f"{len(places) / n:.2f}")
        for place, count in Counter(places).most_common(12):
            print(f"    {place:<40}{count / n:.2f} a step", flush=True)


def run(command, seconds):
    """Output of a command, its exit status or None if it was stopped, and how long it took."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            status = None
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        said.seek(0)
        return said.read().splitlines(), status, time.monotonic() - began


def tests(args):
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    workers = str(min(8, os.cpu_count() or 1))
    pytest = "-m", "pytest", "-m", "gpu", "-n", workers, "--dist", "worksteal", "--tb=short", "-rfE"
    command = sys.executable, *pytest, *map(str, files)
    said, status, seconds = run(command, max(20, args.clock.left()))
    line("CUDA tests", "s", "status")
    line(f"  {said[-1] if said else ''}"[:40], f"{seconds:.0f}", str(status))
    told = [row for row in said if row.startswith(("E  ", "FAILED", "ERROR", "____"))]
    for row in told[:80] if status != 0 else ():
        print(f"    {row[:220]}", flush=True)
    return status != 0


def fashion(args):
    if args.data_dir is None:
        print("fashion: left out, for it needs --data_dir", flush=True)
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "src/main.py", "--flagfile", "config/config_FashionMNIST.cfg",
            "--precision", "bf16-mixed", "--mode", "all", "--logger", "none",
            "--data_dir", args.data_dir, "--output_dir", folder, *args.flags,
        ]  # fmt: skip
        said, status, seconds = run(command, max(20, args.clock.left()))
    line("FashionMNIST, --mode all", "s", "status")
    line("  from start to figure", f"{seconds:.1f}", str(status))
    telling = "epoch", "train", "top", "minutes", "rror", "Stopped"
    for row in [row for row in said if any(word in row for word in telling)][-30:]:
        print(f"    {row[:200]}", flush=True)
    return status != 0


def count():
    """Operations of a step on a CPU, and how often a real step reads or makes numbers."""
    line("operations, batch 32, no tensor views", "forward", "backward", "optimizer", "all")
    networks = [(name, ()) for name in NETWORKS] + [("CIFAR10_paper", ("--levels=5",))]
    for name, flags in networks:
        step = Step(name, 32, device="cpu", flags=flags)
        step()
        step.optimizer.zero_grad()
        parts = [Operations() for _ in range(3)]
        with parts[0]:
            loss = step.module.contrast(*step.batch, None, 0)[0]
        with parts[1]:
            loss.backward()
        with parts[2]:
            step.optimizer.step()
        totals = [part.total for part in parts]
        line(" ".join([name, *flags]), *totals, sum(totals))
    line("a step of the Trainer, digits", "operations", "reads", "made")
    for name in NETWORKS[:2]:
        with tempfile.TemporaryDirectory() as folder:
            trained = Trained(name, "cpu", folder, "--limit_train=23")
            with Operations() as trained.watching:
                trained.fit()
        found = trained.a_step()
        line(name, *(f"{found[each]:.1f}" for each in ("total", "reads", "made")))


def make(part, args):
    """Make a part of the table. Returns whether, or how many, faults it shows."""
    parts = {
        "peak": peak, "steps": steps, "views": views, "waits": waits, "tests": tests,
        "fashion": fashion, "compiled": compiled,
    }  # fmt: skip
    return parts[part](args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of config/")
    parser.add_argument("--data_dir", help="folder with FashionMNIST")
    parser.add_argument("--flags", default="", help="more flags of the FashionMNIST run")
    parser.add_argument("--count", action="store_true", help="operations of a step, on a CPU")
    args = parser.parse_args()
    args.clock, args.peaks = Clock(args.minutes), {}
    args.networks, args.flags = args.networks.split(","), args.flags.split()
    quiet_libraries()
    warnings.filterwarnings("ignore")
    if args.count:
        return count()
    if not torch.cuda.is_available():
        return print("no GPU here: nothing to measure (--count counts operations on a CPU)")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    faults = []
    for part in args.only.split(","):
        began = time.monotonic()
        if args.clock.allows(part, 5) and not guarded(part, make, part, args):
            faults.append(part)
        print(f"({part}: {time.monotonic() - began:.0f} s)", flush=True)
    if args.clock.left_out:
        print(f"left out for lack of time: {'; '.join(args.clock.left_out)}")
    if faults:
        raise SystemExit(f"faults in: {', '.join(faults)}")


if __name__ == "__main__":
    main()
