from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from PIL import Image

from agglomerator.islands.album import Album
from agglomerator.islands.figures import (
    animate,
    draw_iterations,
    draw_levels,
    evenly_spaced,
)
from agglomerator.islands.panels import TINT, outlines, over_photographs
from agglomerator.islands.projection import Projection, to_srgb


@pytest.fixture
def states():
    """(3 times, 2 images, 16 columns, 2 levels, 8)"""
    return torch.randn(3, 2, 16, 2, 8, generator=torch.Generator().manual_seed(0))


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in (ax.xaxis.label, ax.title)]


def test_colours_of_cielab():
    # L* of 60, a* and b* of 0 is the gray 145 of 255 in sRGB.
    assert to_srgb(np.zeros(3)) * 255 == pytest.approx([145, 145, 145], abs=1)
    dark, light = to_srgb(np.array([[-1, 0, 0], [1, 0, 0]]))
    assert np.ptp(dark) < 0.01 and np.ptp(light) < 0.01 and light[0] - dark[0] > 0.5
    blue, yellow = to_srgb(np.array([[0, -0.7, 0], [0, 0.7, 0]]))
    assert blue[2] > blue[:2].max() and yellow[2] < yellow[:2].min()
    green, red = to_srgb(np.array([[0, 0, -0.7], [0, 0, 0.7]]))
    assert green[1] > green[0] and red[0] > red[1]


