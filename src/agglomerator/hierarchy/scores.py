"""How the classes lie in the embedding, scored against a hierarchy of classes.

All distances between embeddings are cosine distances, 1 - cosine.
"""

from dataclasses import dataclass

import numpy as np

SHUFFLES = 1000


@dataclass
class ClassTree:
    """The tree that average linkage makes of the class means.

    Attributes:
        present: (m,) labels of the classes that have images.
        linkage: (m - 1, 4), in scipy's format.

    Example:
        >>> import numpy as np
        >>> embedding = np.array([[1.0, 0], [0.9, 0.1], [0, 1]])
        >>> ClassTree.of(embedding, np.array([0, 1, 2])).linkage[0, :2].tolist()  # 0 and 1 first
        [0.0, 1.0]
    """

    present: np.ndarray
    linkage: np.ndarray

    @classmethod
    def of(cls, embedding, labels):
        """The tree of embeddings (N, d) with labels (N,) of at least two classes."""
        from scipy.cluster.hierarchy import average
        from scipy.spatial.distance import squareform

        present = np.unique(labels)
        means = _unit(np.stack([_unit(embedding[labels == c]).mean(0) for c in present]))
        distances = np.clip(1 - means @ means.T, 0, None)
        return cls(present, average(squareform(distances, checks=False)))

    @property
    def order(self):
        """Indices into `present`, in the order of the leaves."""
        from scipy.cluster.hierarchy import leaves_list

        return leaves_list(self.linkage)


def silhouette(embedding, groups):
    """Mean silhouette of groups by cosine distance (Rousseeuw 1987).

    scikit-learn's `silhouette_score` compares all pairs of images, which takes too long for a test
    set. With cosines, the mean distance to the images of a group follows from their mean, so this
    is exact and takes no pairs.

    Args:
        embedding: (N, d).
        groups: (N,) labels.

    Returns:
        From -1 to 1; None if there is only one group.

    Example:
        >>> import numpy as np
        >>> embedding = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> silhouette(embedding, np.array([0, 0, 1, 1]))
        1.0
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


def tree_scores(tree, hierarchy, seed=0):
    """How well a class tree fits a hierarchy.

    Each score comes with its mean over 1000 shuffles of the class names, `chance`, and with `p`,
    the share of shuffles that score as high (a permutation test, after Mantel 1967).

    Args:
        tree: `ClassTree`.
        hierarchy: `Hierarchy` of the same classes.
        seed: of the shuffles.

    Returns:
        A dictionary.
        cophenetic_correlation: over all pairs of classes, the correlation of the height at which
            the tree joins them with their distance in the hierarchy. None if either is constant.
        purity: cut the tree into as many clusters as there are super-classes. The share of classes
            whose super-class is the most common one of their cluster. None if there is only one
            super-class, or as many as classes. For two super-classes this scores the top split.
        clusters: their number.

    Example:
        >>> import numpy as np
        >>> from agglomerator.hierarchy.classes import Hierarchy
        >>> tree = ClassTree(np.arange(3), np.array([[0.0, 1, 1, 2], [2, 3, 3, 3]]))
        >>> pets = Hierarchy("pets", ["cat", "dog", "ship"], [("a",), ("a",), ("b",)], ["a", "b"])
        >>> tree_scores(tree, pets)["purity"]["value"]
        1.0
    """
    from scipy.cluster.hierarchy import cophenet, fcluster
    from scipy.spatial.distance import squareform

    m = len(tree.present)
    heights = squareform(cophenet(tree.linkage))
    distances = hierarchy.distances()[np.ix_(tree.present, tree.present)]
    super_labels = np.unique(hierarchy.super_labels[tree.present], return_inverse=True)[1]
    n_clusters = super_labels.max() + 1
    clusters = fcluster(tree.linkage, n_clusters, "maxclust") - 1

    a, b = _standardised(heights), _standardised(distances)

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
    """How far apart the true and the predicted class of a mistake are (Bertinetto et al. 2020,
    arXiv 1912.09393).

    Args:
        confusion: (n_classes, n_classes) counts, row: true class, column: predicted class.
        hierarchy: `Hierarchy` of the classes.

    Returns:
        A dictionary: `count` of mistakes; `distance`, their mean distance in the hierarchy;
        `random`, the mean distance if every mistake had gone to a random wrong class. None if
        there are no mistakes.

    Example:
        >>> import numpy as np
        >>> from agglomerator.hierarchy.classes import Hierarchy
        >>> pets = Hierarchy("pets", ["cat", "dog", "ship"], [("a",), ("a",), ("b",)], ["a", "b"])
        >>> mistakes(np.array([[5, 1, 0], [0, 6, 0], [0, 0, 6]]), pets)
        {'count': 1, 'distance': 1.0, 'random': 1.5}
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
    """All scores of an embedding: `silhouette`, `tree_scores` and `mistakes`.

    Args:
        embedding: (N, d).
        labels, predicted: (N,) true and predicted labels.
        hierarchy: None leaves out what needs one.
        n_classes: of the data set.
        seed: of the shuffles in `tree_scores`.

    Returns:
        A dictionary.
    """
    record = {"silhouette_by_class": silhouette(embedding, labels)}
    if hierarchy is None:
        return record
    confusion = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    super_labels = hierarchy.super_labels
    record["silhouette_by_super_class"] = silhouette(embedding, super_labels[labels])
    if len(np.unique(labels)) > 1:
        record |= tree_scores(ClassTree.of(embedding, labels), hierarchy, seed)
    return record | {"mistakes": mistakes(confusion, hierarchy)}


