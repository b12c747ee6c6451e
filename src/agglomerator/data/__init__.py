"""Data: the data sets, augmentation in batches, and what feeds a run."""
