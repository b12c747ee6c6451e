"""The time that --plot_islands takes from a training, at its default interval.

    PYTHONPATH=src python tests/benchmarks/live_view.py [--minutes 5]

Trains the FashionMNIST network of config_FashionMNIST.cfg on the digits of scikit-learn, and prints
a table: seconds and number of pictures before, during and after the training, and the share of the
time in between that went into them. With --minutes 4 on a busy core: 1.2 % during the training,
3.5 % before and after it.
"""

import argparse
import tempfile
import time
from pathlib import Path

from pytorch_lightning.callbacks import Callback

from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.islands.live_view import IslandsView
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer, quiet_libraries
from agglomerator.util.machine import keep_freed_memory


class Until(Callback):
    """Ends a training after so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_start(self, trainer, module):
        self.end = time.perf_counter() + self.seconds

    def on_train_batch_end(self, trainer, module, *batch):
        trainer.should_stop = time.perf_counter() > self.end


class Timed:
    """A function that notes how long its calls take."""

    def __init__(self, function):
        self.function, self.seconds = function, []

    def __call__(self, *arguments, **flags):
        began = time.perf_counter()
        result = self.function(*arguments, **flags)
        self.seconds.append(time.perf_counter() - began)
        return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    minutes = parser.parse_args().minutes
    quiet_libraries()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        s = Settings(
            dataset="digits", image_size=28, conv_image_size=7, n_channels=1, patch_dim=64,
            tokenizer="residual", tokenizer_width=64, tokenizer_depth=2, head="grid",
            augmentation="flip", temperature=0.15, batch_size=128, learning_rate=0.0015,
            plot_islands=True, logger="none", output_dir=folder, exp_name="view",
        )  # fmt: skip
        data = ImageDataModule(s)
        data.setup()
        trainer = build_trainer(s, True, [Until(60 * minutes)])
        (view,) = (found for found in trainer.callbacks if isinstance(found, IslandsView))
        view._show, view._recolour = Timed(view._show), Timed(view._recolour)
        began = time.perf_counter()
        trainer.fit(LitAgglomerator(Agglomerator(**vars(s)), s, data), datamodule=data)
        total = time.perf_counter() - began
        first, *between, last = view._show.seconds
        after = last + sum(view._recolour.seconds)
        frames = len(list(Path(folder).glob("view/islands/frames/*/*.png")))
    print(f"\n{'pictures':<36}{'number':>8}{'s':>8}{'share':>8}")
    rows = (
        ("before", 1, first),
        ("during", len(between), sum(between)),
        ("after, with all drawn again", frames, after),
    )
    for name, number, seconds in rows:
        print(f"{name:<36}{number:>8}{seconds:8.1f}{seconds / total:8.2%}")


if __name__ == "__main__":
    main()
