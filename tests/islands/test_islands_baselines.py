import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch.utils.data import Subset

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.images import ImageSet
from agglomerator.data.module import ImageDataModule
from agglomerator.data.sets.partwhole import CLASSES, PartWhole
from agglomerator.islands.baselines import compare, k_means, most_common
from agglomerator.islands.scores import against_mask
from agglomerator.islands.segments import segment


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


def test_the_table_of_a_network():
    settings = Settings(dataset="PartWhole", patch_dim=8, contr_dim=4, objects=3, head="grid")
    scenes = PartWhole("test", 30, objects=3).arrays()
    images, labels, *masks = scenes
    data = ImageDataModule(settings)
    scenes = ImageSet(images, labels, CLASSES, dict(zip(("parts", "objects"), masks, strict=True)))
    data.test = Subset(scenes, range(30))
    torch.manual_seed(1)
    model = Agglomerator(**vars(settings)).eval()
    rows = {row.pop("of"): row for row in compare(model, data, settings, "cpu", most=30)}
    assert list(rows) == [
        "level 0", "level 1", "level 0, untrained", "level 1, untrained", "tokenizer alone",
        "k-means, true number", "true masks, on this grid",
    ]  # fmt: skip
    images, _ = data.test.dataset[torch.arange(30)]
    parts = torch.as_tensor(data.test.dataset.extra["parts"][:30])
    with torch.no_grad():
        labels = segment(model.states(data.view(images))[-1], settings.island_threshold)
    ari, iou = against_mask(labels[:, 1], parts)
    assert np.isclose(rows["level 1"]["parts_ari"], ari.mean())
    assert np.isclose(rows["level 1"]["parts_iou"], iou.mean())
    ari, _ = against_mask(k_means(images, parts), parts)
    assert np.isclose(rows["k-means, true number"]["parts_ari"], ari.mean())
    assert rows["level 0"]["cosine"] != rows["level 0, untrained"]["cosine"]
    best = rows["true masks, on this grid"]
    assert 0 < best["parts_ari"] < best["objects_ari"] < 1
    assert "number" not in best and "cosine" not in best
