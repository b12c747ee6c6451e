"""Random numbers."""

import numpy as np
import torch


def seeded_generator(*numbers):
    """A torch.Generator on the CPU that depends only on the given non-negative integers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
