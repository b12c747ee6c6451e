import numpy as np
import pytest
import torch
from scipy import ndimage

from agglomerator.data.sets.partwhole import PartWhole, draw_scene
from agglomerator.islands.scores import against_mask
from agglomerator.islands.segments import count, segment
from agglomerator.training.losses.colour import (
    agreement_loss,
    border_background,
    mean_shift,
    number_patches,
)

RED, BLUE = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.8])


def picture(edge=0.0):
    """A red square on blue, (1, 3, 16, 16), its edge so red; and how red it is."""
    share = torch.zeros(1, 1, 16, 16)
    share[..., 4:12, 4:12] = edge
    share[..., 5:11, 5:11] = 1.0
    return share * RED[:, None, None] + (1 - share) * BLUE[:, None, None], share[:, 0]


def states_of(*labels):
    """Levels of one-hot vectors of labels (1, S, S): (1, n, K, 8)."""
    levels = [torch.nn.functional.one_hot(x.flatten(1).long(), 8).float() for x in labels]
    return torch.stack(levels, 2)


def seeded_generator():
    return torch.Generator().manual_seed(0)


def test_mixed_colours_settle_for_one_side():
    image, share = picture(edge=0.85)
    settled = mean_shift(image)
    ends = torch.stack((RED, BLUE))[:, :, None, None]
    before, after = ((x - ends).norm(dim=1).amin(0).max() for x in (image, settled))
    assert before > 0.15
    assert after < 0.65 * before


def test_a_figure_may_reach_the_border():
    image, share = picture()
    ground = border_background(mean_shift(image))
    assert torch.equal(ground, share == 0)
    image[..., :6, 7:9] = RED[:, None, None]
    share[:, :6, 7:9] = 1
    assert torch.equal(border_background(mean_shift(image)), share == 0)
    assert border_background(torch.zeros(1, 3, 16, 16)).all()


def test_figures_of_scenes_that_touch_the_border_are_found():
    images, _, _, objects = PartWhole("train", size=400, seed=7).arrays()
    true = objects > 0
    ends = true.copy()
    ends[:, 1:-1, 1:-1] = False
    touch = ends.any((1, 2))
    assert touch.sum() > 10
    true, found = true[touch], border_background(mean_shift(torch.from_numpy(images[touch]) / 255))
    found = ~found.numpy()
    fits = (true & found).sum((1, 2)) / (true | found).sum((1, 2))
    assert fits.mean() > 0.8  # 0.66 if all that the border joins is background


def test_a_figure_that_divides_the_background():
    coat = torch.zeros(1, 1, 7, 7)
    coat[..., 2:5] = 1
    assert torch.equal(border_background(coat), coat[:, 0] == 0)


def patches_of(colours):
    """The patches of colours 0 and 1, (S, S), by SciPy: the place of the first column of each."""
    side = len(colours)
    expected = np.empty((side, side), dtype=int)
    for colour in (0, 1):
        patches, n = ndimage.label(colours.numpy() == colour)
        for patch in range(1, n + 1):
            expected[patches == patch] = np.flatnonzero(patches == patch)[0]
    return expected


@pytest.mark.parametrize("side", [1, 2, 7, 16])
def test_patches_and_those_along_the_border(side):
    generator = seeded_generator()
    edge = np.ones((side, side), dtype=bool)
    edge[1:-1, 1:-1] = False
    for colours in (torch.rand(32, side, side, generator=generator) < 0.42).float():
        expected = patches_of(colours)
        assert np.array_equal(number_patches(colours[None, None])[0].numpy(), expected)
        both = expected, expected[edge]
        sizes, ends = (np.bincount(x.ravel(), minlength=side**2) for x in both)
        small = (sizes <= side**2 / 16) & (ends > 0)
        ground = (small | (ends >= 1.5 * np.sqrt(sizes)))[expected]
        assert np.array_equal(border_background(colours[None, None])[0].numpy(), ground)


@pytest.mark.parametrize("side", [16, 63])
def test_a_patch_follows_the_longest_path(side):
    wall = torch.ones(side, side)
    wall[1:-1:2, 1:-1] = 0
    turns = torch.arange(2, side - 2, 2)
    wall[turns, torch.where(turns % 4 == 0, 1, side - 2)] = 0
    assert np.array_equal(number_patches(wall[None, None])[0].numpy(), patches_of(wall))


def test_loss_is_least_for_patches_below_and_figures_on_top():
    image, share = picture()
    image[..., 5:11, 8:11] = torch.tensor([0.1, 0.9, 0.1])[:, None, None]
    figure = share == 1
    patches = figure.int()
    patches[..., 8:11] *= 2
    right = agreement_loss(states_of(patches, figure), image, seeded_generator())
    wrong = {
        "all alike": states_of(figure * 0, figure * 0),
        "reversed": states_of(figure, patches),
        "patches on top": states_of(patches, patches),
        "one by one": torch.eye(256)[None, :, None].expand(-1, -1, 2, -1),
    }
    for name, states in wrong.items():
        assert agreement_loss(states, image, seeded_generator()) > 1.5 * right, name


def test_a_single_column_has_nothing_to_agree_with():
    states = torch.randn(2, 1, 3, 6, requires_grad=True)
    agreement_loss(states, torch.rand(2, 3, 8, 8), seeded_generator()).backward()
    torch.testing.assert_close(states.grad, torch.zeros_like(states), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32)])
def test_any_images_and_grid(channels, side):
    states = torch.randn(2, 49, 3, 6, requires_grad=True)
    agreement_loss(states, torch.rand(2, channels, side, side), seeded_generator()).backward()
    assert states.grad.isfinite().all()
    assert states.grad.abs().sum((0, 1, 3)).min() > 0  # every level learns


def test_columns_that_follow_the_loss_become_parts_and_object():
    scenes = [draw_scene(0, index) for index in (4, 11)]
    colours = torch.stack([torch.from_numpy(scene.image) for scene in scenes]) / 255
    parts = torch.stack([torch.from_numpy(scene.parts) for scene in scenes])
    torch.manual_seed(0)
    states = torch.randn(2, 1024, 2, 8, requires_grad=True)
    optimizer = torch.optim.Adam([states], lr=0.1)
    generator = seeded_generator()
    for _ in range(80):
        optimizer.zero_grad()
        agreement_loss(states, colours, generator).backward()
        optimizer.step()
    found = segment(states.detach(), 0.8)
    lowest, highest = against_mask(found[:, 0], parts)[0], against_mask(found[:, 1], parts > 0)[1]
    assert lowest.min() > 0.8
    assert highest.mean() > 0.7
    for n_islands in count(found)[0]:
        assert n_islands[0] > n_islands[1]
