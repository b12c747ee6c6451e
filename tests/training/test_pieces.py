import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, rows, run_main, same_weights, small_run, weights

from agglomerator import Agglomerator
from agglomerator.data.crops import labelled_views
from agglomerator.training.losses.pairs import unit_maps
from agglomerator.training.losses.pieces import composite_loss, piece_loss
from agglomerator.training.teacher import ON_TOP, Teacher

SIDE = 8
COMPOSITES = "--agreement=1", "--agreement_cue=composites", "--augmentation=views"


def generator():
    return torch.Generator().manual_seed(0)


def one_hot(pieces):
    """Vectors (B, 16, S, S) that agree on each piece alone."""
    return F.one_hot(pieces, 16).permute(0, 3, 1, 2).float()


@pytest.fixture
def pieces():
    pieces = torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    pieces[:, 2:6, 2:5], pieces[:, 2:6, 5:7] = 1, 2
    return pieces


def test_loss_is_least_for_the_true_pieces(pieces):
    true = piece_loss(one_hot(pieces), pieces, generator())
    together = piece_loss(one_hot(torch.zeros_like(pieces)), pieces, generator())
    apart = piece_loss(F.normalize(torch.randn(2, 16, SIDE, SIDE), dim=1), pieces, generator())
    joined = piece_loss(one_hot(pieces.clamp(max=1)), pieces, generator())
    assert true < 0.1 < joined < together
    assert true < 0.1 * apart


def test_of_the_ground_nothing_is_asked_but_to_differ_from_pieces(pieces):
    split = pieces.clone()
    split[:, :, 0] = 3  # parts of the ground that do not agree
    loss = piece_loss(one_hot(split), pieces, generator(), ground=0)
    assert loss == pytest.approx(
        piece_loss(one_hot(pieces), pieces, generator(), 0).item(), abs=0.05
    )
    assert piece_loss(one_hot(split), pieces, generator()) > loss + 0.1
    joined = torch.where(pieces == 1, 0, pieces)
    assert piece_loss(one_hot(joined), pieces, generator(), ground=0) > loss + 0.1


def test_a_column_lies_on_the_piece_in_its_middle(pieces):
    large = pieces.repeat_interleave(4, 1).repeat_interleave(4, 2)
    vectors = F.normalize(torch.randn(2, 16, SIDE, SIDE), dim=1)
    expected = piece_loss(vectors, pieces, generator())
    assert torch.equal(piece_loss(vectors, large, generator()), expected)


def test_figures_teach_the_top_level_and_pieces_those_below(pieces):
    levels = unit_maps(torch.randn(4, SIDE**2, 3, 16)).requires_grad_()
    composite_loss(levels, torch.cat((pieces, pieces)), generator()).backward()
    touched = levels.grad.flatten(2).abs().sum(2) > 0  # (K, 2B)
    assert touched.tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]]


def test_training_on_composites_resumes_bit_for_bit(tmp_path):
    flags = *COMPOSITES, "--exp_name=on", "--lr_speed=3", "--limit_train=3", "--limit_val=1"
    small_run(tmp_path / "whole", *flags, "--max_epochs=3")
    small_run(tmp_path, *flags, "--max_epochs=2")
    small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training")
    ends = [
        folder / "on" / "checkpoints" / "last.ckpt" for folder in (tmp_path, tmp_path / "whole")
    ]
    assert same_weights(*ends)
    assert all(float(row["train_agreement_epoch"]) > 0 for row in rows(tmp_path / "on")
               if row["train_agreement_epoch"])  # fmt: skip


TAUGHT = "--agreement=1", "--agreement_cue=islands", "--augmentation=views"


def test_teacher_tells_islands_within_islands():
    torch.manual_seed(0)
    model = Agglomerator(image_size=16, conv_image_size=4, patch_dim=16, levels=2).eval()
    images = torch.randn(3, 3, 16, 16)
    islands = Teacher(model).islands(images)
    assert islands.shape == (3, 2, 4, 4)
    for parts, wholes in islands:
        assert len(wholes.unique()) == ON_TOP
        assert len(parts.unique()) == 16
        assert all(len(wholes[parts == part].unique()) == 1 for part in parts.unique())
    mirrored = Teacher(model).islands(images.flip(-1)).flip(-1)
    for one, other in zip(islands[:, 1], mirrored[:, 1], strict=True):
        same = one.flatten()[:, None] == one.flatten()
        assert torch.equal(same, other.flatten()[:, None] == other.flatten())


def test_labels_lie_where_the_image_lies():
    """A bright square and its label move together."""
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 8:20, 4:16] = 255
    labels = (images[:, :1, ::2, ::2] > 0).long()
    views, moved = labelled_views(images, labels, generator())
    bright = F.avg_pool2d(views.float().mean(1, keepdim=True), 2) > 128
    assert (bright == moved.bool()).float().mean() > 0.97
    assert not torch.equal(moved, labels)


def test_training_by_a_teacher_resumes_bit_for_bit(tmp_path):
    small_run(tmp_path, *COMPOSITES, "--exp_name=first", "--max_epochs=1", "--limit_train=2")
    teaches = tmp_path / "first" / "checkpoints" / "last.ckpt"
    start = f"--load_checkpoint_dir={teaches}"
    flags = *TAUGHT, "--exp_name=on", "--lr_speed=3", "--limit_train=3", "--limit_val=1"
    small_run(tmp_path / "whole", *flags, start, "--max_epochs=3")
    small_run(tmp_path, *flags, start, "--max_epochs=2")
    small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training")
    ends = [
        folder / "on" / "checkpoints" / "last.ckpt" for folder in (tmp_path, tmp_path / "whole")
    ]
    assert same_weights(*ends)
    teacher, before = torch.load(ends[0], weights_only=True)["teacher"], weights(teaches)
    assert all(torch.equal(weight, before[f"model.{name}"]) for name, weight in teacher.items())


@pytest.mark.parametrize(
    ("flags", "named"),
    [(TAUGHT, "--agreement_cue"), ((*TAUGHT[:2], "--load_checkpoint_dir=x"), "--augmentation")],
)
def test_teaching_needs_a_teacher_and_views(tmp_path, flags, named):
    result = run_main(*SMALL, f"--output_dir={tmp_path}", *flags, ok=False)
    assert result.status != 0
    assert result.stderr.startswith(f"error: {named}=")
