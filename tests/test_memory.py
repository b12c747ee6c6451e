import gc
import tracemalloc

import torch
from pytorch_lightning.callbacks import Callback

from agglomerator.data.module import Data
from agglomerator.model import Agglomerator
from agglomerator.settings import Settings
from agglomerator.stages import Stage
from agglomerator.trainer import build_trainer


class Watch(Callback):
    """Counts tensors that are alive, and bytes that Python has given out, at some steps."""

    def __init__(self, steps):
        self.steps, self.found = steps, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.steps:
            gc.collect()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            self.found.append((tensors, tracemalloc.get_traced_memory()[0]))


def test_memory_does_not_grow_with_the_length_of_training(tmp_path):
    settings = Settings(
        dataset="digits", image_size=8, conv_image_size=2, n_channels=1, patch_dim=4, contr_dim=8,
        batch_size=8, learning_rate=0.001, logger="none", max_epochs=31, limit_train=10,
        limit_val=2, output_dir=str(tmp_path),
    )  # fmt: skip
    data = Data(settings)
    data.setup()
    module = Stage(Agglomerator(**vars(settings)), settings, data)
    watch = Watch((100, 200, 300))  # each the first of an epoch
    tracemalloc.start()
    build_trainer(settings, "contrastive", [watch]).fit(module, datamodule=data)
    tracemalloc.stop()
    (first, _), (_, early), (last, late) = watch.found
    assert last == first
    assert late - early < 100 * 100  # bytes a step
