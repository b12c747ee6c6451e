"""The space of meanings: how classes lie in the embedding, scored against what people know of them.

Distances are cosine distances, 1 - cosine.
"""

from dataclasses import dataclass

import numpy as np

POINTS = 2000  # images in a picture: more hide one another, and t-SNE takes minutes
PERPLEXITY = 30
SHUFFLES = 1000


@dataclass
class ClassTree:
    """What average linkage makes of the class means.

    Attributes:
        present: (m,) labels of the classes that have images.
        linkage: (m - 1, 4), as scipy has it.
    """

    present: np.ndarray
    linkage: np.ndarray

    @classmethod
    def of(cls, embedding, labels):
        """The tree of the classes of embeddings (N, contr_dim) with labels (N,), of which there are
        at least two."""
        from scipy.cluster.hierarchy import average
        from scipy.spatial.distance import squareform

        present = np.unique(labels)
        means = _unit(np.stack([_unit(embedding[labels == c]).mean(0) for c in present]))
        distances = np.clip(1 - means @ means.T, 0, None)
        return cls(present, average(squareform(distances, checks=False)))

    @property
    def order(self):
        """Indices into `present` in the order of the leaves."""
        from scipy.cluster.hierarchy import leaves_list

        return leaves_list(self.linkage)


def silhouette(embedding, groups):
    """Mean silhouette of embeddings (N, d) in groups (N,) by cosine distance (Rousseeuw 1987);
    None if all are in one group.

    That of scikit-learn looks at all pairs. With cosines the mean distance to the images of a group
    follows from their mean, which makes it exact for any number of images.
    """
    names, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return None
    x = _unit(embedding)
    means = np.stack([x[groups == g].mean(0) for g in range(len(names))])
    to_groups = 1 - x @ means.T  # (N, groups)
    rows, n_own = np.arange(len(x)), sizes[groups]
    own = to_groups[rows, groups] * n_own / np.maximum(n_own - 1, 1)  # without the image itself
    to_groups[rows, groups] = np.inf
    other = to_groups.min(1)
    largest = np.maximum(own, other)
    shares = np.divide(other - own, largest, out=np.zeros_like(own), where=largest > 1e-12)
    return float(np.where(n_own > 1, shares, 0).mean())


def agreement(tree, hierarchy, seed=0):
    """How well a class tree agrees with a hierarchy.

    Each figure comes with its mean over 1000 shuffles of the names of the classes, and p, the share
    of shuffles that reach it (a permutation test, after Mantel 1967).

    Returns:
        cophenetic_correlation: between the heights at which the tree joins two classes and their
            distances in the hierarchy, over all pairs; None if either are all equal.
        purity: share of classes that are in a cluster of mostly their own super-class, when the
            tree is cut into as many clusters as there are super-classes; None if there are as many
            as classes, or only one. For two super-classes it is the purity of the top split.
        clusters: how many these are.
    """
    from scipy.cluster.hierarchy import cophenet, fcluster
    from scipy.spatial.distance import squareform

    m = len(tree.present)
    joined = squareform(cophenet(tree.linkage))
    known = hierarchy.distances()[np.ix_(tree.present, tree.present)]
    super_labels = np.unique(hierarchy.super_labels[tree.present], return_inverse=True)[1]
    n_clusters = super_labels.max() + 1
    clusters = fcluster(tree.linkage, n_clusters, "maxclust") - 1

    a, b = _standard(joined), _standard(known)

    def correlation(order):
        return (a * b[np.ix_(order, order)]).sum()

    def purity(order):
        counts = np.zeros((n_clusters, n_clusters))
        np.add.at(counts, (clusters, super_labels[order]), 1)
        return counts.max(1).sum() / m

    generator = np.random.default_rng(seed)
    orders = [generator.permutation(m) for _ in range(SHUFFLES)]
    defined = a is not None and b is not None
    return {
        "cophenetic_correlation": _against_chance(correlation, orders) if defined else None,
        "purity": _against_chance(purity, orders) if 1 < n_clusters < m else None,
        "clusters": int(n_clusters),
    }


def mistakes(confusion, hierarchy):
    """How far mistakes go in a hierarchy.

    Args:
        confusion: (n_classes, n_classes) counts, row: true class, column: predicted class.

    Returns:
        count: of mistakes; distance: their mean distance; random: what it would be if each had gone
        to any other class. None if there is no mistake.
    """
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    count = int(wrong.sum())
    if not count:
        return None
    distances = hierarchy.distances()
    random = wrong.sum(1) @ distances.sum(1) / (len(distances) - 1)
    return {
        "count": count,
        "distance": float((wrong * distances).sum() / count),
        "random": float(random / count),
    }


def scores(embedding, labels, predicted, hierarchy, n_classes, seed=0):
    """All figures of embeddings (N, contr_dim) with labels and predicted labels (N,): `silhouette`
    and `agreement` and `mistakes`, as a dictionary; without a hierarchy those that need none."""
    record = {"silhouette_by_class": silhouette(embedding, labels)}
    if hierarchy is None:
        return record
    confusion = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    super_labels = hierarchy.super_labels
    record["silhouette_by_super_class"] = silhouette(embedding, super_labels[labels])
    if len(np.unique(labels)) > 1:
        record |= agreement(ClassTree.of(embedding, labels), hierarchy, seed)
    return record | {"mistakes": mistakes(confusion, hierarchy)}


