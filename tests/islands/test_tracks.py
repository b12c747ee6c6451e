from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import adjusted_rand_score

from agglomerator.islands.tracks import follow, lives, over_time, summary


@pytest.fixture
def clips():
    """Two clips of 6 frames, 12 x 12: three squares on a ground, and labels of each frame
    that are shuffled anew."""
    draw, masks = np.random.default_rng(0), np.zeros((2, 6, 12, 12), int)
    for b, t in np.ndindex(2, 6):
        for i, (top, left) in enumerate(((0, t), (4, 6 - t), (8 - b, 1 + t))):
            masks[b, t, top : top + 3, left : left + 4] = i + 1
    labels = np.stack([[draw.permutation(9)[frame] for frame in clip] for clip in masks])
    return torch.from_numpy(masks), torch.from_numpy(labels)


def test_islands_that_overlap_keep_their_names(clips):
    masks, labels = clips
    for mask, frames in zip(masks, labels, strict=True):
        names = follow(frames)
        pairs = set(zip(names.flatten().tolist(), mask.flatten().tolist(), strict=True))
        assert len(pairs) == 4 and names.max() == 3
    names = torch.stack([follow(frames) for frames in labels])
    ari, iou = over_time(names, masks)
    assert ari.tolist() == [1, 1] and iou.tolist() == [1, 1]


def test_the_sum_of_overlaps_is_the_greatest(clips):
    draw = np.random.default_rng(1)
    for _ in range(20):
        one, two = draw.integers(0, 4, (2, 6, 6))

        def overlap(a, b, one=one, two=two):
            both = ((one == a) & (two == b)).sum()
            return both / ((one == a) | (two == b)).sum()

        names = follow(torch.from_numpy(np.stack((one, two))), least=0)
        first = {int(names[0][one == a][0]): a for a in range(4)}
        chosen = sum(
            overlap(first[int(names[1][two == b][0])], b)
            for b in range(4)
            if int(names[1][two == b][0]) in first
        )
        best = max(sum(overlap(a, b) for a, b in enumerate(p)) for p in permutations(range(4)))
        assert chosen == pytest.approx(best)


def test_little_overlap_begins_a_new_island():
    frames = torch.zeros(3, 8, 8).long()
    frames[0, :2, :2], frames[1, :2, 1:3], frames[2, 1:3, 6:] = 1, 1, 1
    names = follow(frames, least=0.3)
    assert names[1, 0, 1] == names[0, 0, 0] == 0 or names[1, 0, 1] == 1
    assert names[1, 0, 1] == names[0, 0, 1] and names[2, 1, 6] == 2
    assert follow(frames, least=0.5)[1, 0, 1] == 2


def test_over_time_is_one_rand_index_over_all_pixels(clips):
    masks, labels = clips
    wrong = labels.clone()  # named by frame alone: nothing follows
    ari, _ = over_time(wrong, masks)
    for each, frames, mask in zip(ari, wrong.numpy(), masks.numpy(), strict=True):
        seen = mask > 0
        assert each.item() == pytest.approx(adjusted_rand_score(mask[seen], frames[seen]))
    large = masks.repeat_interleave(3, -1).repeat_interleave(3, -2)
    assert torch.allclose(over_time(wrong, large)[0], ari, atol=0.02)


def test_lives_and_ways_counted_by_hand():
    names = torch.zeros(4, 6, 6).long()
    for t in range(3):
        names[t, 1:3, t : t + 2] = 1
    found = {island["name"]: island for island in lives(names)}
    square = dict(name=1, first=0, last=2, frames=3, size=4.0, path=2.0, shift=2.0)
    assert found[1] == square and found[0]["frames"] == 4
    row = summary(names)
    assert row["number"] == 7 / 4 and row["names"] == 2 and row["kept"] == 1
    columns = 3 * 4, 4 * 36 - 3 * 4
    assert row["frames_of_columns"] == pytest.approx((3 * columns[0] + 4 * columns[1]) / 144)
    names[3, 4, 4] = 2
    assert summary(names)["kept"] == pytest.approx(1 - 1 / (3 * 36))


def test_many_islands_at_once():
    noise = np.random.default_rng(0).random((4, 16, 16)) > 0.5
    labels = torch.from_numpy(np.stack([label(frame)[0] for frame in noise])).long()
    names = follow(labels)
    for frame, named in zip(labels, names, strict=True):
        pairs = set(zip(frame.flatten().tolist(), named.flatten().tolist(), strict=True))
        assert len(pairs) == len(frame.unique()) == len(named.unique())
