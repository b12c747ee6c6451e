import hashlib
from itertools import pairwise

import numpy as np
import pytest
from torch.utils.data import DataLoader

from agglomerator.data.sets.partwhole import CLASSES, PartWhole, draw_scene
from agglomerator.data.sets.partwhole_objects import OBJECTS, PARTS


def digest(*scenes):
    sha = hashlib.sha256()
    for scene in scenes:
        for array in (scene.image, scene.parts, scene.objects):
            sha.update(array.tobytes())
        sha.update(repr((scene.label, scene.part_names)).encode())
    return sha.hexdigest()


def scenes(n, **settings):
    return [draw_scene(7, i, **settings) for i in range(n)]


# The drawn pixels are promised to be the same everywhere: a change here is a new data set.
@pytest.mark.parametrize(
    ("settings", "golden"),
    [
        ({"difficulty": 0}, "e5fd00b01e9b1e21e803b2a3ff55152cace4853c22e9cf8c586c7a6a70c3b455"),
        ({}, "69880d658dca568ba407d52b9dbf856f6874580cbd09fe17871355516410e490"),
        (
            {"difficulty": 2, "objects": 4, "image_size": 64},
            "f8c271e548ed1eb291f3feb3d0d1409222d550a6962d7041c8711eece634c1c8",
        ),
    ],
)
def test_pixels_are_the_same_on_every_machine(settings, golden):
    assert digest(*scenes(10, **settings)) == golden


def test_scene_does_not_depend_on_order_or_workers():
    data = PartWhole("train", size=12, seed=3, difficulty=2, objects=2)
    backwards = [digest(data[i]) for i in reversed(range(12))][::-1]
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    assert [digest(scene) for batch in loader for scene in batch] == backwards
    assert len(set(backwards)) == 12


@pytest.mark.parametrize("difficulty", [0, 1, 2])
@pytest.mark.parametrize("objects", [1, 6])
def test_masks_agree(difficulty, objects):
    for scene in scenes(50, difficulty=difficulty, objects=objects, image_size=48):
        assert scene.image.shape == (3, 48, 48)
        assert scene.parts.shape == scene.objects.shape == (48, 48)
        assert scene.image.dtype == scene.parts.dtype == scene.objects.dtype == np.uint8
        assert np.array_equal(scene.parts > 0, scene.objects > 0)
        parts = np.setdiff1d(scene.parts, 0)
        assert np.array_equal(parts, np.arange(1, len(scene.part_names) + 1))
        numbers = np.setdiff1d(scene.objects, 0)
        assert np.array_equal(numbers, np.arange(1, len(numbers) + 1))
        for part in parts:
            assert len(np.unique(scene.objects[scene.parts == part])) == 1
        allowed = {row[0] for row in OBJECTS[CLASSES[scene.label]]}
        for part in np.unique(scene.parts[scene.objects == 1]):
            assert scene.part_names[part - 1] in allowed


def test_plain_scene_shows_every_part_of_its_class():
    """Also at the default 32 x 32: nothing is too small to be seen."""
    for scene in scenes(100, difficulty=0):
        drawn = sorted(row[0] for row in OBJECTS[CLASSES[scene.label]])
        assert sorted(scene.part_names) == drawn
        rows, columns = np.nonzero(scene.objects)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 >= 0.6 * 32


def test_classes_are_balanced_and_every_part_occurs():
    drawn = scenes(10 * len(CLASSES))
    labels = [scene.label for scene in drawn]
    assert np.array_equal(np.bincount(labels), np.full(len(CLASSES), 10))
    assert {name for scene in drawn for name in scene.part_names} == set(PARTS)


def test_colours_tell_parts_apart_but_not_what_they_are():
    roofs = []
    for scene in scenes(100, difficulty=0, image_size=64):
        parts = range(len(scene.part_names) + 1)
        colours = np.array([np.median(scene.image[:, scene.parts == i], axis=1) for i in parts])
        apart = np.linalg.norm(colours[:, None] - colours, axis=2) + 999 * np.eye(len(colours))
        assert apart.min() > 25
        if "roof" in scene.part_names:
            roofs.append(colours[1 + scene.part_names.index("roof")])
    assert (np.std(roofs, axis=0) > 40).all()


def test_image_size_changes_the_raster_and_not_the_scene():
    for fine, coarse in zip(scenes(20, image_size=96), scenes(20, image_size=32), strict=True):
        assert fine.label == coarse.label
        centres = fine.objects[1::3, 1::3]  # the same points in the scene
        assert np.mean(centres != coarse.objects) < 0.002


def test_train_and_test_share_no_scene():
    train = {digest(scene) for scene in map(PartWhole("train", size=200).__getitem__, range(200))}
    test = {digest(scene) for scene in map(PartWhole("test", size=200).__getitem__, range(200))}
    assert len(train) == len(test) == 200
    assert not train & test
    assert len(PartWhole("train")) == 20000
    assert len(PartWhole("test")) == 4000


def test_difficulty_adds_clutter_and_hides_parts():
    def busyness(scene):  # variation of the image where no object is
        rows, columns = np.nonzero(scene.objects == 0)
        return scene.image[:, rows, columns].std(axis=1).mean()

    drawn = [scenes(100, difficulty=difficulty) for difficulty in range(3)]
    busy = [np.mean([busyness(scene) for scene in some]) for some in drawn]
    seen = [sum(len(scene.part_names) for scene in some) for some in drawn]
    area = [np.mean([(scene.objects > 0).mean() for scene in some]) for some in drawn]
    assert all(easier + 10 < harder for easier, harder in pairwise(busy))
    assert seen[1] > seen[2]
    assert area[0] > area[1] > area[2] > 0.15


def test_several_objects():
    drawn = scenes(100, objects=4, image_size=64)
    counts = [scene.objects.max() for scene in drawn]
    assert set(counts) == {1, 2, 3, 4}
    for scene in drawn:
        areas = np.bincount(scene.objects.ravel())[1:]
        assert areas[0] > 0.5 * areas.max()


def test_arrays_hold_the_scenes_in_order():
    data = PartWhole("test", size=15, seed=1, image_size=28)
    images, labels, parts, objects = data.arrays()
    assert images.shape == (15, 3, 28, 28)
    for i, scene in enumerate(data):
        assert np.array_equal(images[i], scene.image)
        assert labels[i] == scene.label
        assert np.array_equal(parts[i], scene.parts)
        assert np.array_equal(objects[i], scene.objects)


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("split", "validation", "train, test"),
        ("size", 0, "from 1"),
        ("seed", -1, "from 0"),
        ("image_size", 27, "from 28 to 128"),
        ("image_size", 32.0, "from 28 to 128"),
        ("difficulty", 3, "from 0 to 2"),
        ("objects", 10, "from 1 to 9"),
    ],
)
def test_invalid_argument_is_named(argument, value, allowed):
    with pytest.raises(ValueError, match=f"^{argument}={value!r} .*{allowed}"):
        PartWhole(**{argument: value})
