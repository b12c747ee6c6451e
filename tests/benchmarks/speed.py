"""Speed of a training step, against the equations written down directly and against glom-pytorch.

    python tests/benchmarks/speed.py [--rounds 5] [--only paper,fashion,heads,loop,growth,start]

Prints one table. All sides of a comparison take turns; figures are medians of the rounds, after
one that does not count. A training step is two views of each of 128 random images forward, the
contrastive loss, backward and AdamW. "Transcription" is tests/oracle.py, the equations with
grouped convolutions, float32. FLOP are those of its matrix products and convolutions, counted by
PyTorch, for every side the same, so that work saved counts as speed; the peak is that of a
4096 x 4096 product. Memory is the peak of a process of its own, less what it holds before the
first step.

glom-pytorch (`pip install glom-pytorch`) has column nets without norms, another attention and no
head: the loop alone is compared, at equal columns, levels, width and iterations, forward and
backward.

On two cores of an AMD EPYC with AVX-512 (190 GFLOP/s in float32, 404 in bfloat16), --rounds 3,
views per second and share of the peak, with the published tokenizer and head:

                                    transcription  ours, float32  bfloat16    compiled
    paper's CIFAR-10, 72.1 M            77 (56 %)      124 (90 %)     233 (80 %)  241 (83 %)
    FashionMNIST, 11.9 M               283 (39 %)      580 (79 %)     868 (55 %)  616 (39 %)
    loop alone (glom-pytorch: 134)                     206            351

Four times the columns, 49 to 196, take 3.3 times the time, 16 times take 20.
"""

import argparse
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import oracle  # noqa: E402

from agglomerator import Agglomerator  # noqa: E402
from agglomerator.model.agglomerator import State  # noqa: E402
from agglomerator.training.losses.contrastive import supervised_contrastive_loss  # noqa: E402
from agglomerator.util.machine import keep_freed_memory  # noqa: E402

PAPER = {"patch_size": 1, "patch_dim": 128, "levels": 2}
FASHION = {
    "patch_size": 1, "patch_dim": 64, "levels": 2,
    "image_size": 28, "conv_image_size": 7, "n_channels": 1,
}  # fmt: skip
POOLED = {"head": "grid"}


class Step:
    """A training step of the network with the flags.

    Args:
        flags: of the network.
        batch_size: images; two views of each.
        side: "transcription", or how the network computes: "float32", "bfloat16", "compiled".
    """

    def __init__(self, flags, batch_size=128, side="float32"):
        torch.manual_seed(0)
        self.model = model = Agglomerator(**flags, dropout=0.0)
        self.side, s = side, model.settings
        self.images = torch.randn(2 * batch_size, s.n_channels, s.image_size, s.image_size)
        self.labels = torch.randint(s.n_classes, (batch_size,)).repeat(2)
        self.weights = dict(model.named_parameters()) | dict(model.named_buffers())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.flags = {
            name: getattr(s, name)
            for name in (
                "conv_image_size", "patch_size", "image_size", "iters", "denoise_iter",
                "consensus_self", "local_consensus_radius",
            )
        }  # fmt: skip
        if side == "compiled":
            model.compile()

    def loss(self):
        if self.side == "transcription":
            states = oracle.states(self.weights, self.flags, self.images, train=True)
            embedded = oracle.embedding(self.weights, states, self.flags)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.side != "float32"):
                embedded = self.model(self.images)
        return supervised_contrastive_loss(embedded, self.labels)

    def __call__(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


class Loop:
    """Forward and backward of the column loop alone: ours, or glom-pytorch's."""

    def __init__(self, side, d=128, levels=2, iters=4, batch_size=256):
        torch.manual_seed(0)
        self.side = side
        if side == "glom-pytorch":
            from glom_pytorch import Glom

            self.images = torch.randn(batch_size, 3, 8, 8)
            self.glom = Glom(dim=d, levels=levels, image_size=8, patch_size=1)
        else:
            self.model = Agglomerator(patch_dim=d, levels=levels, iters=iters, **POOLED)
            self.tokens = torch.randn(d, batch_size, 64)
        self.levels, self.iters = levels, iters

    def __call__(self):
        if self.side == "glom-pytorch":
            self.glom(self.images, iters=self.iters).sum().backward()
            return
        with torch.autocast("cpu", torch.bfloat16, enabled=self.side == "bfloat16"):
            shared = self.model.prepare(self.tokens)
            initial = self.model.init_levels[:, :, None, None].expand(-1, -1, 1, 64)
            state = State([(0, initial)], 0)
            for t in range(self.iters):
                state = self.model.iterate(state, shared, self.levels, alike=t == 0)
        sum(block.sum() for _, block in state.blocks).backward()


def in_turn(sides, rounds):
    """Median seconds of each of the callables, by name, taken in turn."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak(dtype, rounds):
    """FLOP/s of a 4096 x 4096 matrix product."""
    a = torch.randn(4096, 4096).to(dtype)
    return 2 * 4096**3 / in_turn({"product": lambda: a @ a}, rounds)["product"]


def memory(make, *arguments):
    """MiB that two steps need beyond what the process holds before them, in one of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (make, *arguments))


def _memory(make, *arguments):
    step = make(*arguments)
    before = _peak_memory()
    step()
    step()
    return _peak_memory() - before