def record_of(settings, checkpoint, embedding, labels, predicted, data, classified_by):
    """The record of the test set's embedding, a dictionary for JSON: where it comes from, and its
    `scores`."""
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
        "stage": settings.stage,
        "checkpoint": checkpoint,
        "images": len(labels),
        "classified_by": classified_by,
        "error": float((predicted != labels).mean()),
        "hierarchy": None if hierarchy is None else hierarchy.name,
        "super_classes": supers,
        "scores": scores(embedding, labels, predicted, hierarchy, len(classes), settings.seed),
    }


def lines_of(record):
    """The scores of a record as lines for the terminal, each beside what chance would give."""
    known = record["scores"]
    lines = [f"{'':<32} value   by chance"]

    def add(name, value, chance=""):
        lines.append(f"{name:<32}{value:6.3f}   {chance}".rstrip())

    for key in ("cophenetic_correlation", "purity"):
        score = known.get(key)
        if score:
            n = known["clusters"]
            split = "top split" if n == 2 else f"cut into {n}"
            name = f"purity of the {split}" if key == "purity" else "cophenetic correlation"
            add(name, score["value"], f"{score['chance']:.3f}   p = {score['p']:.3f}")
    wrong = known.get("mistakes")
    if wrong:
        add(f"distance of {wrong['count']} mistakes", wrong["distance"], f"{wrong['random']:.3f}")
    for key in ("silhouette_by_class", "silhouette_by_super_class"):
        if known.get(key) is not None:
            add(key.replace("_", " ").replace("super class", "super-class"), known[key])
    against = record["hierarchy"] or "no known hierarchy: name a file by --hierarchy"
    head = (
        f"Embedding of {record['images']} test images (error {record['error']:.2%} by the "
        f"{record['classified_by']}), compared with {against}"
    )
    return [head, *lines]


def _unit(x):
    """Rows of x as float64 of unit length; rows of zeros stay."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _standardised(distances):
    """Symmetric distances (n, n) with mean 0 and norm 1 off the diagonal, and 0 on it. None if they
    are all equal."""
    off_diagonal = ~np.eye(len(distances), dtype=bool)
    centred = (distances - distances[off_diagonal].mean()) * off_diagonal
    length = np.linalg.norm(centred)
    return centred / length if length > 1e-9 else None


def _against_chance(score, orders):
    """A score of the true order of classes, beside those of shuffled orders."""
    value = score(np.arange(len(orders[0])))
    shuffled = np.array([score(order) for order in orders])
    as_high = (shuffled >= value - 1e-9).sum()
    return {
        "value": float(value),
        "chance": float(shuffled.mean()),
        "p": float((1 + as_high) / (1 + len(orders))),
    }
