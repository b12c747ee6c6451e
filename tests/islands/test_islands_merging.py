import math

import numpy as np
import pytest
import torch

from agglomerator.islands.merging import COARSER, merged
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
