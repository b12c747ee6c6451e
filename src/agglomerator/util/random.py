"""Random numbers."""

import numpy as np
import torch


def seeded_generator(*numbers):
    """A generator of random numbers that depends on the given numbers alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
