"""Looking into a network from a notebook: numbers against independent ones, and no traces."""

import itertools
import math
import os
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, save_published
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from agglomerator import Agglomerator, find_islands, load_checkpoint
from agglomerator.islands.segments import segment
from agglomerator.util.errors import UserError

NAMES = "CIFAR10", "PhotoParts"  # attention without a radius, and with one


@pytest.fixture(scope="module")
def arrays():
    """Two colour images: smooth colours with a square on them, (2, 80, 80, 3) uint8."""
    y, x = np.mgrid[:80, :80]
    images = np.stack((np.stack((x, y, x + y), -1), np.stack((y, 160 - x, y), -1)))
    images[0, 20:50, 30:70], images[1, 40:75, 10:40] = (250, 20, 20), (20, 20, 250)
    return images.astype(np.uint8)


@pytest.fixture(scope="module", params=NAMES)
def islands(request, arrays):
    return find_islands(load_checkpoint(f"pretrained:{request.param}"), arrays, iters=2)


def test_files_pillow_images_and_arrays_are_the_same_to_it(arrays, tmp_path):
    model = load_checkpoint("pretrained:CIFAR10")
    pillow = [Image.fromarray(image) for image in arrays]
    for i, image in enumerate(pillow):
        image.save(tmp_path / f"{i}.png")
    files = find_islands(model, sorted(tmp_path.glob("*.png")))
    assert files.names == ["0.png", "1.png"] and files.iters == model.settings.n_iters
    for other in (arrays, pillow, torch.from_numpy(arrays).movedim(-1, 1)):
        found = find_islands(model, other)
        assert found.names == ["0", "1"] and torch.equal(found.states, files.states)
        assert all(map(torch.equal, found.images, files.images))
    assert files.images[0].shape == (3, 80, 80)  # its own resolution
    (one,) = find_islands(model, pillow[0], names=["a"], iters=1).names
    assert one == "a"


def test_labels_are_those_of_the_settings_or_of_ones_own(arrays):
    model = load_checkpoint("pretrained:PhotoParts")
    found = find_islands(model, arrays)
    expected = segment(found.states[-1], None, model.settings.island_loss)
    assert model.settings.island_loss and np.array_equal(found.labels(), expected)
    found.loss = 0.3
    assert np.array_equal(found.labels(1), segment(found.states[1], None, 0.3))
    other = find_islands(model, arrays, threshold=0.5)
    for wrong in ({"threshold": 5.0}, {"loss": -1.0}, {"iters": -3}):
        with pytest.raises(UserError, match="must be"):
            find_islands(model, arrays, **wrong)
    assert other.loss is None and np.array_equal(other.labels(), segment(other.states[-1], 0.5))
    assert not np.array_equal(other.labels(), expected)


def test_scores_of_each_image_and_level(arrays):
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[:, :32, :20], masks[:, 40:, 30:] = 1, 2
    model = load_checkpoint("pretrained:PhotoParts")
    found = find_islands(model, arrays, masks={"parts": masks}, threshold=0.9, iters=2)
    scores, labels = found.scores(), found.labels()
    for image, level in itertools.product(range(2), range(2)):
        values, sizes = np.unique(labels[image, level], return_counts=True)
        assert scores["number"][image, level] == len(values)
        assert scores["inside"][image, level] == pytest.approx(1 - (sizes == 1).sum() / 1024)
        large = labels[image, level].repeat(2, 0).repeat(2, 1)
        inside = masks[image] > 0
        ari = adjusted_rand_score(masks[image][inside], large[inside])
        assert scores["parts_ari"][image, level] == pytest.approx(ari)


@pytest.mark.parametrize(
    "mask, name, words",
    [
        (np.zeros((2, 8, 8), int), "part", "name them 'parts' or 'objects'"),
        (np.zeros((1, 8, 8), int), "parts", "of shape (1, 8, 8); give (2, S, S)"),
        (np.zeros((2, 8, 9), int), "parts", "of shape (2, 8, 9)"),
        (np.zeros((8, 8), int), "objects", "of shape (8, 8)"),
        (np.full((2, 8, 8), 256), "parts", "give integers, 0 for background"),
        (np.full((2, 8, 8), -1), "parts", "give integers, 0 for background"),
        (np.zeros((2, 8, 8)), "parts", "give integers, 0 for background"),
    ],
)
def test_masks_of_another_kind_are_refused(arrays, mask, name, words):
    model = load_checkpoint("pretrained:PhotoParts")
    with pytest.raises(UserError) as error:
        find_islands(model, arrays, masks={name: mask})
    assert words in str(error.value) and f"masks['{name}']" in str(error.value)


def test_cosines_with_a_column(islands):
    side = islands.side
    row, place = side - 1, 1
    found = islands.cosines(1, (row, place), t=1)
    vectors = islands.states[1, 1].double().numpy()  # (n, K, d)
    for level in range(vectors.shape[1]):
        own = vectors[row * side + place, level]
        norms = np.linalg.norm(vectors[:, level], axis=1) * np.linalg.norm(own)
        expected = (vectors[:, level] @ own / norms).reshape(side, side)
        np.testing.assert_allclose(found[level], expected, atol=1e-5)


