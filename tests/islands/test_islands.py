import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from agglomerator.islands.scores import (
    IslandScores,
    against_mask,
    numbers_of_segments,
    score_states,
)
from agglomerator.islands.segments import (
    count,
    mean_cosine,
    neighbour_cosines,
    segment,
    to_pixels,
    total_variation,
)

# Two levels of a grid of 4x4 columns: letters are vectors, B at a cosine of 0.8 to A, C at 0.
VECTORS = {"A": (1.0, 0.0, 0.0), "B": (0.8, 0.6, 0.0), "C": (0.0, 0.0, 2.0)}
LOWER = "AAAC ACAC AAAC CCCA"
UPPER = "AABB AABB AABB AABB"


def states_of(*levels):
    """(1, 16, K, 3), of pictures of the levels."""
    rows = [[VECTORS[letter] for letter in level.replace(" ", "")] for level in levels]
    return torch.tensor(rows).transpose(0, 1)[None]


def flood(connected, side):
    """Labels by walking from column to column: the first column of each island names it."""
    labels = np.full((side, side), -1)
    for start in np.ndindex(side, side):
        if labels[start] >= 0:
            continue
        name, ahead = start[0] * side + start[1], [start]
        while ahead:
            place = ahead.pop()
            if labels[place] >= 0:
                continue
            labels[place] = name
            for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                other = place[0] + step[0], place[1] + step[1]
                if min(other) >= 0 and max(other) < side and connected(place, other):
                    ahead.append(other)
    return labels


def test_islands_of_a_picture_drawn_by_hand():
    lower, upper = segment(states_of(LOWER, UPPER), 0.9)[0].tolist()
    assert lower == [[0, 0, 0, 3], [0, 5, 0, 3], [0, 0, 0, 3], [12, 12, 12, 15]]
    assert upper == [[0, 0, 2, 2]] * 4
    (_, upper) = segment(states_of(LOWER, UPPER), 0.7)[0].tolist()
    assert upper == [[0] * 4] * 4


def test_numbers_of_a_picture_drawn_by_hand():
    states = states_of(LOWER, UPPER)
    number, inside = count(segment(states, 0.9))
    assert number.tolist() == [[5, 2]]
    assert inside.tolist() == [[14 / 16, 1]]
    # Neighbours that are equal: of 24 pairs LOWER has 6 beside and 6 above, UPPER 20.
    found = mean_cosine(*neighbour_cosines(states))[0].tolist()
    assert found == pytest.approx([12 / 24, (20 + 4 * 0.8) / 24])


@pytest.mark.parametrize("side", [1, 2, 7, 20])
def test_islands_are_those_that_a_walk_finds(side):
    states = torch.randn(2, 3, side * side, 2, 2, generator=torch.Generator().manual_seed(side))
    found = segment(states, 0.3)
    assert found.shape == (2, 3, 2, side, side)
    unit = states / states.norm(dim=-1, keepdim=True)
    for i, j, level in np.ndindex(2, 3, 2):
        grid = unit[i, j, :, level].view(side, side, 2)
        expected = flood(lambda a, b, g=grid: g[a] @ g[b] >= 0.3, side)
        np.testing.assert_array_equal(found[i, j, level], expected)


def test_bfloat16_agrees_with_what_it_holds():
    states = torch.randn(2, 49, 2, 8).bfloat16()
    assert segment(states, 0.2).equal(segment(states.float(), 0.2))


@pytest.mark.parametrize("size", [8, 12])
def test_scores_are_those_of_scikit_learn_and_of_sets(size):
    draw = torch.Generator().manual_seed(size)
    labels = torch.randint(16, (9, 4, 4), generator=draw)
    mask = torch.randint(5, (9, size, size), generator=draw, dtype=torch.uint8)
    mask[0] = 0
    mask[1] = 3
    mask[2], labels[2] = torch.arange(size)[:, None] // (size // 4) + 1, torch.arange(4)[:, None]
    mask[3:6, 1:4] = 255
    mask[6] = 255
    ari, iou = against_mask(labels, mask)
    assert ari[[0, 1, 6]].isnan().all() and iou[[0, 6]].isnan().all() and ari[2] == iou[2] == 1
    assert numbers_of_segments(mask).tolist() == [len(set(m[m < 255].tolist())) for m in mask]
    pixels = labels.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    for i in (1, 2, 3, 4, 5, 7, 8):
        counts = mask[i] < 255  # as if the others had been cut out
        true, found = mask[i][counts], pixels[i][counts]
        fore = true > 0
        if i > 1:
            assert ari[i].item() == pytest.approx(adjusted_rand_score(true[fore], found[fore]))
        best = []
        for value in true[fore].unique():
            others = [found == label for label in found.unique()]
            best.append(
                max(
                    ((o & (true == value)).sum() / (o | (true == value)).sum()).item()
                    for o in others
                )
            )
        assert iou[i].item() == pytest.approx(np.mean(best))


