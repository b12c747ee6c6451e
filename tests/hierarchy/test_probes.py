import numpy as np
import pytest
import torch

from agglomerator.hierarchy import probes
from agglomerator.hierarchy.probes import STRENGTH, probe


def images(n, seed, spread=0.9):
    """Embeddings (n, 8) of 4 classes that overlap, of unit length, and labels."""
    draw, means = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(4, 8))
    labels = draw.integers(0, 4, n)
    x = means[labels] + spread * draw.normal(size=(n, 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def by_votes(learned, tested, k):
    nearest = np.argsort(-(tested[0] @ learned[0].T), axis=1, kind="stable")[:, :k]
    votes = np.stack([(learned[1][nearest] == c).sum(1) for c in range(4)], 1)
    return (votes.argmax(1) != tested[1]).mean()


def by_gradient_descent(learned, tested):
    """Logistic regression: cross-entropy and |W|^2 / (2 C), by torch's L-BFGS."""
    x, labels = torch.from_numpy(learned[0]).double(), torch.from_numpy(learned[1])
    weight = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = x @ weight[:8] + weight[8]
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        total = total + weight[:8].square().sum() / (2 * STRENGTH)
        total.backward()
        return total

    optimizer.step(loss)
    logits = torch.from_numpy(tested[0]).double() @ weight[:8] + weight[8]
    return (logits.argmax(1).numpy() != tested[1]).mean()


def test_probes_are_what_they_say():
    learned, tested = images(400, 1), images(300, 2)
    found = probe(learned, tested)
    assert found["images"] == 400 and found["neighbours"] == 20
    assert 0.02 < found["linear"] < 0.6
    assert found["knn"] == pytest.approx(by_votes(learned, tested, 20), abs=0.004)
    assert found["linear"] == pytest.approx(by_gradient_descent(learned, tested), abs=0.004)


def test_few_images_and_many(monkeypatch):
    learned, tested = images(7, 1), images(50, 2)
    assert probe(learned, tested)["neighbours"] == 7
    one = learned[0], np.zeros(7, int)
    assert probe(one, tested)["linear"] is None
    assert probe((learned[0][:0], learned[1][:0]), tested) is None
    monkeypatch.setattr(probes, "MOST_IMAGES", 100)
    whole = images(400, 1)
    first, again, other = (probe(whole, tested, seed) for seed in (0, 0, 1))
    assert first == again != other and first["images"] == 100
