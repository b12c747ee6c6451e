"""What feeds a run: the split, batches in an order fixed by seed and epoch, and their views."""

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler, Subset

from agglomerator.data.augment import normalize, rand_augment, random_erasing
from agglomerator.data.sets import entry_of, read_split
from agglomerator.settings import UserError

VALIDATION_SHARE = 0.2


class Data(LightningDataModule):
    """The data set of a run.

    Batches are uint8 images (B, C, H, W) and labels (B,); `view` and `augmented_view` make the
    network's input of them, on whatever device they are.

    Attributes, after `setup`: `train`, `val`, `test`, subsets in data-set order; `classes`, names.
    """

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.entry = entry_of(settings)

    def prepare_data(self):
        for train in (True, False):
            self.entry.read(self.settings, train)

    def setup(self, stage=None):
        if hasattr(self, "train"):
            return
        s = self.settings
        whole = read_split(s, train=True)
        self.classes = whole.classes
        chance = torch.Generator().manual_seed(s.seed)
        order = torch.randperm(len(whole), generator=chance)
        n_val = round(VALIDATION_SHARE * len(whole))
        self.train = Subset(whole, order[n_val:].sort().values.tolist())
        self.val = Subset(whole, order[:n_val].sort().values.tolist())
        test = read_split(s, train=False)
        self.test = Subset(test, range(len(test)))

    def train_dataloader(self):
        """Shuffled by seed and epoch; batches that are not full are left out."""
        s, trainer = self.settings, self.trainer
        share = len(self.train) // trainer.world_size
        if share < s.batch_size:
            raise UserError(
                f"--batch_size={s.batch_size}: more than the {share} training images"
                f"{' of one process' if trainer.world_size > 1 else ''}; use at most {share}."
            )
        sampler = DistributedSampler(
            self.train, trainer.world_size, trainer.global_rank, seed=s.seed, drop_last=True
        )
        return self._loader(self.train, sampler=sampler, drop_last=True)

    def val_dataloader(self):
        return self.in_order(self.val)

    def test_dataloader(self):
        return self.in_order(self.test)

    def in_order(self, subset):
        """Batches of a subset in its order, each image in one process."""
        mine = range(self.trainer.global_rank, len(subset), self.trainer.world_size)
        return self._loader(Subset(subset, mine))

    def _loader(self, subset, **options):
        return DataLoader(
            subset, self.settings.batch_size, collate_fn=_as_it_is, num_workers=0, **options
        )

    def view(self, images):
        """uint8 images -> normalised float32 images, nothing changed."""
        return normalize(images, self.entry.mean, self.entry.std)

    def augmented_view(self, images, generator):
        """uint8 images -> normalised float32 images, each changed in its own way."""
        images = rand_augment(images, generator)
        if self.entry.erase:
            images = random_erasing(images, generator)
        return self.view(images)


def chance(*numbers):
    """A generator of random numbers that depends on the given numbers alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def _as_it_is(batch):
    return batch
