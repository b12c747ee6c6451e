import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from agglomerator import Agglomerator
from agglomerator.data.sets.moving import draw_clip
from agglomerator.islands.segments import segment
from agglomerator.islands.tracks import follow
from agglomerator.islands.video import best_possible, colours_of, draw_frames, rows_of, score, watch
from agglomerator.util.errors import UserError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Agglomerator(image_size=16, conv_image_size=8, patch_dim=8, contr_dim=8, iters=2).eval()


@pytest.mark.parametrize("carry", [True, False])
def test_the_state_is_carried_on_or_begins_anew(model, carry):
    frames = list(torch.randn(4, 2, 3, 16, 16))
    names, labels = watch(model, frames, carry, threshold=0.9)
    assert names.shape == labels.shape == (2, 2, 4, 8, 8)
    state = None
    for t, views in enumerate(frames):
        with torch.no_grad():
            last = model.states(views, iters=2, levels=state)[-1]
        state = last if carry else None
        assert torch.equal(labels[:, :, t], segment(last, 0.9))
    assert torch.equal(names[1, 0], follow(labels[1, 0]))
    row = rows_of(names, "carried on")[1]
    assert row["of"] == "level 1, carried on"
    assert row["number"] == np.mean([len(x.unique()) for x in names[:, 1].flatten(0, 1)])


def test_states_that_are_not_finite_are_told(model):
    frames = list(torch.randn(2, 1, 3, 16, 16))
    frames[1][:] = torch.inf
    with pytest.raises(UserError, match="--video: the states are not finite from frame 1 on"):
        watch(model, frames)


def test_following_true_segments_scores_one_and_naming_by_frame_less():
    clips = [draw_clip(0, i, 5, objects=4) for i in range(3)]
    masks = {
        kind: torch.from_numpy(np.stack([getattr(clip, kind) for clip in clips])).long()
        for kind in ("parts", "objects")
    }
    both = torch.stack((masks["parts"], masks["objects"]), 1)
    rows = score(both, both, masks)
    assert rows[0] == {"parts_ari": 1, "parts_iou": 1, "parts_ari_of_frames": 1}
    assert rows[1] == {"objects_ari": 1, "objects_iou": 1, "objects_ari_of_frames": 1}
    by_frame = both * 5 + torch.arange(5)[:, None, None]
    found = score(by_frame, both, masks)[0]
    expected = [
        adjusted_rand_score(mask[mask > 0], names[mask > 0])
        for mask, names in zip(masks["parts"], by_frame[:, 0], strict=True)
    ]
    assert found["parts_ari"] == pytest.approx(np.mean(expected)) and found["parts_ari"] < 0.6
    assert found["parts_ari_of_frames"] == 1
    best = best_possible(masks, 32)
    assert best["parts_ari"] > 0.95 and best["objects_ari"] > 0.95
    assert best_possible(masks, 8)["parts_ari"] < best["parts_ari"]


def test_an_island_has_its_colour_in_all_frames():
    colours = colours_of(np.arange(40))
    assert colours.min() >= 0 and colours.max() <= 1
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 9 * np.eye(40)
    assert np.diag(apart, 1).min() > 0.3 and apart.min() > 0.02
    names = torch.randint(0, 9, (1, 2, 3, 8, 8))
    shown = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
    figures = list(draw_frames(shown, ["clip"], names, "Title", "Note"))
    assert [figure.get_suptitle() for figure in figures] == [
        f"Title, frame {t} of 3" for t in (1, 2, 3)
    ]
    for t, figure in enumerate(figures):
        panel = figure.axes[1].images[0].get_array()
        np.testing.assert_allclose(panel, colours[names[0, 0, t].numpy()])
