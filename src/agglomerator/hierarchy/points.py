"""The images of a test set as points in two dimensions, by their embeddings."""

from dataclasses import dataclass

import numpy as np

MOST_POINTS = 2000  # with more, points hide one another, and t-SNE takes minutes
PERPLEXITY = 30
LEAST_RANGE = 1e-6  # embeddings that differ less than this are all equal


@dataclass
class Points:
    """Images drawn from a test set, in two dimensions.

    Attributes:
        rows: (P,) their indices in the test set, ascending.
        labels: (P,).
        pca: (P, 2), on the first two principal axes of all test images.
        shares: (2,) of the variance on these axes.
        tsne: (P, 2), by t-SNE (van der Maaten and Hinton 2008). None if there are fewer than five
            images, or all are equal.
    """

    rows: np.ndarray
    labels: np.ndarray
    pca: np.ndarray
    shares: np.ndarray
    tsne: np.ndarray | None

    @classmethod
    def of(cls, embedding, labels, seed=0, most=MOST_POINTS):
        """Draw at most `most` images by seed.

        Args:
            embedding: (N, d), of all test images.
            labels: (N,).

        Example:
            >>> import numpy as np
            >>> embedding = np.random.default_rng(0).normal(size=(100, 8))
            >>> points = Points.of(embedding, np.arange(100) % 10, most=20)
            >>> points.pca.shape, points.tsne.shape
            ((20, 2), (20, 2))
        """
        drawn = np.random.default_rng(seed).permutation(len(embedding))[:most]
        rows = np.sort(drawn)
        pca, shares = _principal_axes(embedding, rows)
        return cls(rows, labels[rows], pca, shares, _tsne(embedding[rows], seed))


def _principal_axes(embedding, rows):
    """Coordinates (P, 2) of some rows on the first two principal axes of all rows, and the shares
    (2,) of the variance on these axes. scikit-learn fixes the signs of the axes."""
    from sklearn.decomposition import PCA

    coordinates, shares = np.zeros((len(rows), 2)), np.zeros(2)
    if np.ptp(embedding, axis=0).max() > LEAST_RANGE:  # otherwise PCA divides by 0
        x = embedding.astype(np.float64)
        n_axes = min(2, x.shape[1])
        pca = PCA(n_axes, svd_solver="covariance_eigh").fit(x)
        coordinates[:, :n_axes] = pca.transform(x[rows])
        shares[:n_axes] = pca.explained_variance_ratio_
    return coordinates, shares


def _tsne(embedding, seed):
    from sklearn.manifold import TSNE

    if len(embedding) < 5 or np.ptp(embedding, axis=0).max() < LEAST_RANGE:
        return None
    perplexity = min(PERPLEXITY, (len(embedding) - 1) / 3)
    init = "pca" if embedding.shape[1] > 1 else "random"
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(embedding)
