"""Data sets, augmentation of batches, and the batches of a run."""
