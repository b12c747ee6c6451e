"""Augmented views per second: whole batches (agglomerator.data.augment) against one image at a time
(Pillow and torchvision's transforms), both RandAugment and normalisation, two views of each image,
in DataLoader workers. Whole batches are normalised either in the workers, which then hand over four
bytes a value, or by the process that receives uint8, as a training loop does on its device.
The sides take turns; a table shows the medians and their ratio to one image at a time.

    python tests/benchmarks/augmentation.py --data_dir DIR    # images in DIR/train/<class>/*.png

Without --data_dir the images are generated. On CIFAR-10 with two workers on a busy machine with two
cores, whole batches made 8.6 to 12.2 times as many views per second (three runs).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from agglomerator.data.augment import rand_augment  # noqa: E402
from agglomerator.data.transforms import normalize  # noqa: E402

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class PerImage(Dataset):
    """Pillow images, each augmented twice by torchvision's transforms."""

    def __init__(self, images):
        self.images = [Image.fromarray(image) for image in images]
        self.transform = transforms.Compose(
            [transforms.RandAugment(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return self.transform(image), self.transform(image)


class WholeBatches(Dataset):
    """A uint8 tensor, of which a list of indices gives two augmented views in one batch."""

    def __init__(self, images, normalized):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.normalized = normalized
        self.generator = None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(torch.initial_seed())
        batch = self.images[torch.tensor(indices)].repeat(2, 1, 1, 1)
        views = rand_augment(batch, self.generator)
        return normalize(views, MEAN, STD) if self.normalized else views


def read_images(folder, count):
    paths = sorted(Path(folder).glob("train/*/*.png"))
    if not paths:
        raise SystemExit(f"no train/<class>/*.png in {folder}")
    paths = paths[:: max(1, len(paths) // count)][:count]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def generated_images(count):
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(0, 1)
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def views_per_second(loader, epochs):
    start, views = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in loader:
            if torch.is_tensor(batch) and batch.dtype == torch.uint8:
                batch = normalize(batch, MEAN, STD)
            views += len(batch) if torch.is_tensor(batch) else sum(map(len, batch))
    return views / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_dir", help="folder with train/<class>/*.png")
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    if args.data_dir:
        images = read_images(args.data_dir, args.images)
    else:
        images = generated_images(args.images)
    # With more threads this process would take the workers' cores.
    torch.set_num_threads(1)
    # Workers start once and one epoch warms them up: all sides are measured at full speed.
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    sampler = BatchSampler(RandomSampler(range(len(images))), args.batch_size, drop_last=False)
    in_workers, by_receiver = (
        DataLoader(WholeBatches(images, normalized), None, sampler=sampler, **options)
        for normalized in (True, False)
    )
    one_by_one = DataLoader(PerImage(images), args.batch_size, shuffle=True, **options)
    sides = {
        "one image at a time": (one_by_one, 1),
        "batches, normalised in workers": (in_workers, 5),
        "batches, normalised by receiver": (by_receiver, 5),
    }
    speeds = {name: [] for name in sides}
    for round_number in range(args.rounds + 1):
        for name, (loader, epochs) in sides.items():
            speed = views_per_second(loader, epochs)
            if round_number > 0:
                speeds[name].append(speed)

    source = args.data_dir or "generated"
    print(f"{len(images)} images {images.shape[1:]} ({source}), batches of {args.batch_size},")
    print(f"{args.workers} workers, {args.rounds} rounds, augmented views/s\n")
    print(f"{'':32}{'median':>10}{'least':>10}{'greatest':>10}{'ratio':>8}")
    baseline = statistics.median(speeds["one image at a time"])
    for name, values in speeds.items():
        median, least, greatest = statistics.median(values), min(values), max(values)
        ratio = median / baseline
        print(f"{name:32}{median:10,.0f}{least:10,.0f}{greatest:10,.0f}{ratio:8.1f}")


if __name__ == "__main__":
    main()
