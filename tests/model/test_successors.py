"""What the successors of the published model added. Their equations inside the whole network are
compared with the transcription in test_model.py."""

import math

import pytest
import torch

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.model.agreement_attention import AgreementAttention
from agglomerator.model.heads import WindowSum
from agglomerator.model.masked import MaskedPatches
from agglomerator.training.losses.masked import hidden_pixel_loss, level_cosine_loss
from agglomerator.util.errors import UserError
from agglomerator.util.random import seeded_generator

SMALL = dict(image_size=16, conv_image_size=4, patch_dim=8, contr_dim=5, n_classes=3, dropout=0.0)
MASKED = SMALL | dict(pretraining="masked", head="mean")

# What cannot work: the flag that the message begins with, and a way out that it names.
REFUSED = {
    "windows": (dict(head="dissimilarity", patch_size=4), "--head=dissimilarity", "--head=grid"),
    "masked head": (dict(pretraining="masked"), "--head=flatten", "--head=mean"),
    "patches": (
        dict(pretraining="masked", head="mean", image_size=30), "--image_size=30", "=28",
    ),
    "no iteration": (dict(pretraining="masked", head="mean", iters=0), "--iters=0", "--iters=1"),
    "islands": (
        dict(pretraining="masked", head="mean", agreement=2.0), "--agreement=2.0", "--agreement=0",
    ),
    "cosines": (dict(level_cosine=1.0), "--level_cosine=1.0", "--pretraining=masked"),
    "prototypes": (dict(pretraining="masked", head="mean", prototypes=True), "--prototypes",
                   "--pretraining=masked"),
    "consensus": (dict(consensus="agree"), "--consensus=agree", "agreement_repel"),
}  # fmt: skip


@pytest.mark.parametrize("values, flag, way_out", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(values, flag, way_out):
    with pytest.raises(UserError) as error:
        Settings(**values)
    message = str(error.value)
    assert message.startswith(f"{flag}: ") and way_out in message and "\n" not in message


def test_weights_of_a_fresh_network_add_up_to_one():
    for consensus, weights in (("published", [0.25] * 4), ("agreement", [0.2] * 5)):
        model = Agglomerator(**SMALL, consensus=consensus)
        assert [getattr(model, n).item() for n in model.mixing_names] == pytest.approx(weights)
        assert model.received.flatten().tolist() == [len(weights), len(weights) - 1]


@pytest.mark.parametrize("grid_size", [5, 16, 17])
@pytest.mark.parametrize("repel", [False, True])
def test_agreement_in_tiles_and_of_several_levels_is_that_of_all_pairs(grid_size, repel):
    torch.manual_seed(0)
    attention = AgreementAttention(grid_size, repel)
    levels = torch.randn(3, 6, 2, grid_size**2, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([attention.plain(level, k) for k, level in enumerate(levels)])
    found = attention(levels, 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attention(levels[1:], 1), expected[1:])
    target = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * target).sum(), levels)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_unlike_columns_attract_as_written_and_repel_by_the_other_sign():
    """Two columns, opposite: each hears itself, and half of the other by the second sum."""
    level = torch.tensor([[1.0, -1.0]])[:, None].repeat(1, 1, 2)  # (1, 1, 4): a grid of 2x2
    for repel, expected in ((False, 0.5), (True, 1.5)):
        attention = AgreementAttention(2, repel)
        for found in (attention.plain(level, 0), attention(level[None], 0)[0]):
            torch.testing.assert_close(found, expected * level)


def test_columns_that_are_equal_stay_as_they_are():
    level = torch.randn(6, 1, 1).expand(6, 1, 64)
    assert torch.equal(AgreementAttention(8)(level[None], 0)[0], level)


def test_columns_unlike_the_others_weigh_most():
    columns = torch.tensor([[1.0, 0.0]]).repeat(1, 64, 1)  # 8x8, four windows
    columns[0, 0] = torch.tensor([0.0, 1.0])  # in the first one
    found = WindowSum()(columns)
    same = 15 + math.e, 1 + 15 * math.e
    torch.testing.assert_close(found[0, 0], torch.tensor([15 * same[0] / same[1], 1.0]))
    torch.testing.assert_close(found[0, 1:], torch.tensor([16.0, 0.0]).expand(3, 2))


@pytest.fixture
def masked():
    torch.manual_seed(0)
    model = Agglomerator(**MASKED)
    torch.nn.init.normal_(model.masked.patch)
    images = torch.randn(6, 3, 16, 16, requires_grad=True)
    hidden = model.masked.draw(6, seeded_generator(1), images.device)
    return model, images, hidden