def test_attention_of_a_column_is_the_softmax_of_the_consensus(islands):
    """SPEC: scores q . k / sqrt(d), or cosine over a temperature; -5e-4 with itself; within a
    radius."""
    side, s = islands.side, islands.model.settings
    row, place = 2, 0
    found = islands.attention(0, (row, place), t=1)
    vectors = islands.states[1, 0].double().numpy()
    for level in range(s.levels):
        own, scores = vectors[row * side + place, level], np.full((side, side), -np.inf)
        for y, x in itertools.product(range(side), range(side)):
            if s.local_consensus_radius and math.dist((y, x), (row, place)) > 2:
                continue
            other = vectors[y * side + x, level]
            score = own @ other / np.linalg.norm(other) / math.sqrt(s.patch_dim)
            if s.consensus_temperature is not None:
                score = own @ other / np.linalg.norm(other) / np.linalg.norm(own)
                score /= s.consensus_temperature
            scores[y, x] = -5e-4 if (y, x) == (row, place) else score
        expected = np.exp(scores - scores.max())
        np.testing.assert_allclose(found[level], expected / expected.sum(), atol=2e-5)


def test_figures_show_what_the_arrays_say(islands):
    column = (1, 3)
    figure = islands.draw_agreement(1, column, t=1)
    axes = np.array(figure.axes[: 3 * 3]).reshape(3, 3)
    labels = islands.labels(1)[1]
    both = islands.cosines(1, column, 1), islands.attention(1, column, 1)
    for level in (0, 1):
        for ax, values in zip(axes[1:, level + 1], both, strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), values[level])
        size = (labels[level] == labels[level][column]).sum()
        assert axes[0, level + 1].get_xlabel().startswith(f"its island: {size},")
    assert "iteration 1 of 2" in figure.get_suptitle()
    grid = islands.draw_grid(level=1)
    found = [ax.get_xlabel().split()[0] for ax in grid.axes if ax.get_visible()]
    assert found == [str(len(np.unique(labels[1]))) for labels in islands.labels()]
    assert all(isinstance(ax.collections[0], LineCollection) for ax in grid.axes)
    assert len(islands.draw_levels(t=1).axes) == 2 * 3
    assert len(islands.draw_iterations(1).axes) == 2 * 4


@pytest.mark.parametrize("n_images", [1, 3, 20])
def test_a_grid_of_any_number_of_images(arrays, n_images):
    model = Agglomerator(patch_dim=8, contr_dim=4)  # untrained, for CIFAR-10's input
    found = find_islands(model, [arrays[i % 2] for i in range(n_images)])
    shown = [ax for ax in found.draw_grid().axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == found.names and len(shown) == n_images
    width, height = found.draw_grid().get_size_inches()
    assert width < 10 and height < 10


def test_nothing_is_left_behind(arrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    model = load_checkpoint("pretrained:CIFAR10").train()
    model.contrastive_head.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_islands(model, arrays)
    for figure in (
        found.draw_levels(),
        found.draw_iterations(),
        found.draw_grid(),
        found.draw_agreement(0, (0, 0)),
    ):
        figure.savefig(os.devnull, format="png")
    found.scores()
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(generator) and dict(matplotlib.rcParams) == settings
    assert not plt.get_fignums() and not list(tmp_path.iterdir())


def test_a_figure_shows_itself_in_a_notebook(islands):
    assert islands.draw_grid()._repr_png_().startswith(b"\x89PNG")


def test_equal_colours_in_two_looks(arrays):
    model = load_checkpoint("pretrained:CIFAR10")
    first = find_islands(model, arrays)
    second = find_islands(model, arrays[1:], projection=first.projection)
    np.testing.assert_allclose(second.colours()[0], first.colours()[1], atol=1e-5)
    assert not np.allclose(find_islands(model, arrays[1:]).colours()[0], first.colours()[1])


def test_what_cannot_be_done_is_said(islands, arrays, tmp_path):
    for column in ((0, islands.side), (-1, 0)):
        with pytest.raises(IndexError, match=re.escape(f"column {column} is outside a grid")):
            islands.cosines(0, column)
    with pytest.raises(UserError, match="1 names for 2 images"):
        find_islands(islands.model, arrays, names=["a"])
    with pytest.raises(UserError, match="uint8"):
        find_islands(islands.model, arrays / 255)
    for no_images in [], None, [None], [1, 2]:
        with pytest.raises(UserError, match="takes an image or a list of them"):
            find_islands(islands.model, no_images)
    path = save_published(tmp_path / "p.ckpt", Agglomerator(patch_dim=8, contr_dim=4).state_dict())
    with pytest.raises(UserError, match="dataset="):
        find_islands(load_checkpoint(path), arrays)
    found = find_islands(load_checkpoint(path, dataset="CIFAR10"), arrays)
    assert found.labels().shape == (2, 2, 8, 8)


def test_the_example_of_the_readme_runs_as_in_a_notebook(arrays, tmp_path):
    """Its blocks one after the other, in a fresh process, which has no flags and no window."""
    section = (ROOT / "README.md").read_text().split("\n## Python\n")[1].split("\n## ")[0]
    cells = re.findall(r"(?:^    .*\n|^\n)+", section, re.MULTILINE)
    cells = ["".join(line[4:] for line in cell.splitlines(True)) for cell in cells if cell.strip()]
    assert cells
    (tmp_path / "src").symlink_to(ROOT / "src")
    for name in set(re.findall(r'"([\w-]+\.(?:jpg|png))"', section)):
        Image.fromarray(arrays[0]).save(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    code = "cells = " + repr(cells) + "\nnames = {}\n"
    code += "for cell in cells:\n    exec(compile(cell, 'cell', 'exec'), names)\n"
    code += "import sys\nassert 'absl' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == before
