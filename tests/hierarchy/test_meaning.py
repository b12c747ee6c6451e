import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_run
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import cosine_distances

from agglomerator.hierarchy import scores
from agglomerator.hierarchy.classes import Hierarchy
from agglomerator.hierarchy.figures import draw
from agglomerator.hierarchy.marks import Marks
from agglomerator.hierarchy.points import Points

PNG = b"\x89PNG\r\n\x1a\n"
DIGITS = "round: 0, 6, 8, 9\nstraight: 1, 4, 7\nopen: 2, 3, 5\n"


def hierarchy_of(super_labels, n=None):
    """Classes "0", "1", ... in one layer of super-classes "A", "B", ..."""
    tops = [chr(ord("A") + top) for top in super_labels]
    classes = list(map(str, range(len(tops))))
    return Hierarchy("own", classes, [(top,) for top in tops], sorted(set(tops)))


def embedding_of(super_labels, n=600, noise=0.1, seed=0, width=16):
    """Images of classes that lie near one another within a super-class; labels."""
    generator = np.random.default_rng(seed)
    tops = generator.normal(size=(max(super_labels) + 1, width))
    means = tops[super_labels] + 0.3 * generator.normal(size=(len(super_labels), width))
    labels = generator.integers(0, len(super_labels), n)
    x = means[labels] + noise * generator.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_silhouette_is_that_of_scikit_learn(noise):
    x, labels = embedding_of([0, 0, 1, 1, 2], noise=noise)
    labels[labels == 4] = 3
    labels[0] = 4  # an image alone in its group
    expected = silhouette_score(x.astype(np.float64), labels, metric="cosine")
    assert scores.silhouette(x, labels) == pytest.approx(expected, abs=1e-9)
    assert scores.silhouette(x, np.zeros(len(x), dtype=int)) is None


def test_class_tree_joins_the_nearest_means_first():
    x, labels = embedding_of([0, 0, 0, 1, 1, 1])
    tree = scores.ClassTree.of(x, labels)
    means = np.stack([x[labels == c].mean(0) for c in range(6)])
    distances = cosine_distances(means)
    distances[np.diag_indices(6)] = np.inf
    first = np.unravel_index(distances.argmin(), distances.shape)
    assert set(tree.linkage[0, :2]) == set(first)
    assert tree.linkage[0, 2] == pytest.approx(distances.min(), abs=1e-4)
    top = set(tree.order[:3])
    assert top in ({0, 1, 2}, {3, 4, 5})


def test_tree_fits_the_true_and_not_a_wrong_hierarchy():
    true, wrong = [0] * 6 + [1] * 4, [0, 1] * 5
    tree = scores.ClassTree.of(*embedding_of(true, n=2000))
    good = scores.tree_scores(tree, hierarchy_of(true))
    assert good["clusters"] == 2
    assert good["purity"]["value"] == 1
    assert good["purity"]["p"] < 0.02
    assert 0.6 <= good["purity"]["chance"] < 0.75
    assert good["cophenetic_correlation"]["value"] > 0.9
    assert good["cophenetic_correlation"]["p"] < 0.02
    assert abs(good["cophenetic_correlation"]["chance"]) < 0.05
    bad = scores.tree_scores(tree, hierarchy_of(wrong))
    assert bad["cophenetic_correlation"]["value"] < 0.2
    assert bad["purity"]["value"] < 0.8


def test_cophenetic_correlation_counted_by_hand():
    # The tree ((a, b) at 1, c) at 3 and the hierarchy (a, (b, c)), pairs ab, ac, bc.
    tree = scores.ClassTree(np.arange(3), np.array([[0.0, 1, 1, 2], [2, 3, 3, 3]]))
    found = scores.tree_scores(tree, hierarchy_of([0, 1, 1]))
    expected = np.corrcoef([1, 3, 3], [2, 2, 1])[0, 1]
    assert found["cophenetic_correlation"]["value"] == pytest.approx(expected)
    assert found["purity"]["value"] == pytest.approx(2 / 3)


def test_mistakes_counted_by_hand():
    confusion = np.array([[5, 2, 1, 0], [0, 9, 0, 0], [0, 3, 4, 0], [0, 0, 0, 1]])
    found = scores.mistakes(confusion, hierarchy_of([0, 0, 1, 1]))
    assert found["count"] == 6
    assert found["distance"] == pytest.approx((2 * 1 + 1 * 2 + 3 * 2) / 6)
    assert found["random"] == pytest.approx((1 + 2 + 2) / 3)
    assert scores.mistakes(np.eye(4, dtype=int), hierarchy_of([0, 0, 1, 1])) is None


STRANGE = {
    "all images equal": (np.ones((50, 8), np.float32) / np.sqrt(8), np.arange(50) % 4),
    "all zero": (np.zeros((50, 8), np.float32), np.arange(50) % 4),
    "one class has images": (embedding_of([0], n=30)[0], np.full(30, 2)),
    "two classes have images": (embedding_of([0, 1], n=30)[0], np.arange(30) % 2 + 1),
    "an embedding of one number": (np.array([[1.0], [-1.0]] * 10, np.float32), np.arange(20) % 4),
    "one image": (embedding_of([0], n=1)[0], np.zeros(1, dtype=int)),
    "four images": (embedding_of([0], n=4)[0], np.arange(4)),
}