def test_islands_that_are_the_masks_and_one_island_of_all():
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[0, :2, :2], mask[0, 2:, 2:] = 1, 2
    ari, iou = against_mask(mask.long(), mask)
    assert (ari.item(), iou.item()) == (1, 1)
    ari, iou = against_mask(torch.zeros_like(mask).long(), mask)
    assert (ari.item(), iou.item()) == (0, 0.25)


def test_pixels_of_a_grid_that_does_not_divide_the_image():
    found = to_pixels(torch.arange(16).view(4, 4), 14, 15)
    assert found.shape == (14, 15)
    assert found.unique().tolist() == list(range(16))


def test_scores_add_up_over_batches():
    states = torch.randn(7, 16, 2, 3)
    masks = {"parts": torch.randint(4, (7, 8, 8)), "objects": torch.randint(2, (7, 8, 8))}
    once, twice = IslandScores(2), IslandScores(2)
    once.update_states(states, 0.2, masks)
    for rows in (slice(0, 5), slice(5, 7)):
        twice.update_states(states[rows], 0.2, {name: mask[rows] for name, mask in masks.items()})
    for found, expected in zip(twice.compute(), once.compute(), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    labels = segment(states, 0.2)
    for level, found in enumerate(once.compute()):
        assert "objects_ari" not in found  # one object at most
        assert found["parts_ari"] == pytest.approx(
            against_mask(labels[:, level], masks["parts"])[0].mean().item(), abs=1e-6
        )
        sizes = [len(x) for lab in labels[:, level] for x in group(lab)]
        assert found["size"] == pytest.approx(np.mean(sizes))
        assert found["number"] == pytest.approx(len(sizes) / 7)
        assert found["inside"] == pytest.approx(sum(s for s in sizes if s > 1) / (7 * 16))
        assert math.isfinite(found["cosine"])


def test_clusters_are_told_the_number_of_each_mask():
    """Vectors of the parts with a little noise: clusters find the parts at any threshold, and the
    objects, of which there are fewer, when told so."""
    parts = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    objects = (parts > 1).long()
    near = torch.tensor([[1.0, 0, 0], [1, 0.3, 0], [0, 0, 1], [0, 0.3, 1]])  # by part
    noise = 0.01 * torch.randn(2, 16, 1, 3, generator=torch.Generator().manual_seed(0))
    states = near[parts.flatten()][None, :, None] + noise
    masks = {"parts": parts + 1, "objects": objects + 1}
    masks = {name: mask.expand(2, 4, 4).clone() for name, mask in masks.items()}
    masks["objects"][1] = 255  # not known of the second image
    scores = score_states(states, -1, masks, told=True)
    assert scores["number"].tolist() == [[1], [1]]
    for name in ("clustered_parts_ari", "clustered_parts_iou"):
        assert scores[name].tolist() == [[1], [1]]
    assert scores["clustered_objects_ari"][0] == scores["clustered_objects_iou"][0] == 1
    assert scores["objects_iou"][0] == 0.5 and scores["parts_iou"][0] == 0.25
    assert scores["objects_iou"][1].isnan() and scores["clustered_objects_ari"][1].isnan()
    metric = IslandScores(1)
    metric.update_states(states, -1, masks, told=True)
    (level,) = metric.compute()
    assert level["clustered_objects_iou"] == 1 and level["size"] == 16
    assert not [name for name in score_states(states, -1, masks) if "clustered" in name]


def group(labels):
    return [(labels == label).nonzero() for label in labels.unique()]


def test_total_variation_is_the_mean_distance_of_neighbouring_directions():
    torch.manual_seed(0)
    states = torch.randn(2, 12 * 12, 3, 5)
    for image, found in zip(states, total_variation(states), strict=True):
        for level, value in enumerate(found):
            unit = [v / v.norm() for v in image[:, level]]
            pairs = [(i, i + 1) for i in range(144) if i % 12 < 11]
            pairs += [(i, i + 12) for i in range(132)]
            steps = [(unit[i] - unit[j]).norm() for i, j in pairs]
            torch.testing.assert_close(value, torch.stack(steps).mean())
    assert total_variation(states[:, :1]).eq(0).all()  # a single column
    assert total_variation(states[:, :1].expand(-1, 9, -1, -1)).eq(0).all()
