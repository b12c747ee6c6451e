import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from agglomerator import Agglomerator
from agglomerator.commands.report import island_lines
from agglomerator.config import Settings
from agglomerator.data.images import ImageSet
from agglomerator.data.masks import MASKS, MaskedImages, of_training
from agglomerator.data.sets.partwhole import CLASSES, PartWhole
from agglomerator.islands import baselines
from agglomerator.islands.baselines import (
    PositionPrior,
    compare,
    graph_segments,
    k_means,
    most_common,
    superpixels,
)
from agglomerator.islands.clusters import cluster
from agglomerator.islands.scores import PositionShare, against_mask, numbers_of_segments
from agglomerator.islands.segments import segment
from agglomerator.util.errors import UserError


def test_k_means_finds_segments_of_one_colour():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0, :, :8], image[1, 9:, 8:] = 255, 255
    mask = (image[0] > 0).byte() + 2 * (image[1] > 0).byte()
    found = k_means(image[None], mask[None])
    assert adjusted_rand_score(mask.flatten(), found.flatten()) == 1


def test_k_means_of_fewer_colours_than_segments_and_in_gray():
    mask = torch.arange(64).view(1, 8, 8)
    assert k_means(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), mask).shape == (1, 8, 8)


def test_most_common_value_of_each_cell():
    mask = torch.tensor([[[1, 1, 0, 2], [1, 3, 0, 0], [2, 2, 5, 5], [2, 2, 5, 4]]])
    assert most_common(mask, 2).tolist() == [[[1, 0], [2, 5]]]
    assert most_common(mask, 2, background=False).tolist() == [[[1, 2], [2, 5]]]
    assert not most_common(torch.zeros(1, 4, 4), 2, background=False).any()


def test_most_common_leaves_out_what_counts_nowhere():
    mask = torch.tensor([[[255, 255, 0, 2], [255, 3, 255, 0], [255, 255, 5, 5], [255, 255, 0, 0]]])
    assert most_common(mask, 2).tolist() == [[[3, 0], [0, 0]]]
    assert most_common(mask, 2, background=False).tolist() == [[[3, 2], [0, 5]]]
    assert not most_common(torch.full((1, 4, 4), 255), 2).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("segment", [graph_segments, superpixels])
def test_segments_follow_edges_in_colour_and_in_gray(segment, channels):
    image = torch.zeros(2, channels, 64, 64, dtype=torch.uint8)
    image[0, 0, :, 32:], image[1, 0, 20:] = 250, 250
    found = segment(image)
    assert found.shape == (2, 64, 64) and found.dtype == torch.int64
    assert (found[0, :, 31] != found[0, :, 32]).all()
    assert (found[1, 19] != found[1, 20]).all()
    assert found.amin() == 0 and found.amax() < 20


def test_position_alone_knows_where_segments_lay():
    masks = np.zeros((10, 8, 8), np.uint8)
    masks[:, 2:6, 1:4], masks[:, 2:6, 4:7] = 1, 2
    masks[:3, 0] = 3  # rare
    masks[:, 7], masks[:4, 2] = 255, 255
    prior = PositionPrior(masks)
    true = np.zeros((3, 8, 8), np.uint8)
    true[0, 2:6, 1:4], true[0, 2:6, 4:7] = 7, 9
    true[1, :2], true[1, 2] = 1, 255
    found = prior(torch.from_numpy(true))
    assert found.shape == (3, 8, 8)
    assert [len(each.unique()) for each in found] == [3, 2, 2]  # with the background
    assert (found[0] > 0).equal(found[1] > 0) and (found[1] > 0).sum() == 24
    ari, iou = against_mask(found[:1], torch.from_numpy(true[:1]))
    assert ari == iou == 1
    nothing = PositionPrior(np.full((2, 4, 4), 255, np.uint8))
    assert not nothing(torch.ones(1, 4, 4)).any()


def table_of(settings, scenes, training_masks=None):
    images, labels, *masks = scenes
    masks = dict(zip(MASKS, masks, strict=True))
    rows = range(len(images))
    truth = MaskedImages(ImageSet(images, labels, CLASSES), masks, rows, settings)
    torch.manual_seed(1)
    model = Agglomerator(**vars(settings)).eval()
    found = compare(model, truth, settings, "cpu", training_masks)
    return model, truth, found, {row.pop("of"): row for row in found["rows"]}


SETTINGS = dict(dataset="PartWhole", patch_dim=8, contr_dim=4, objects=3, head="grid")


