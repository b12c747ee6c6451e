import torch
import torch.nn.functional as F

from agglomerator.data import composites
from agglomerator.data.crops import random_affine, random_colours, random_crops, random_views

SIDE, SIZE = 8, 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def two_halves(n=6):
    """Images red on the left and blue on the right, and vectors that agree within the halves."""
    colours = torch.zeros(n, 3, SIZE, SIZE)
    colours[:, 0, :, : SIZE // 2] = colours[:, 2, :, SIZE // 2 :] = 1
    left = (torch.arange(SIDE) < SIDE // 2).float().expand(n, SIDE, SIDE)
    return colours, torch.stack((left, 1 - left), 1)


def test_an_island_is_what_agrees_with_a_column():
    _, vectors = two_halves()
    found = composites.island_or_blob(vectors, SIZE, generator(), (0.1, 0.6))
    left = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    left[:, : SIZE // 2] = True
    # Cosines are interpolated, so that columns on either side of the border are shared.
    far = torch.ones(SIZE, dtype=torch.bool)
    far[SIZE // 2 - 2 : SIZE // 2 + 2] = False
    sides = [torch.equal(each[:, far], left[:, far]) for each in found]
    others = [torch.equal(each[:, far], ~left[:, far]) for each in found]
    assert all(a or b for a, b in zip(sides, others, strict=True))
    assert any(sides) and any(others)


def test_an_island_of_all_or_nothing_becomes_a_blob():
    alike = F.normalize(torch.ones(40, 4, SIDE, SIDE), dim=1)
    areas = composites.island_or_blob(alike, SIZE, generator(), (0.04, 0.6)).float().mean((1, 2))
    assert (areas < 0.9).all() and (areas > 0.02).float().mean() > 0.9


def test_figures_lie_on_the_ground_of_another_image():
    colours = torch.rand(6, 3, 1, 1).expand(-1, -1, SIZE, SIZE).contiguous()
    _, vectors = two_halves()
    images, figures = composites.with_figures(colours, vectors, generator())
    assert images.dtype == torch.uint8 and set(figures.unique().tolist()) == {0, 1}
    for image, figure in zip(images.float(), figures == 1, strict=True):
        edge = F.max_pool2d(figure[None].float(), 3, 1, 1)[0] - figure.float()
        inner = ~F.max_pool2d((~figure)[None].float(), 3, 1, 1)[0].bool()
        outer = ~(figure | (edge > 0))
        for region in (inner, outer):  # of one colour each: they come from one image
            assert image[:, region].std(1).max() < 1
        assert (image[:, inner].mean(1) - image[:, outer].mean(1)).abs().max() > 5


def test_pieces_are_numbered_where_they_were_pasted():
    colours, vectors = two_halves()
    images, pieces = composites.with_pieces(colours, vectors, generator())
    assert images.shape == colours.shape
    assert pieces.unique().tolist()[0] == 0 and pieces.max() <= composites.PASTED
    # What was not pasted on keeps its two colours.
    for image, piece in zip(images.float(), pieces, strict=True):
        left = image[:, :, : SIZE // 2][:, piece[:, : SIZE // 2] == 0]
        assert left.shape[1] == 0 or left.std(1).max() < 1


def test_regions_of_a_mosaic_come_from_their_crop():
    colours = torch.rand(6, 3, 1, 1).expand(-1, -1, SIZE, SIZE).contiguous()
    images, pieces = composites.mosaics(colours, generator())
    for image, piece in zip(images.float(), pieces, strict=True):
        assert len(piece.unique()) > 1
        for number in piece.unique():
            region = image[:, piece == number]
            assert region.shape[1] == 1 or region.std(1).max() < 1


def test_composites_are_a_function_of_the_seed():
    colours, vectors = two_halves()
    levels = torch.stack((vectors, vectors))
    one, same, other = (composites.compose(colours, levels, generator(seed)) for seed in (0, 0, 1))
    assert len(one[0]) == 2 * len(colours)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert len(composites.compose(colours[:1], levels[:, :1], generator())[0]) == 2


def test_affine_views_turn_resize_and_shift_but_do_not_mirror():
    """Of a ramp from left to right the slope stays positive, and close to what it was."""
    ramp = torch.linspace(0, 248, 32).round().to(torch.uint8).expand(500, 1, 32, 32).contiguous()
    before = ramp.clone()
    views = random_affine(ramp, generator()).float()
    assert ramp.equal(before) and views.shape == ramp.shape
    middle = views[:, 0, 8:24, 8:24]
    across, along = middle.diff(dim=2).mean((1, 2)) / 8, middle.diff(dim=1).mean((1, 2)) / 8
    assert 0.7 < across.min() < 0.9 and 1.1 < across.max() < 1.4
    assert 0.05 < along.abs().max() < 0.25 and along.min() < 0 < along.max()
    moved = (middle.mean((1, 2)) - before[0, 0, 8:24, 8:24].float().mean()) / 8
    assert 1.5 < moved.abs().max() < 3.5


def test_views_do_not_change_their_input_and_differ():
    images = torch.randint(256, (4, 3, SIZE, SIZE), generator=generator(), dtype=torch.uint8)
    before = images.clone()
    views = random_views(images, generator())
    assert views.dtype == torch.uint8 and views.shape == images.shape
    assert torch.equal(images, before) and not torch.equal(views, images)
    gray = random_views(images[:, :1], generator())
    assert gray.shape == (4, 1, SIZE, SIZE)


def test_crops_show_a_part_of_the_image():
    ramp = torch.linspace(0, 1, SIZE).expand(8, 1, SIZE, SIZE)
    crops = random_crops(ramp, generator(), (0.5, 0.5), 0.0)
    spans = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    assert (spans < 0.75).all() and (spans > 0.3).all()


def test_colours_stay_within_bounds_and_keep_structure():
    colours = torch.rand(8, 3, SIZE, SIZE, generator=generator())
    changed = random_colours(colours, generator())
    assert changed.min() >= 0 and changed.max() <= 1
    gray, before = (x.mean(1).flatten(1) for x in (changed, colours))
    assert all(
        torch.corrcoef(torch.stack(pair))[0, 1] > 0.7 for pair in zip(gray, before, strict=True)
    )