def _peak_memory():
    """MiB that this process held at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says on Linux counts the process that started this one
        peak = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def flop_of(step):
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    return counter.get_total_flops()


def line(name, *cells):
    print(f"{name:<42}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def compare_steps(title, flags, peaks, rounds):
    sides = ["transcription", "float32", "bfloat16", "compiled"]
    steps = {side: Step(flags, side=side) for side in sides}
    flop = flop_of(steps["transcription"])
    seconds = in_turn(steps, rounds)
    views = len(steps["float32"].images)
    size = sum(p.numel() for p in steps["float32"].model.parameters())
    line(f"{title}, {size / 1e6:.1f} M", "views/s", "times", "GFLOP/s", "of peak", "MiB")
    for side in sides:
        rate = flop / seconds[side]
        top = peaks["float32" if side in ("transcription", "float32") else "bfloat16"]
        line(
            f"  {side}",
            f"{views / seconds[side]:.0f}",
            f"{seconds['transcription'] / seconds[side]:.2f}",
            f"{rate / 1e9:.0f}",
            f"{rate / top:.0%}",
            f"{memory(Step, flags, 128, side):.0f}",
        )
    return steps


def profile_of(step, title, rows=8):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    line(f"{title}: operations of a step", "share", "ms", "calls")
    for event in events[:rows]:
        time_ms = event.self_cpu_time_total / 1e3
        line(f"  {event.key}", f"{1e3 * time_ms / total:.0%}", f"{time_ms:.1f}", event.count)


def compare_heads(rounds):
    line("heads, CIFAR-10 model, bfloat16", "views/s", "M weights", "MiB")
    kinds = ("flatten", "grid")
    steps = {kind: Step(PAPER | {"head": kind}, side="bfloat16") for kind in kinds}
    seconds = in_turn(steps, rounds)
    for kind, step in steps.items():
        size = sum(p.numel() for p in step.model.parameters()) / 1e6
        used = memory(Step, PAPER | {"head": kind}, 128, "bfloat16")
        line(f"  {kind}", f"{256 / seconds[kind]:.0f}", f"{size:.2f}", f"{used:.0f}")


def compare_loops(rounds):
    sides = {"glom-pytorch": "glom-pytorch", "float32": "float32", "bfloat16": "bfloat16"}
    line("the loop alone, 64 columns of 2 x 128", "views/s", "times", "MiB")
    try:
        loops = {name: Loop(side) for name, side in sides.items()}
    except ImportError:
        print("  left out: pip install glom-pytorch")
        return
    seconds = in_turn(loops, rounds)
    for name in sides:
        ratio = seconds["glom-pytorch"] / seconds[name]
        used = memory(Loop, sides[name])
        line(f"  {name}", f"{256 / seconds[name]:.0f}", f"{ratio:.2f}", f"{used:.0f}")


def growth(rounds):
    """Time and memory, as multiples of the first row of each group."""
    base = {"patch_dim": 64, "image_size": 28, "conv_image_size": 7, "n_channels": 1} | POOLED
    groups = {
        "columns": [
            (f"{side**2}", base | {"image_size": 4 * side, "conv_image_size": side})
            for side in (7, 14, 28)
        ],
        "levels": [(f"{k} (8 iterations)", base | {"levels": k, "iters": 8}) for k in (2, 3, 5, 8)],
        "iterations": [(f"{t}", base | {"iters": t}) for t in (2, 4, 8, 16)],
    }
    for group, rows in groups.items():
        line(f"growth with {group}, bfloat16, 32 images", "ms", "times", "MiB", "times")
        steps = {name: Step(flags, 32, "bfloat16") for name, flags in rows}
        seconds = in_turn(steps, rounds)
        first = rows[0][0]
        used = {name: memory(Step, flags, 32, "bfloat16") for name, flags in rows}
        for name, _ in rows:
            line(
                f"  {name}",
                f"{1e3 * seconds[name]:.0f}",
                f"{seconds[name] / seconds[first]:.2f}",
                f"{used[name]:.0f}",
                f"{used[name] / used[first]:.2f}",
            )


def start_up(rounds):
    program = [sys.executable, str(ROOT / "src" / "main.py")]
    with tempfile.TemporaryDirectory() as folder:
        step = [
            *program, "--flagfile", str(ROOT / "config" / "config_digits.cfg"), "--max_epochs=1",
            "--limit_train=1", "--limit_val=0", "--logger=none", f"--output_dir={folder}",
        ]  # fmt: skip
        sides = {"--help": [*program, "--help"], "one step on digits, and its checkpoint": step}
        calls = {
            name: lambda arguments=arguments: subprocess.run(arguments, capture_output=True)
            for name, arguments in sides.items()
        }
        line("start of a process", "s")
        for name, seconds in in_turn(calls, rounds).items():
            line(f"  {name}", f"{seconds:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="paper,fashion,heads,loop,growth,start")
    args = parser.parse_args()
    wanted, rounds = args.only.split(","), args.rounds
    keep_freed_memory()
    peaks = {str(t).removeprefix("torch."): peak(t, 5) for t in (torch.float32, torch.bfloat16)}
    line(f"matrix product, {torch.get_num_threads()} threads", "GFLOP/s")
    for name, rate in peaks.items():
        line(f"  {name}", f"{rate / 1e9:.0f}")
    for name, title, flags in (
        ("paper", "CIFAR-10 model of the paper", PAPER),
        ("fashion", "FashionMNIST model", FASHION),
    ):
        if name in wanted:
            steps = compare_steps(title, flags, peaks, rounds)
            profile_of(steps["bfloat16"], f"{title}, bfloat16")
            del steps
    if "heads" in wanted:
        compare_heads(rounds)
    if "loop" in wanted:
        compare_loops(rounds)
    if "growth" in wanted:
        growth(rounds)
    if "start" in wanted:
        start_up(rounds)


if __name__ == "__main__":
    main()
