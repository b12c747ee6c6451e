import hashlib

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from agglomerator.data.sets.moving import draw_clip
from agglomerator.data.sets.partwhole import CLASSES, draw_scene


# The drawn pixels are promised to be the same everywhere.
def test_pixels_are_the_same_on_every_machine():
    sha = hashlib.sha256()
    for i in range(5):
        clip = draw_clip(7, i, 6, difficulty=2, objects=3)
        for array in (clip.images, clip.parts, clip.objects):
            sha.update(array.tobytes())
    assert sha.hexdigest() == "a8ed89f59ba31610dd3fafcb05ac4f5fc25ade22c019ed6b4c65a06aa8372c37"


@pytest.mark.parametrize("difficulty", [0, 2])
def test_the_first_frame_is_the_scene(difficulty):
    for i in range(10):
        scene = draw_scene(3, i, 32, difficulty, 2)
        clip = draw_clip(3, i, 5, 32, difficulty, 2)
        assert np.array_equal(clip.images[0], scene.image) and clip.label == scene.label
        for of_clip, of_scene in ((clip.parts, scene.parts), (clip.objects, scene.objects)):
            pairs = set(zip(of_clip[0].ravel().tolist(), of_scene.ravel().tolist(), strict=True))
            assert len(pairs) == len(np.unique(of_scene)) == len(np.unique(of_clip[0]))
        alone = draw_clip(3, i, 1, 32, difficulty, 2)
        assert np.array_equal(alone.parts[0], scene.parts) and alone.part_names == scene.part_names


def test_parts_move_by_the_steps_that_are_told():
    """Of a part that nothing hides, the middle of its pixels moves so."""
    checked = 0
    for i in range(20):
        clip = draw_clip(0, i, 12, image_size=96, difficulty=0)
        assert clip.steps.shape == (11, len(clip.part_names), 2)
        sizes = np.stack([(clip.parts == p + 1).sum((1, 2)) for p in range(len(clip.part_names))])
        whole = np.ptp(sizes, axis=1) < 0.05 * sizes.max(1)  # it is seen whole all the time
        for p in np.flatnonzero(whole):
            middles = [np.argwhere(frame == p + 1).mean(0)[::-1] for frame in clip.parts]
            moved, told = np.array(middles[1:]) - middles[0], clip.steps[:, p].cumsum(0)
            np.testing.assert_allclose(moved, told, atol=1.2)
            checked += 1
    assert checked >= 20


def test_objects_move_and_stay_and_the_background_stands_still():
    shifts = []
    for i in range(0, len(CLASSES), 3):
        clip = draw_clip(1, i, 20, image_size=64, difficulty=1)
        assert (clip.objects == 1).sum((1, 2)).min() > 0.05 * 64**2
        never = (clip.objects == 0).all(0)
        inside = binary_erosion(never, iterations=3)  # without smooth edges
        assert np.ptp(clip.images[:, :, inside].astype(int), axis=0).max(initial=0) <= 1
        lengths = np.linalg.norm(clip.steps, axis=-1) * 32 / 64
        assert 0.1 < lengths.mean() < 3
        shifts.append(np.linalg.norm(clip.steps[:20].sum(0), axis=-1).max())
    assert max(shifts) > 8
    with pytest.raises(ValueError, match="image_size"):
        draw_clip(0, 0, 2, image_size=8)
