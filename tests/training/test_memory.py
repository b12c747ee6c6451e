import gc
import sys
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch._subclasses import FakeTensor

from agglomerator.commands.evaluate import embed
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import build_trainer

pytestmark = pytest.mark.slow


def live_tensors():
    gc.collect()
    held = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return [x for x in held if type(x) is not FakeTensor]  # of a compiler, without memory


class Watch(Callback):
    """Counts live tensors, their bytes, and what else Python holds, before some batches."""

    def __init__(self, moments):
        self.moments, self.found = moments, []

    def look(self, moment):
        if moment in self.moments:
            tensors = live_tensors()
            n_bytes = sum(x.numel() * x.element_size() for x in tensors)
            self.found.append((len(tensors), n_bytes, sys.getallocatedblocks()))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.look(trainer.global_step)

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.look(batch_idx)


@pytest.fixture
def module(tmp_path):
    settings = Settings(
        dataset="digits", image_size=8, conv_image_size=2, n_channels=1, patch_dim=4, contr_dim=8,
        batch_size=2, learning_rate=0.001, logger="none", max_epochs=10, limit_train=250, iters=2,
        limit_val=2, output_dir=str(tmp_path),
    )  # fmt: skip
    data = ImageDataModule(settings)
    data.setup()
    return LitAgglomerator(Agglomerator(**vars(settings)), settings, data)


def test_memory_does_not_grow_with_the_length_of_training(module):
    watch = Watch((250, 750, 1250, 1750, 2250))  # each the first of an epoch
    build_trainer(module.settings, True, [watch]).fit(module, datamodule=module.data)
    tensors, n_bytes, pieces = zip(*watch.found, strict=True)
    assert len(set(tensors)) == len(set(n_bytes)) == 1
    # Pieces of memory, one in four steps. A leak grows all the time, what Python keeps for reuse
    # grows less and less.
    assert min(later - earlier for earlier, later in pairwise(pieces)) < 500 / 4


def test_memory_grows_with_the_test_set_by_what_is_returned_alone(module):
    watch = Watch((10, 170))
    trainer = build_trainer(module.settings, False, logs=False)
    trainer.callbacks.append(watch)
    trainer.test(module, datamodule=module.data, verbose=False)
    assert watch.found[0][:2] == watch.found[1][:2]

    before = sum(x.numel() for x in live_tensors())
    embedding, labels = embed(trainer, module, module.data, module.data.test)
    after = sum(x.numel() for x in live_tensors())
    assert len(embedding) == len(labels) == len(module.data.test)
    of_both = embedding.numel() + labels.numel()
    assert after - before <= 2 * of_both + 1000  # the trainer keeps what it returned last, too