def test_equal_vectors_have_equal_colours_whenever_and_wherever(states):
    states[2, 1, 5] = 3 * states[0, 0, 9]
    colours = Projection.fit(states[-1]).colours(states)
    assert colours.shape == (3, 2, 2, 4, 4, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    np.testing.assert_allclose(colours[2, 1, :, 1, 1], colours[0, 0, :, 2, 1], atol=1e-6)


def test_main_axis_is_told_by_lightness_and_small_differences_do_not_show(states):
    states = torch.zeros(1, 16, 1, 4)
    states[..., 0], states[:, :8, :, 1], states[:, 8:, :, 1] = 1, 0.5, -0.5
    one, other = Projection.fit(states).colours(states)[0, 0, [0, 3], 0]
    assert abs(one.mean() - other.mean()) > 0.5
    states[..., 1] *= 1e-3
    one, other = Projection.fit(states).colours(states)[0, 0, [0, 3], 0]
    assert abs(one - other).max() < 0.02


def test_a_later_album_of_the_folder_has_the_same_colours(tmp_path, states):
    image = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    colours = []
    for i in range(2):
        figure = Album(tmp_path, 0.8).islands(image, "ab", states + 5 * i).draw_levels()
        panels = [ax.images[0].get_array() for ax in figure.axes]  # of each image: input, levels
        colours.append(np.array([panels[1:3], panels[4:6]]))
        expected = Projection.fit(states[-1]).colours(states[-1] + 5 * i)
        np.testing.assert_allclose(colours[i], expected)
    assert not np.allclose(*colours)


def test_captions_say_how_much_of_the_vectors_colours_show(tmp_path, states):
    states[..., 0, 2:] = 0  # two axes hold all of level 0
    image = torch.zeros(2, 1, 8, 8)
    figure = Album(tmp_path, 0.8).islands(image, "ab", states).draw_levels()
    vectors = torch.nn.functional.normalize(states[-1, :, :, 1].double(), dim=-1).flatten(0, 1)
    squares = torch.linalg.svdvals(vectors - vectors.mean(0)).square()
    share = (squares[:3].sum() / squares.sum()).item()
    shares = Projection.fit(states[-1]).explained_variance(states[-1])
    assert shares[0] == pytest.approx(1, abs=0.03) and shares[1] == pytest.approx(share, abs=0.03)
    assert f"{shares[0]:.0%} at level 0, {shares[1]:.0%} at level 1" in figure.get_supxlabel()
    assert Projection.fit(states[-1]).explained_variance(torch.ones(2, 16, 2, 8)).tolist() == [1, 1]


def test_one_row_an_image_with_outlines_and_numbers():
    labels = torch.tensor([[0, 0], [2, 2]]).expand(2, 3, 2, 2).clone()
    labels[1, 2] = 0
    colours = np.zeros((2, 3, 2, 2, 3))
    figure = draw_levels(torch.zeros(2, 3, 8, 8), ["cat", "dog"], colours, labels, "t", "n")
    assert len(figure.axes) == 2 * 4
    names = [ax.get_ylabel() for ax in figure.axes[::4]]
    assert names == ["cat", "dog"]
    found = texts(figure)
    assert found.count("2 islands") == 5 and found.count("1 island") == 1
    assert "level 0\n(parts)" in found and "level 2\n(whole)" in found
    (outline, _) = (c for c in figure.axes[1].collections if isinstance(c, LineCollection))
    assert [segment.tolist() for segment in outline.get_segments()] == [[[-0.5, 0.5], [1.5, 0.5]]]
    assert not figure.axes[7].collections[0].get_segments()


def cells(lines):
    """The borders of cells that lines lie on, each as (x, y) of its middle."""
    middles = []
    for start, end in lines:
        steps = round(abs(end - start).sum())
        middles += [tuple(start + (end - start) * (i + 0.5) / steps) for i in range(steps)]
    return middles


def test_outlines_are_the_borders_between_islands():
    labels = np.random.default_rng(0).integers(2, size=(9, 9))
    expected = {(x + 0.5, y) for y, x in np.argwhere(labels[:, 1:] != labels[:, :-1])}
    expected |= {(x, y + 0.5) for y, x in np.argwhere(labels[1:] != labels[:-1])}
    found = cells(outlines(labels, 1))
    assert set(found) == expected and len(found) == len(expected)


def test_small_islands_have_no_lines_of_their_own():
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[2, 2] = 1  # a single column
    assert len(cells(outlines(labels, 2))) == 4 and len(outlines(labels, 3)) == 0
    labels[5, 3:7] = range(2, 6)  # four single columns, side by side
    around = {(x, y) for x in range(3, 7) for y in (4.5, 5.5)} | {(2.5, 5), (6.5, 5)}
    assert set(cells(outlines(labels, 3))) == around
    assert len(outlines(np.arange(64).reshape(8, 8), 2)) == 0


@pytest.fixture
def photographs():
    """Two photographs, (3, 90, 90) and (3, 128, 128), and columns 8 x 8 that see left and right."""
    left = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).expand(8, 8)
    states = torch.eye(2)[left.flatten()].expand(2, 64, 2).unsqueeze(2)  # (2, 64, 1, 2)
    draw = torch.Generator().manual_seed(0)
    sizes = (3, 90, 90), (3, 128, 128)
    return [torch.randint(256, size, dtype=torch.uint8, generator=draw) for size in sizes], states


def test_islands_lie_over_photographs(tmp_path, photographs):
    images, states = photographs
    album = Album(tmp_path, 0.8)
    figure = album.islands(images, ["a.jpg", "b.jpg"], states[None]).draw_levels()
    _, first, shown, second = figure.axes
    assert shown.images[0].get_array().shape[:2] == (128, 128)
    colours = album.projection.colours(states)[0, 0, 0, [0, 7]]
    for ax in (first, second):
        picture = ax.images[0].get_array()
        side, border = len(picture), len(picture) * 3 // 8
        halves = picture[:, :border], picture[:, border:]
        assert side >= 256 and side % 8 == 0
        for half, colour in zip(halves, colours, strict=True):
            pale = (half - TINT * colour) / (1 - TINT)
            assert np.ptp(pale) > 0.2 and pale.min() > 0.1 and pale.max() < 0.99
        assert ax.collections[0].get_segments()[0].tolist() == [[2.5, -0.5], [2.5, 7.5]]
        assert ax.images[0].get_extent() == [-0.5, 7.5, 7.5, -0.5]
        assert ax.get_xlabel() == "2 islands"
    assert "Tint" in figure.get_supxlabel() and "cosine of 0.8" in figure.get_supxlabel()


