"""What a config costs before anybody pays for it: parameters, FLOP, memory, reading, days.

    python tests/benchmarks/arithmetic.py [--config config/config_IMAGENET.cfg] [--images 1281167]
        [--peak 989] [--share 0.1]

FLOP are those of matrix products and convolutions, counted by PyTorch. Memory, float32, is that of
weights, gradients and the two moments of AdamW, and of what the forward pass of a batch of stage
one keeps for the backward pass; tensors without contents are counted, so that any network and batch
fits on any machine. Reading is measured with JPEG files of 500x375 pixels, as the program reads
them, in seconds of a core's own time. Days are those of both stages: images, less those held out,
times epochs, at a share of the peak (TFLOP/s of one GPU), and, apart, at what 16 cores can read.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

from agglomerator import Agglomerator, cli  # noqa: E402
from agglomerator.data.images import ImageFiles  # noqa: E402
from agglomerator.data.registry import side_of  # noqa: E402
from agglomerator.training.losses.contrastive import supervised_contrastive_loss  # noqa: E402

FILES, SIZE, CORES = 128, (500, 375), 16


def count(settings):
    """Parameters, FLOP of a view (forward, backward), and bytes (weights and optimizer, kept for
    the backward pass) of a training step of stage one."""
    views = settings.n_views * settings.batch_size
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = Agglomerator(**vars(settings))
        images = torch.empty(views, settings.n_channels, settings.image_size, settings.image_size)
        labels = torch.zeros(views, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as forward, hooks:
            loss = supervised_contrastive_loss(model(images), labels)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
    n = sum(parameter.numel() for parameter in model.parameters())
    flop = [counter.get_total_flops() / views for counter in (forward, backward)]
    return n, *flop, 16 * n, sum(kept.values())


def reading(settings):
    """JPEG files of photographs' size that a core reads in a second, and their size in bytes."""
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(FILES)]
        for path in paths:
            coarse = Image.fromarray(noise.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            coarse.resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=92)
        size = sum(path.stat().st_size for path in paths) / FILES
        files = ImageFiles(paths, [0] * FILES, ["x"], side_of(settings), settings.n_channels)
        files.fetch(range(8))
        began = time.process_time()
        files.fetch(range(FILES))
        return FILES / (time.process_time() - began), size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "config" / "config_IMAGENET.cfg"))
    parser.add_argument("--images", type=int, default=1281167, help="in train/")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of one GPU")
    parser.add_argument("--share", type=float, default=0.1, help="of the peak that is reached")
    args = parser.parse_args()
    cli.define()
    settings, _ = cli.parse(["arithmetic.py", f"--flagfile={args.config}"])
    torch.set_num_threads(1)
    n, forward, backward, fixed, kept = count(settings)
    rate, size = reading(settings)
    learned = args.images * (1 - settings.val_share)
    one, two = settings.max_epochs, settings.supervised_epochs or settings.max_epochs
    flop = learned * (one * settings.n_views * (forward + backward) + two * forward)
    seen = learned * (one + two) + (args.images - learned) * (one + two)
    print(f"parameters        {n / 1e6:.1f} M")
    print(f"GFLOP a view      {forward / 1e9:.2f} forward, {backward / 1e9:.2f} backward")
    print(
        f"memory            {fixed / 2**30:.1f} GiB weights, gradients, optimizer; "
        f"{kept / 2**30:.1f} GiB kept for the backward pass of {settings.batch_size} images"
    )
    print(f"reading           {rate:.0f} images/s a core (JPEG, {size / 1000:.0f} kB each)")
    print(f"FLOP in all       {flop / 1e15:.4g} PFLOP, {one} and {two} epochs")
    for gpus in (1, 8):
        days = flop / (gpus * args.peak * 1e12 * args.share) / 86400
        of = f"{args.share:.0%} of {gpus} x {args.peak:.0f} TFLOP/s"
        print(f"{f'on {gpus} GPU':<17} {days:.3f} days at {of}")
    print(f"reading in all    {seen / (rate * CORES) / 86400:.2f} days on {CORES} cores")


if __name__ == "__main__":
    main()