def test_the_table_of_a_network():
    settings = Settings(**SETTINGS)
    scenes = PartWhole("test", 30, objects=3).arrays()
    prior = of_training(settings, 20)
    model, truth, table, rows = table_of(settings, scenes, prior)
    assert list(rows) == [
        "level 0", "level 1", "level 0, untrained", "level 1, untrained", "tokenizer alone",
        "position alone, true number", "Felzenszwalb", "SLIC, 16 segments", "k-means, true number",
        "grid of 4x4", "true masks, on this grid",
    ]  # fmt: skip
    assert table["images"] == table["clustered"] == 30
    assert table["masks"] == {"parts": 30, "objects": 30}
    ((images, masks),) = truth.batches(30)
    parts = masks["parts"]
    with torch.no_grad():
        states = model.states(truth.view(images))[-1]
    ari, iou = against_mask(segment(states, settings.island_threshold)[:, 1], parts)
    level = rows["level 1"]
    assert np.isclose(level["parts_ari"], ari.mean())
    assert np.isclose(level["parts_iou"], iou.mean())
    (labels,) = cluster(states, [numbers_of_segments(parts)])
    ari, iou = against_mask(labels[:, 1], parts)
    assert np.isclose(level["clustered_parts_ari"], ari.mean())
    assert np.isclose(level["clustered_parts_iou"], iou.mean())
    share = PositionShare()
    share.update(states)
    assert np.isclose(level["position"], share.compute()[1])
    for name, labels in {
        "k-means, true number": k_means(images, parts),
        "position alone, true number": PositionPrior(prior["parts"])(parts),
        "Felzenszwalb": graph_segments(images),
        "SLIC, 16 segments": superpixels(images),
    }.items():
        assert np.isclose(rows[name]["parts_ari"], against_mask(labels, parts)[0].mean()), name
        assert not {"number", "cosine", "position"} & rows[name].keys()
    assert level["cosine"] != rows["level 1, untrained"]["cosine"]
    best = rows["true masks, on this grid"]
    assert 0 < best["parts_ari"] < best["objects_ari"] < 1


def test_the_table_does_not_depend_on_the_size_of_batches(monkeypatch):
    settings = Settings(**SETTINGS)
    scenes = PartWhole("test", 7, objects=3).arrays()
    *_, one = table_of(settings, scenes)
    assert "position alone, true number" not in one
    monkeypatch.setattr(baselines, "BATCH", 3)
    *_, other = table_of(settings, scenes)
    for name, row in one.items():
        assert other[name] == pytest.approx(row, rel=1e-4), name


def test_clusters_of_the_first_images_where_they_would_take_long(monkeypatch):
    settings = Settings(**SETTINGS)
    scenes = PartWhole("test", 7, objects=3).arrays()
    first = [array[:5] for array in scenes]
    *_, expected = table_of(settings, first)
    monkeypatch.setattr(baselines, "BATCH", 3)
    monkeypatch.setattr(baselines, "MOST_PAIRS", 5 * settings.n_columns**2)
    *_, table, rows = table_of(settings, scenes)
    assert (table["images"], table["clustered"]) == (7, 5)
    for key in ("clustered_parts_ari", "clustered_objects_iou"):
        assert rows["level 0"][key] == pytest.approx(expected["level 0"][key], rel=1e-4)
    assert rows["level 0"]["parts_ari"] != pytest.approx(expected["level 0"]["parts_ari"])
    said = "\n".join(island_lines({"threshold": 0.8} | table | {"rows": [{"of": "x"}]}))
    assert "segments, of the first 5 images" in said and "parts of 7, objects of 7" in said


def test_states_that_are_not_finite_are_told():
    settings = Settings(**SETTINGS)
    images, labels, *masks = PartWhole("test", 2, objects=3).arrays()
    truth = MaskedImages(ImageSet(images, labels, CLASSES), {"parts": masks[0]}, range(2), settings)
    model = Agglomerator(**vars(settings))
    model.wl.data.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        compare(model, truth, settings, "cpu")


def test_numbers_of_segments_do_not_matter():
    settings = Settings(**SETTINGS)
    images, labels, parts, objects = PartWhole("test", 6, objects=3).arrays()
    larger = np.where((parts > 0) & (parts < 255), parts + 200, parts).astype(np.uint8)
    few, many = (table_of(settings, (images, labels, x, objects))[3] for x in (parts, larger))
    assert larger.max() > 100 and many == few


def test_the_tokenizer_alone_in_any_precision():
    settings = Settings(**SETTINGS)
    images, labels, *masks = PartWhole("test", 4, objects=3).arrays()
    truth = MaskedImages(ImageSet(images, labels, CLASSES), dict(zip(MASKS, masks, strict=True)),
                         range(4), settings)  # fmt: skip
    model = Agglomerator(**vars(settings)).eval().bfloat16()
    rows = {row["of"]: row for row in compare(model, truth, settings, "cpu")["rows"]}
    assert 0 < rows["tokenizer alone"]["clustered_parts_ari"] < 1