def test_coloured_cells_where_images_are_small_or_columns_few(photographs):
    images, _ = photographs
    assert over_photographs(images, 8) and not over_photographs(images, 7)
    assert not over_photographs([torch.zeros(1, 28, 28), torch.zeros(3, 63, 200)], 16)


def test_true_segments_stand_beside_the_islands(tmp_path, photographs):
    images, states = photographs
    parts = torch.zeros(2, 64, 64, dtype=torch.uint8)
    parts[0, :32, :32], parts[0, 40:, 40:], parts[0, :8, 60:] = 1, 7, 255
    islands = Album(tmp_path, 0.8).islands(images, "ab", states[None], {"parts": parts})
    figure = islands.draw_levels()
    ax, none = figure.axes[2], figure.axes[5]
    assert ax.get_title() == "true parts" and ax.get_xlabel() == "2 segments"
    assert "not scored" in figure.get_supxlabel() and not none.axison
    parts = {"parts": parts.flip(0)}  # none in the first row
    second = Album(tmp_path, 0.8).islands(images, "ab", states[None], parts).draw_levels().axes[2]
    assert second.get_title() == "true parts" and second.get_visible() and not second.axison
    lines = set(cells(ax.collections[0].get_segments()))
    assert {(31.5, 0), (0, 31.5), (39.5, 63), (63, 39.5), (59.5, 0), (63, 7.5)} <= lines
    picture = ax.images[0].get_array()
    places = picture[10:100, 10:100], picture[-90:, -90:], picture[140:155, 20:150]
    one, seven, background = (place.mean((0, 1)) for place in places)
    assert np.ptp(one) > 0.1 and np.ptp(seven) > 0.1 and np.ptp(background) < 0.03
    assert abs(one - seven).max() > 0.1 and picture[:20, -15:].max() < background.mean()


def test_figures_of_every_format(tmp_path, photographs):
    images, states = photographs
    album = Album(tmp_path, 0.8)
    islands = album.islands(images, ["a", "ü$中"], states[None])
    figure = islands.draw_levels()
    written = album.write("x", figure, ("png", "pdf", "svg"), 50)
    before = [path.read_bytes() for path in written]
    assert [path.name for path in written] == ["x.png", "x.pdf", "x.svg"]
    assert before[1].startswith(b"%PDF") and b"/Type3" not in before[1]
    assert b"/Width 256" in before[1]  # photographs keep their pixels
    assert ElementTree.fromstring(before[2]).tag.endswith("svg")
    with Image.open(written[0]) as picture:
        width = picture.width
    figure = islands.draw_levels()
    album.write("x", figure, ("png", "pdf", "svg"), 50)
    assert [path.read_bytes() for path in written] == before
    album.write("x", figure, dpi=100)
    with Image.open(written[0]) as picture:
        assert picture.width == pytest.approx(2 * width, abs=1)


def test_iterations_in_a_row_and_no_more_than_fit():
    labels, colours = torch.zeros(21, 2, 4, 4).long(), np.zeros((21, 2, 4, 4, 3))
    figure = draw_iterations(torch.zeros(1, 8, 8), colours, labels, "t", "n")
    found = texts(figure)
    assert "t = 0" in found and "t = 20" in found and len(figure.axes) == 2 * 9
    assert figure.get_figwidth() < 10
    assert evenly_spaced(3) == [0, 1, 2] and len(evenly_spaced(1000)) == 8


def test_animation_has_the_pictures_in_order(tmp_path):
    paths = []
    for i, colour in enumerate(["red", "lime", "blue"]):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), colour).save(paths[-1])
    paths.insert(1, tmp_path / "other size.png")
    Image.new("RGB", (9, 8)).save(paths[1])
    animate(paths, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 3
        for i, channel in enumerate((0, 1, 2)):
            found.seek(i)
            assert np.argmax(found.convert("RGB").getpixel((4, 4))) == channel
