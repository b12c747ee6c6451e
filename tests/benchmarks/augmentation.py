"""Augmented views per second: whole batches (agglomerator.data.augment) against one image at a time
(Pillow and torchvision's transforms), both RandAugment and normalisation, two views of each image,
in DataLoader workers. The sides take turns; a table shows the medians and their ratio.

    python tests/benchmarks/augmentation.py --data_dir DIR    # images in DIR/train/<class>/*.png

Without --data_dir the images are generated.
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

from agglomerator.data.augment import normalize, rand_augment  # noqa: E402

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
    """A uint8 tensor, of which a list of indices gives two augmented batches."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.generator = None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(torch.initial_seed())
        batch = self.images[torch.tensor(indices)]
        return tuple(
            normalize(rand_augment(batch, self.generator), MEAN, STD) for _ in range(2)
        )


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
        for first, second in loader:
            views += len(first) + len(second)
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
    # Workers start once and one epoch warms them up: both sides are measured at full speed.
    options = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    per_image = PerImage(images)
    whole = WholeBatches(images)
    sampler = BatchSampler(RandomSampler(whole), args.batch_size, drop_last=False)
    sides = {
        "one image at a time": (
            DataLoader(per_image, args.batch_size, shuffle=True, **options),
            1,
        ),
        "whole batches": (DataLoader(whole, sampler=sampler, batch_size=None, **options), 5),
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
    print(f"{'':22}{'median':>10}{'least':>10}{'greatest':>10}")
    for name, values in speeds.items():
        median, least, greatest = statistics.median(values), min(values), max(values)
        print(f"{name:22}{median:10,.0f}{least:10,.0f}{greatest:10,.0f}")
    medians = [statistics.median(values) for values in speeds.values()]
    print(f"\nratio of the medians  {medians[1] / medians[0]:.1f}")


if __name__ == "__main__":
    main()
