import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import ward_tree
from sklearn.feature_extraction.image import grid_to_graph

from agglomerator.islands.clusters import after
from agglomerator.islands.merging import COARSER, MergeTrees, merged, merges
from agglomerator.islands.segments import segment


def blocks(noise=0.0):
    """Columns of a 4 x 4 grid in two halves, whose vectors differ: (1, 16, 1, 3)."""
    torch.manual_seed(0)
    states = torch.zeros(4, 4, 3)
    states[:, :2, 0] = states[:, 2:, 1] = 1
    return (states + noise * torch.randn_like(states)).view(1, 16, 1, 3)


def test_islands_that_agree_merge():
    assert merged(blocks(0.05), 0.05)[0, 0].tolist() == [[0, 0, 2, 2]] * 4
    assert merged(blocks(), 2.0).unique().tolist() == [0]
    assert len(merged(blocks(0.5), 1e-9).unique()) == 16


def test_a_chain_does_not_join_what_differs():
    """Neighbours turn by a little, from one end to the other by 90 degrees."""
    angle = torch.linspace(0, torch.pi / 2, 8)
    states = torch.stack((angle.cos(), angle.sin()), 1).repeat(8, 1, 1).view(1, 64, 1, 2)
    assert len(segment(states, 0.9).unique()) == 1
    assert len(segment(states, 0.9, loss=0.03).unique()) > 1


def test_lower_levels_merge_less():
    states = blocks(0.3).expand(-1, -1, 3, -1)
    number = [len(level.unique()) for level in merged(states, 0.06)[0]]
    alone = [len(merged(states[:, :, :1], 0.06 / COARSER**k)[0].unique()) for k in (2, 1, 0)]
    assert number == alone
    assert number[0] > number[2]


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
def test_a_merge_loses_what_ward_s_criterion_says(angle):
    """Two pairs of equal vectors: |A| |B| / (|A| + |B|) = 1 times the square of their distance."""
    one, other = [1.0, 0.0], [math.cos(angle), math.sin(angle)]
    states = torch.tensor([one, one, other, other], dtype=torch.float64).view(1, 4, 1, 2)
    share = (2 - 2 * math.cos(angle)) / 4  # of four columns
    assert merged(states, share + 1e-6).unique().tolist() == [0]
    assert merged(states, share - 1e-6).unique().tolist() == [0, 2]


def test_labels_are_first_columns_whatever_the_shape():
    states = torch.randn(2, 3, 16, 2, 5)
    labels = merged(states, 0.2)
    assert labels.shape == (2, 3, 2, 4, 4)
    for level in labels.flatten(0, 2).flatten(1):
        for label in level.unique():
            assert np.flatnonzero(level == label)[0] == label
    assert torch.equal(merged(states[1, 2:], 0.2), labels[1, 2:])
    assert merged(torch.randn(1, 1, 1, 3), 0.1).tolist() == [[[[0]]]]


def test_length_of_vectors_does_not_matter():
    states = blocks(0.3)
    assert torch.equal(merged(states * 7, 0.05), merged(states, 0.05))
    assert torch.equal(merged(states.bfloat16().float(), 0.05), merged(states.bfloat16(), 0.05))


@pytest.mark.parametrize("loss", [None, 0.05])
def test_segment_takes_either_rule(loss):
    expected = merged(blocks(0.1), loss) if loss else segment(blocks(0.1), 0.5)
    assert torch.equal(segment(blocks(0.1), 0.5, loss), expected)


def smooth(side, seed=0):
    """Unit vectors (side * side, 8) of a smooth random field."""
    field = torch.randn(1, 8, side + 4, side + 4, generator=torch.Generator().manual_seed(seed))
    return F.normalize(F.avg_pool2d(field, 5, 1)[0].flatten(1).T.double(), dim=-1)


def by_rounds(vectors, side):
    """The merges one round after another, without any tensor: {(first column, first column)}."""
    islands = {i: [i] for i in range(side * side)}
    touch = {(i, j) for i in islands for j in (i + 1, i + side)
             if j < side * side and (j == i + side or j % side)}  # fmt: skip
    found = []
    while touch:
        cost = {}
        for i, j in touch:
            a, b = (vectors[islands[k]].mean(0) for k in (i, j))
            n, m = len(islands[i]), len(islands[j])
            cost[i, j] = float((a - b).square().sum()) * n * m / (n + m)
        best = {i: min((pair for pair in touch if i in pair), key=cost.get) for i in islands}
        for i, j in {pair for pair in touch if best[pair[0]] == best[pair[1]] == pair}:
            found.append((i, j))
            islands[i] += islands.pop(j)
            touch = {tuple(sorted(i if k == j else k for k in pair)) for pair in touch}
        touch = {(i, j) for i, j in touch if i != j}
    return set(found)


def test_merges_are_of_cheapest_neighbours():
    images = torch.stack([smooth(6), smooth(6, 1)])
    pairs, added = merges(images, 6)
    for number, image in enumerate(images):
        own = pairs[:, pairs[0] // 36 == number] % 36
        assert set(map(tuple, own.T.tolist())) == by_rounds(image, 6)
    assert len(added) == 2 * 35


@pytest.mark.parametrize("number", [4, 12])
def test_islands_are_as_even_as_those_of_the_least_costly_merge_first(number):
    """Beside scikit-learn's tree: squared distances from the means of as many islands."""

    def spread(labels):
        return sum(float((image[labels == i] - image[labels == i].mean(0)).square().sum())
                   for i in labels.unique())  # fmt: skip

    ours, theirs = 0, 0
    for seed in range(8):
        image = smooth(16, seed)
        tree = MergeTrees(image[:, None])
        low, high = 0.0, 2.0
        for _ in range(40):  # the loss at which so many islands are left
            middle = (low + high) / 2
            more = len(tree.cut(middle).unique()) > number
            low, high = (middle, high) if more else (low, middle)
        ours += spread(tree.cut(high).flatten())
        children = ward_tree(image.numpy(), connectivity=grid_to_graph(16, 16))[0]
        theirs += spread(torch.from_numpy(after(children, np.arange(256 - number))))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_columns_that_are_all_equal_become_one_island():
    assert merged(torch.ones(2, 1024, 1, 4), 1e-9).unique().tolist() == [0]


def test_states_that_are_no_numbers_come_to_an_end():
    states = torch.rand(2, 16, 1, 4, generator=torch.Generator().manual_seed(0))
    expected = merged(states, 0.1)[0]
    states[1, 3] = torch.nan
    assert torch.equal(merged(states, 0.1)[0], expected)
