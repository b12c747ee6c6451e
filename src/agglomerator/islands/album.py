"""The folder of a run's pictures of islands, which keeps their one projection."""

from agglomerator.islands.inspection import Islands
from agglomerator.islands.projection import Projection

DPI = 100


class Album:
    """Pictures of islands in one folder, all in the colours of one projection, which is kept there.

    Args:
        folder: for the pictures. If it has no projection yet, and none was fitted, the states of
            the first picture make one.
        threshold, loss: as for `segment`.
        projection: name of its file in the folder; each network has its own.
    """

    def __init__(self, folder, threshold, loss=None, projection="projection.npz"):
        self.folder, self.threshold, self.loss = folder, threshold, loss
        self.path = folder / projection
        self.projection = None

    def open(self, states):
        """Use the projection of the folder. Returns whether there is one for such states."""
        self.projection = Projection.load(self.path, *states.shape[-2:])
        return self.projection is not None

    def fit(self, states, keep=True):
        """Fit the projection to states (B, n, K, d); write it to the folder unless `keep` is
        False."""
        self.projection = Projection.fit(states)
        if keep:
            self.projection.save(self.path)

    def islands(self, images, names, states, masks=None, model=None):
        """The `Islands` of some images in the colours of this folder; the arguments are its."""
        if self.projection is None and not self.open(states):
            self.fit(states[-1])
        found_by = self.threshold, self.loss
        return Islands(images, names, states, *found_by, self.projection, masks, model)

    def write(self, name, figure, kinds=("png",), dpi=DPI):
        """Write a figure as a file of this name for each of the kinds, such as "png" or "pdf";
        returns their paths."""
        return figure.write(self.folder / name, kinds, dpi)
