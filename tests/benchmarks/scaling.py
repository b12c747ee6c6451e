"""What the processes of one training send each other, and what the loss of a large batch holds.

    python tests/benchmarks/scaling.py [--config config/config_CIFAR10_paper.cfg] [--batch 1024]
        [--rate 45194]

Three tables, of a training step of stage one in float32:

    sent      MB that a process sends, by arithmetic, and measured on this machine (Linux) with 2
              and 4 processes by gloo: gradients, embeddings and their gradients, BatchNorm
    share     of a step's time, if it all had to wait for that, by arithmetic: for GPUs that make
              RATE views/s each, of BATCH images, at 10, 100 and 400 Gbit/s a GPU. In truth
              gradients are sent while others are still computed.
    memory    of the contrastive loss of one of 4 processes, forward and backward, at its peak: in
              one piece, and in tiles

P processes with W weights, B images and V views of each, embeddings of width d, and C channels of
BatchNorm, in numbers of 4 bytes: gradients 2 (P - 1) / P * W; embeddings (P - 1) V B d to gather
them, and twice as much for their gradients; BatchNorm (P - 1) 2 C and twice as much.

On two cores of a Xeon, in 2 minutes:

    MB a process sends in a step of 4 images, config_CIFAR10_paper
    processes    gradients  embeddings  BatchNorm      sum  measured
    2              287.480       0.049      0.006  287.535   287.899
    4              431.220       0.147      0.018  431.386   431.957

    of a step of 1024 images, 45.3 ms without sending
    GPUs    gradients   embeddings      10 Gbit/s     100 Gbit/s     400 Gbit/s
    1            0 MB         0 MB           0.0%           0.0%           0.0%
    2          287 MB        13 MB          84.1%          34.6%          11.7%
    4          431 MB        38 MB          89.2%          45.3%          17.1%
    8          503 MB        88 MB          91.3%          51.1%          20.7%
    16         539 MB       189 MB          92.8%          56.2%          24.3%
    64         566 MB       793 MB          96.0%          70.6%          37.5%
    256        573 MB      3209 MB          98.5%          87.0%          62.5%

    views in all    in one piece      in tiles
    8192                 300 MiB       300 MiB
    16384               1102 MiB      1102 MiB
    32768               4366 MiB      1120 MiB

So the gradients cost most up to some 45 GPUs, then the embeddings, which grow with their number.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

from agglomerator import Agglomerator, cli  # noqa: E402
from agglomerator.training.losses import contrastive  # noqa: E402
from agglomerator.util.distributed import BatchNorm2d  # noqa: E402

MEASURED, STEPS = 4, 3  # images and steps of what is measured
BITS = 10e9, 100e9, 400e9  # a second
GPUS = 1, 2, 4, 8, 16, 64, 256
WIDTH = 512


def config(path, **flags):
    """Settings of a config."""
    return cli.parse(["scaling.py", f"--flagfile={path}"])[0].replace(**flags)


def sent(settings, model, processes, batch):
    """Bytes that one process sends in a step: of gradients, of embeddings, of BatchNorm."""
    others = processes - 1
    learned = [p for n, p in model.named_parameters() if not n.startswith("classification")]
    weights = sum(p.numel() for p in learned)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, BatchNorm2d))
    views = settings.n_views * batch
    numbers = 2 * others / processes * weights, 3 * others * views * settings.embedding_dim
    return *(4 * n for n in numbers), 4 * 3 * others * 2 * channels


def on_loopback():
    """Bytes that this machine has sent itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def train(rank, processes, path, folder):
    """The process `rank` of several: some steps; the first says what a step has sent."""
    cli.define()
    settings = config(path, batch_size=MEASURED)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting{processes}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    model = Agglomerator(**vars(settings))
    for parameter in model.classification_head_from_contr.parameters():
        parameter.requires_grad = False
    network = DistributedDataParallel(model)
    views = settings.n_views * MEASURED
    images = torch.rand(views, settings.n_channels, settings.image_size, settings.image_size)
    labels = torch.zeros(views, dtype=torch.int64)
    before = 0
    for step in range(STEPS + 1):
        if step == 1:  # the first also agrees on the order of gradients
            dist.barrier()
            before = on_loopback()
        contrastive.supervised_contrastive_loss(network(images), labels).backward()
    dist.barrier()
    if rank == 0:
        done = (on_loopback() - before) / STEPS / processes
        Path(folder, f"sent{processes}").write_text(str(done))
    dist.barrier()
    dist.destroy_process_group()


def hold(views, tiled):
    """MiB that the loss of a quarter of the views takes, at its peak."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    every = F.normalize(torch.randn(views, WIDTH, generator=generator), dim=1)
    labels = torch.arange(views) % 10
    own = views // 4
    anchors = every[:own].requires_grad_(), labels[:own], torch.arange(own)[:, None]
    if not tiled:
        contrastive.TILE = views * views
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    contrastive.compare_in_tiles(anchors, (every, labels, 0.07))[0].backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20)


def tell_sent(path):
    settings = config(path, batch_size=MEASURED)
    model = Agglomerator(**vars(settings))
    print(f"MB a process sends in a step of {MEASURED} images, {Path(path).stem}")
    print(f"{'processes':<11}{'gradients':>11}{'embeddings':>12}{'BatchNorm':>11}{'sum':>9}"
          f"{'measured':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for processes in (2, 4):
            parts = sent(settings, model, processes, MEASURED)
            mp.spawn(train, (processes, path, folder), nprocs=processes)
            found = float(Path(folder, f"sent{processes}").read_text())
            print(f"{processes:<11}{parts[0] / 1e6:11.3f}{parts[1] / 1e6:12.3f}"
                  f"{parts[2] / 1e6:11.3f}{sum(parts) / 1e6:9.3f}{found / 1e6:10.3f}")  # fmt: skip


def tell_share(path, batch, rate):
    settings = config(path, batch_size=batch)
    model = Agglomerator(**vars(settings))
    computes = settings.n_views * batch / rate
    print(f"\nof a step of {batch} images, {computes * 1000:.1f} ms without sending")
    speeds = "".join(f"{bits / 1e9:8.0f} Gbit/s" for bits in BITS)
    print(f"{'GPUs':<6}{'gradients':>11}{'embeddings':>13}{speeds}")
    for gpus in GPUS:
        parts = sent(settings, model, gpus, batch)
        waits = [8 * sum(parts) / bits for bits in BITS]
        shares = "".join(f"{wait / (wait + computes):15.1%}" for wait in waits)
        print(f"{gpus:<6}{parts[0] / 1e6:8.0f} MB{parts[1] / 1e6:10.0f} MB{shares}")


def tell_memory():
    print(f"\n{'views in all':<14}{'in one piece':>14}{'in tiles':>14}")
    for views in (8192, 16384, 32768):
        found = []
        for tiled in (0, 1):
            command = [sys.executable, __file__, "--hold", str(views), str(tiled)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
        print(f"{views:<14}" + "".join(f"{size:10.0f} MiB" for size in found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "config" / "config_CIFAR10_paper.cfg"))
    parser.add_argument("--batch", type=int, default=1024, help="images a GPU")
    parser.add_argument("--rate", type=float, default=45194, help="views/s a GPU")
    parser.add_argument("--hold", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        return hold(*args.hold)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cli.define()
    tell_sent(args.config)
    tell_share(args.config, args.batch, args.rate)
    tell_memory()


if __name__ == "__main__":
    main()
