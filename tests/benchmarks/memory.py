"""Memory of a long training and of tests of growing size, on random images and a tiny network.

    PYTHONPATH=src python tests/benchmarks/memory.py [--steps 2000]     # 1.5 minutes

Prints a table: resident memory of the process (MiB) at four moments of the training, and after a
test and an embedding of sets of growing size, the images and what is returned not counted.
"""

import argparse
import gc
import os
import subprocess
import tempfile

import torch
from pytorch_lightning.callbacks import Callback

from agglomerator.commands.evaluate import embed
from agglomerator.config import Settings
from agglomerator.data import registry
from agglomerator.data.images import ImageSet
from agglomerator.data.module import ImageDataModule
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer, quiet_libraries

BATCH = 32
EPOCH = 50  # steps


def resident():
    """MiB of memory that this process occupies."""
    gc.collect()
    done = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


class Watch(Callback):
    """Notes the memory after so many steps."""

    def __init__(self, moments):
        self.moments, self.found = moments, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.moments:
            self.found[trainer.global_step] = resident()


def set_of(n, settings):
    """n random images."""
    generator = torch.Generator().manual_seed(0)
    shape = n, settings.n_channels, settings.image_size, settings.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 10, map(str, range(10)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        s = Settings(
            dataset="digits", image_size=16, conv_image_size=4, n_channels=1, patch_dim=16,
            contr_dim=32, batch_size=BATCH, learning_rate=0.001, logger="none",
            output_dir=folder, max_epochs=-(-(steps + 1) // EPOCH),
        )  # fmt: skip
        train = set_of(EPOCH * BATCH * 5 // 4, s)
        registry.DATA_SETS["digits"] = registry.DataSetEntry(lambda s, train_: train, 10)
        data = ImageDataModule(s)
        data.setup()
        module = LitAgglomerator(Agglomerator(**vars(s)), s, data)
        watch = Watch([steps * quarter // 4 for quarter in range(1, 5)])
        build_trainer(s, True, [watch]).fit(module, datamodule=data)
        print(f"\n{'':<24}{'MiB':>8}{'growth':>9}")
        first = watch.found[min(watch.found)]
        for step, size in watch.found.items():
            print(f"{f'training step {step}':<24}{size:8.1f}{size - first:+9.1f}")
        rows = []
        for n in (2000, 4000, 8000, 16000):
            found = set_of(n, s)
            data.test = torch.utils.data.Subset(found, range(n))
            trainer = build_trainer(s, False, logs=False)
            trainer.test(module, datamodule=data, verbose=False)
            embedding, labels = embed(trainer, module, data, data.test)
            returned = sum(x.numel() * x.element_size() for x in (embedding, labels))
            size = resident() - (found.images.numel() + returned + 8 * n) / 2**20
            rows.append(size)
            print(f"{f'test of {n} images':<24}{size:8.1f}{size - rows[0]:+9.1f}")


if __name__ == "__main__":
    main()