@pytest.mark.parametrize("x, labels", STRANGE.values(), ids=STRANGE)
@pytest.mark.filterwarnings("error")
def test_strange_embeddings_are_drawn_and_scored(x, labels, tmp_path):
    hierarchy = hierarchy_of([0, 0, 1, 1])
    found = scores.scores(x, labels, np.zeros_like(labels), hierarchy, 4)
    json.dumps(found, allow_nan=False)
    whole = {"test": labels}.get
    data = SimpleNamespace(classes=hierarchy.classes, hierarchy=hierarchy, whole=whole)
    points, figures = draw(x, labels, found, SimpleNamespace(exp_name="own", seed=0), data)
    assert np.isfinite(points.pca).all() and len(points.rows) == len(x)
    assert ("dendrogram" in figures) == (len(np.unique(labels)) > 1)
    for name, figure in figures.items():
        figure.savefig(tmp_path / name, format="png", dpi=30)


def test_points_are_a_sample_that_the_seed_chooses():
    x, labels = embedding_of([0, 1], n=500, width=4)
    points, again, other = (Points.of(x, labels, seed, most=100) for seed in (1, 1, 2))
    assert len(points.rows) == len(set(points.rows)) == 100
    assert set(points.rows) != set(other.rows)
    np.testing.assert_array_equal(points.labels, labels[points.rows])
    np.testing.assert_array_equal(points.tsne, again.tsne)
    x = x.astype(np.float64)
    whole = PCA(2).fit(x)
    np.testing.assert_allclose(points.shares, whole.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(abs(points.pca), abs(whole.transform(x[points.rows])), atol=1e-5)


def test_marks_tell_classes_and_super_classes_apart():
    super_labels = [0, 1] * 5
    ten = Marks.of([str(i) for i in range(10)], hierarchy_of(super_labels), range(10))
    assert len(set(ten.colours)) == 10
    assert [ten.shapes[i] == ten.shapes[0] for i in range(10)] == [True, False] * 5
    names = [text for text, _, _ in ten.legend]
    assert names[0] == "A" and names[6] == "B" and names[1:6] == ["0", "2", "4", "6", "8"]

    super_labels = np.arange(100) % 20
    hundred = Marks.of([str(i) for i in range(100)], hierarchy_of(super_labels), range(100))
    pairs = list(zip(hundred.colours, hundred.shapes, strict=True))
    assert len(set(pairs)) == len(hundred.legend) == 20
    assert all(pairs[i] == pairs[i % 20] for i in range(100))

    unknown = Marks.of([str(i) for i in range(300)], None, range(300))
    assert len(set(map(tuple, unknown.colours))) > 200 and not unknown.legend


@pytest.fixture
def digits_hierarchy(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text(DIGITS)
    return path


def test_freeze_draws_and_scores(stage_two_checkpoint, digits_hierarchy, tmp_path):
    flags = f"--load_checkpoint_dir={stage_two_checkpoint}", f"--hierarchy={digits_hierarchy}"
    flags = "--logger=tensorboard", "--figure_format=svg", *flags
    result = small_run(tmp_path, "--exp_name=f", "--mode=freeze", *flags)
    folder = tmp_path / "f"
    record = json.loads((folder / "embedding.json").read_text())
    for name in ("embedding", "dendrogram"):
        assert (folder / f"{name}.png").read_bytes().startswith(PNG)
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    assert record["classified_by"] == "classifier"
    assert record["super_classes"]["straight"] == ["1", "4", "7"]
    x, labels = np.load(folder / "features_test.npy"), np.load(folder / "labels_test.npy")
    super_labels = np.array([0, 1, 2, 2, 1, 2, 0, 1, 0, 0])[labels]
    for name, groups in (("class", labels), ("super_class", super_labels)):
        expected = silhouette_score(x, groups, metric="cosine")
        assert record["scores"][f"silhouette_by_{name}"] == pytest.approx(expected, abs=1e-4)
    assert f"{record['scores']['purity']['value']:.3f}" in result.stdout
    projector = folder / "logs" / "freeze"
    (table,) = projector.rglob("metadata.tsv")
    assert table.read_text().startswith("class\tsuper-class\tpredicted\n")
    assert len(table.read_text().splitlines()) == 1 + len(labels)
    assert list(projector.rglob("sprite.png")) and list(projector.rglob("tensors.tsv"))

    # The test of the same network finds the same mistakes.
    small_run(tmp_path, "--exp_name=t", "--mode=test", *flags)
    tested = json.loads((tmp_path / "t" / "test_supervised.json").read_text())
    assert tested["mistakes"] == pytest.approx(record["scores"]["mistakes"])
    assert tested["error"] == pytest.approx(record["error"])
