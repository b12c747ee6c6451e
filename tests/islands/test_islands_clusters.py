import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from agglomerator.islands.clusters import average_linkage, cluster, cut
from agglomerator.islands.scores import PositionShare


@pytest.mark.parametrize("n, d", [(9, 2), (64, 8)])
def test_cuts_are_those_of_scikit_learn(n, d):
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    merges = average_linkage(vectors)
    for number in (1, 2, 5, n - 1, n):
        found = cut(merges, number)
        assert sorted(set(found)) == list(range(number))
        model = AgglomerativeClustering(number, metric="cosine", linkage="average")
        assert adjusted_rand_score(found, model.fit_predict(vectors.numpy())) == 1


def test_more_clusters_than_vectors_equal_vectors_and_none():
    same = average_linkage(torch.ones(4, 3))
    assert len(set(cut(same, 2))) == 2 and len(set(cut(same, 9))) == 4
    assert cut(average_linkage(torch.ones(1, 3)), 2).tolist() == [0]
    with_zero = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.1]])
    assert cut(average_linkage(with_zero), 2).tolist() == [0, 1, 1]


def test_each_image_and_level_is_clustered_for_itself():
    states = torch.randn(3, 16, 2, 5, generator=torch.Generator().manual_seed(0))
    numbers = [torch.tensor([2, 3, 4]), torch.tensor([1, 16, 5])]
    found = cluster(states, numbers)
    for labels, wanted in zip(found, numbers, strict=True):
        assert labels.shape == (3, 2, 4, 4) and labels.dtype == torch.int64
        for i, level in np.ndindex(3, 2):
            expected = cut(average_linkage(states[i, :, level]), int(wanted[i]))
            np.testing.assert_array_equal(labels[i, level].flatten(), expected)
    halves = cluster(states.bfloat16(), numbers[:1])[0]
    assert halves.equal(cluster(states.bfloat16().float(), numbers[:1])[0])


def test_position_explains_all_a_part_and_nothing():
    draw = torch.Generator().manual_seed(1)
    n_images, n, d = 50, 9, 4
    places = torch.randn(1, n, 1, d, generator=draw).expand(n_images, -1, -1, -1)
    images = torch.randn(n_images, 1, 1, d, generator=draw).expand(-1, n, -1, -1)
    noise = torch.randn(n_images, n, 1, d, generator=draw)
    states = torch.cat((places, images, noise, places + noise, torch.ones_like(noise)), 2)
    once, twice = PositionShare(), PositionShare()
    once.update(3 * states)
    for part in states.split(17):
        twice.update(part)
    found = once.compute()
    assert twice.compute()[:4] == pytest.approx(found[:4])
    assert found[0] == pytest.approx(1, abs=1e-6) and found[1] == pytest.approx(0, abs=1e-6)
    assert found[2] == pytest.approx(1 / n_images, rel=0.6)
    assert math.isnan(found[4])
    unit = F.normalize(states[:, :, 3].double(), dim=-1)
    of_places = unit.mean(0).var(0, correction=0).sum()
    expected = of_places / unit.flatten(0, 1).var(0, correction=0).sum()
    assert found[3] == pytest.approx(expected.item(), rel=1e-6)
    once.reset()
    once.update(states[:1])
    assert once.compute()[2] == pytest.approx(1)
