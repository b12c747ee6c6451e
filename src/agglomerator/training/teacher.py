"""A network that teaches the islands that it sees.

The teacher sees a whole image and its mirror image. The student sees crops in other colours, and
learns to find the same islands (Xie et al., "Self-training with noisy student", CVPR 2020, did so
with classes). Islands from two views are more stable than from one, so that the student can surpass
its teacher, and be the next one.
"""

import torch

from agglomerator.islands.merging import COARSER, MergeTrees
from agglomerator.training.losses.pairs import unit_maps

ON_TOP = 4  # islands of an image on the top level; on each level below `COARSER` times as many


class Teacher:
    """A network that teaches.

    Args:
        model: the `Agglomerator`, in evaluation mode.
    """

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def islands(self, images):
        """Islands of normalised images (B, C, H, W), labels (B, K, S, S). They come from one tree
        of merges of the vectors of all levels, so that each lies in one of the next level."""
        self.model.to(images.device)
        looks = images, images.flip(-1)
        seen, mirrored = (unit_maps(self.model.with_levels(look)[1]) for look in looks)
        both = torch.cat((seen, mirrored.flip(-1)))  # (2K, B, d, S, S)
        vectors = both.permute(1, 3, 4, 0, 2).flatten(3).flatten(1, 2)  # (B, n, 2K d)
        trees = MergeTrees(vectors[:, :, None])
        n, n_levels = vectors.shape[1], len(seen)
        numbers = [min(ON_TOP * COARSER ** (n_levels - 1 - k), n) for k in range(n_levels)]
        return torch.cat([trees.cut_into(number) for number in numbers], 1).to(images.device)