def record_of(settings, stage, checkpoint, embedding, labels, predicted, data, classified_by):
    """What is known of the embedding of the test set, as a dictionary for JSON."""
    hierarchy, classes = data.hierarchy, data.classes
    supers = None
    if hierarchy is not None:
        tops = hierarchy.super_labels
        supers = {
            name: [classes[label] for label in np.flatnonzero(tops == i)]
            for i, name in enumerate(hierarchy.super_classes)
        }
    return {
        "dataset": settings.dataset,
        "stage": stage,
        "checkpoint": checkpoint,
        "images": len(labels),
        "classified_by": classified_by,
        "error": float((predicted != labels).mean()),
        "hierarchy": None if hierarchy is None else hierarchy.name,
        "super_classes": supers,
        "scores": scores(embedding, labels, predicted, hierarchy, len(classes), settings.seed),
    }


def lines_of(record):
    """The figures as a table for the terminal, each beside what it would be by chance."""
    scored = record["scores"]
    lines = [f"{'':<32} value   by chance"]

    def add(name, value, chance=""):
        lines.append(f"{name:<32}{value:6.3f}   {chance}".rstrip())

    for key in ("cophenetic_correlation", "purity"):
        found = scored.get(key)
        if found:
            n = scored["clusters"]
            split = "top split" if n == 2 else f"cut into {n}"
            name = f"purity of the {split}" if key == "purity" else "cophenetic correlation"
            add(name, found["value"], f"{found['chance']:.3f}   p = {found['p']:.3f}")
    found = scored.get("mistakes")
    if found:
        add(f"distance of {found['count']} mistakes", found["distance"], f"{found['random']:.3f}")
    for key in ("silhouette_by_class", "silhouette_by_super_class"):
        if scored.get(key) is not None:
            add(key.replace("_", " ").replace("super class", "super-class"), scored[key])
    against = record["hierarchy"] or "no hierarchy known: name one by --hierarchy"
    head = (
        f"The embedding of {record['images']} test images, {record['error']:.2%} mistaken by the "
        f"{record['classified_by']}, against {against}"
    )
    return [head, *lines]


@dataclass
class Points:
    """The images of a picture of the embedding.

    Attributes:
        rows: (P,) their numbers in the test set, ascending.
        labels: (P,).
        pca: (P, 2), on the two main axes of all test images.
        shares: (2,) of the variance that the axes hold.
        tsne: (P, 2), or None if there are too few images, or all are equal.
    """

    rows: np.ndarray
    labels: np.ndarray
    pca: np.ndarray
    shares: np.ndarray
    tsne: np.ndarray | None

    @classmethod
    def of(cls, embedding, labels, seed=0, most=POINTS):
        """At most so many of the embeddings (N, contr_dim), drawn by seed, in two dimensions."""
        chosen = np.random.default_rng(seed).permutation(len(embedding))[:most]
        rows = np.sort(chosen)
        pca, shares = _principal_axes(embedding, rows)
        return cls(rows, labels[rows], pca, shares, _tsne(embedding[rows], seed))


def _principal_axes(embedding, rows):
    """Places (P, 2) of some rows on the two main axes of all, and the variance these hold (2,)."""
    centred = embedding - embedding.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[abs(axes).argmax(0), range(axes.shape[1])])  # they could point back
    places = centred[rows] @ axes
    missing = 2 - axes.shape[1]
    shares = variances[::-1][:2] / max(variances.sum(), 1e-12)
    return np.pad(places, ((0, 0), (0, missing))), np.pad(shares, (0, missing)).clip(0, 1)


def _tsne(embedding, seed):
    from sklearn.manifold import TSNE

    if len(embedding) < 5 or np.ptp(embedding, axis=0).max() < 1e-6:
        return None
    perplexity = min(PERPLEXITY, (len(embedding) - 1) / 3)
    init = "pca" if embedding.shape[1] > 1 else "random"
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(embedding)


def _unit(x):
    """Rows of x as float64 of unit length; those of zero stay."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _standard(distances):
    """Distances (n, n), symmetric, of mean 0 and length 1 off the diagonal, 0 on it; None if they
    are all equal."""
    off_diagonal = ~np.eye(len(distances), dtype=bool)
    centred = (distances - distances[off_diagonal].mean()) * off_diagonal
    length = np.linalg.norm(centred)
    return centred / length if length > 1e-9 else None


def _against_chance(figure, orders):
    value = figure(np.arange(len(orders[0])))
    shuffled = np.array([figure(order) for order in orders])
    reached = (shuffled >= value - 1e-9).sum()
    return {
        "value": float(value),
        "chance": float(shuffled.mean()),
        "p": float((1 + reached) / (1 + len(orders))),
    }
