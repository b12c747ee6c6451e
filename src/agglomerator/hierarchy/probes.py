"""What simple classifiers read from the frozen embedding, beside the network's own classifier.

Papers on pre-training report both: the vote of the nearest training images (k-NN, Wu et al. 2018,
arXiv 1805.01978), and a linear probe, logistic regression (Alain and Bengio 2016, arXiv
1610.01644). Both are scikit-learn's.
"""

import warnings

import numpy as np

NEIGHBOURS = 20
MOST_IMAGES = 50000  # to learn from, and
MOST_NUMBERS = 2**25  # in their embeddings: more would take the probe many minutes
STRENGTH = 10.0  # inverse of the regularisation of the linear probe, scikit-learn's C
STEPS = 1000


def probe(learned, tested, seed=0):
    """Errors of k-NN (cosine, each neighbour one vote) and of a linear probe.

    Args:
        learned: embeddings (N, d) of training images of unit length, and their labels (N,).
        tested: the same of test images.
        seed: draws the training images if there are too many.

    Returns:
        A dictionary: `images` learned from, `neighbours`, the error `knn`, and that of the probe,
        `linear`, None where only one class was learned. None if there is no training image.

    Example:
        >>> import numpy as np
        >>> learned = np.eye(2, dtype=np.float32).repeat(20, 0), np.arange(2).repeat(20)
        >>> probe(learned, (np.array([[0.8, 0.6], [0.6, 0.8]]), np.array([0, 0])))
        {'images': 40, 'neighbours': 20, 'knn': 0.5, 'linear': 0.5}
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    embedding, labels = learned
    most = min(MOST_IMAGES, MOST_NUMBERS // embedding.shape[1])
    if len(embedding) > most:
        drawn = np.sort(np.random.default_rng(seed).permutation(len(embedding))[:most])
        embedding, labels = embedding[drawn], labels[drawn]
    if not len(embedding):
        return None
    neighbours = min(NEIGHBOURS, len(embedding))

    def error(classifier):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last step serves as well
            predicted = classifier.fit(embedding, labels).predict(tested[0])
        return float((predicted != tested[1]).mean())

    several = len(np.unique(labels)) > 1
    return {
        "images": len(embedding),
        "neighbours": neighbours,
        "knn": error(KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute")),
        "linear": error(LogisticRegression(C=STRENGTH, max_iter=STEPS)) if several else None,
    }


def line_of(found):
    """What `probe` found, as a line for the terminal."""
    linear = "" if found["linear"] is None else f", {found['linear']:.2%} by a linear probe"
    return (
        f"Error from {found['images']} training images: {found['knn']:.2%} by "
        f"{found['neighbours']} nearest neighbours{linear}"
    )