def test_half_of_the_patches_of_each_image_are_hidden(masked):
    _, _, hidden = masked
    patches = hidden.unflatten(1, (4, 4)).unflatten(3, (4, 4))  # (B, row, y, column, x)
    assert (patches.flatten(0).view(6, 4, 4, 4, 4).sum((2, 4)) % 16 == 0).all()
    assert (hidden.sum((1, 2)) == 8 * 16).all()
    assert len({tuple(each.flatten().tolist()) for each in hidden}) == 6
    odd = MaskedPatches(Settings(**MASKED | {"image_size": 20, "conv_image_size": 5}))
    assert odd.draw(1, seeded_generator(1), torch.device("cpu")).sum() == 12 * 16


def test_hidden_pixels_do_not_reach_the_tokens(masked):
    model, images, hidden = masked
    for mode in (True, False):  # batch norm of training sees the batch as a whole
        model.train(mode)
        tokens = model.image_to_tokens(model.masked.hide(images, hidden))
        (gradient,) = torch.autograd.grad(tokens.square().sum(), images)
        inside = hidden[:, None].expand_as(images)
        assert (gradient[inside] == 0).all() and (gradient[~inside] != 0).any()
        other = torch.where(inside, torch.full_like(images, torch.nan), images)
        assert torch.equal(model.image_to_tokens(model.masked.hide(other, hidden)), tokens)
        pixels, _ = model.reconstruct(other, hidden)
        assert torch.equal(pixels, model.reconstruct(images, hidden)[0]) and pixels.isfinite().all()


def test_the_learned_patch_stands_in_the_place_of_each_hidden_one(masked):
    model, images, hidden = masked
    seen = model.masked.hide(images, hidden)
    for row in range(0, 16, 4):
        for column in range(0, 16, 4):
            place = slice(row, row + 4), slice(column, column + 4)
            for i in range(6):
                whole = model.masked.patch if hidden[(i, *place)].all() else images[i][:, *place]
                assert torch.equal(seen[i][:, *place], whole)


@pytest.mark.parametrize("grid", [dict(), dict(patch_size=2), dict(conv_image_size=8),
                                  dict(conv_image_size=16, patch_size=2)], ids=str)  # fmt: skip
def test_each_column_predicts_the_pixels_above_it(grid):
    torch.manual_seed(0)
    masked = MaskedPatches(s := Settings(**MASKED | grid))
    level = torch.randn(8, 2, s.n_columns)
    found, side = masked.pixels(level), 16 // s.grid_size
    assert found.shape == (2, 3, 16, 16)
    for j in range(s.n_columns):
        row, column = (side * x for x in divmod(j, s.grid_size))
        square = masked.to_pixels(level[:, 1, j]).view(3, side, side)
        part = found[1, :, row : row + side, column : column + side]
        torch.testing.assert_close(part, square)


def test_prediction_is_of_level_0_of_the_last_iteration(masked):
    model, images, hidden = masked
    model.eval()
    pixels, states = model.reconstruct(images, hidden)
    whole = model.states(model.masked.hide(images, hidden))
    assert len(states) == len(whole) == 5
    torch.testing.assert_close(pixels, model.masked.pixels(whole[-1, :, :, 0].permute(2, 0, 1)))


def test_error_is_of_hidden_pixels_alone(masked):
    _, images, hidden = masked
    predicted = torch.randn_like(images)
    errors = [
        (predicted[i, c, y, x] - images[i, c, y, x]) ** 2
        for i, y, x in hidden.nonzero().tolist()
        for c in range(3)
    ]
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(hidden_pixel_loss(predicted, images, hidden), expected)


def test_cosines_are_those_of_all_pairs():
    torch.manual_seed(0)
    model = Agglomerator(**MASKED | {"levels": 3, "iters": 2}).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    hidden = model.masked.draw(3, seeded_generator(1), images.device)
    _, states = model.reconstruct(images, hidden)
    expected = 0
    for state in states[:-1]:
        levels = state.whole(3).permute(2, 3, 0, 1)  # (K, d, B, n)
        up = cosine_of_pairs(model.bottom_up.plain(levels[1], 2), levels[2])
        downs = [
            cosine_of_pairs(model.top_down.plain(levels[k + 1], k), levels[k]) for k in range(2)
        ]
        expected = expected + (1 - up) + (1 - sum(downs) / 2)
    torch.testing.assert_close(level_cosine_loss(model, states), expected / 2)


def cosine_of_pairs(one, other):
    columns = [x.flatten(1).unbind(1) for x in (one, other)]
    pairs = [torch.cosine_similarity(a, b, dim=0) for a in columns[0] for b in columns[1]]
    return torch.stack(pairs).mean()
