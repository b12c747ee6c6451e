import dataclasses
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_published
from PIL import Image

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.checkpoints import complete, fingerprint, read, shelve
from agglomerator.settings import INPUT_SETTINGS, MODEL_SETTINGS, Settings, UserError

REFERENCE = ROOT / "tests" / "reference" / "self_radius2.pt"
SMALL = dict(image_size=16, conv_image_size=4, patch_dim=6, contr_dim=5, n_classes=3)


@pytest.fixture
def case():
    return torch.load(REFERENCE, weights_only=True)


@pytest.fixture
def published(case, tmp_path):
    return save_published(tmp_path / "published.ckpt", case["state_dict"])


def refused(path, **flags):
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(UserError) as error:
        load_checkpoint(path, **flags)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_published_checkpoint_gives_the_published_results(case, published):
    with pytest.raises(Exception, match="weights_only"):
        torch.load(published, weights_only=True)  # it is one that the safe loader refuses
    model = load_checkpoint(published, **case["flags"])
    assert not model.training
    with torch.no_grad():
        embedding = model(case["images"])
        logits = model.classify(case["images"])
    torch.testing.assert_close(embedding, case["embedding"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, case["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", sorted(REFERENCE.parent.glob("*.pt")), ids=lambda path: path.stem)
def test_shapes_tell_the_flags_of_a_published_checkpoint(path, tmp_path):
    case = torch.load(path, weights_only=True)
    model = load_checkpoint(save_published(tmp_path / "p.ckpt", case["state_dict"]))
    traceless = {"iters", "denoise_iter", "dropout", "consensus_self", "temperature"}
    for name in case["flags"].keys() - traceless - {"batch_size", "supervise"}:
        assert getattr(model.settings, name) == case["flags"][name], name


def test_published_checkpoint_brings_its_own_tokenizer_and_head(case, published):
    model = load_checkpoint(published, **case["flags"], head="grid", tokenizer_depth=5)
    assert (model.settings.head, model.settings.tokenizer_depth) == ("flatten", 3)


@pytest.mark.parametrize("tokenizer", ["convmlp", "residual", "vgg"])
def test_shapes_tell_the_flags_of_the_head_and_the_tokenizer(tmp_path, tokenizer):
    flags = {"head": "grid", "head_side": 3, "tokenizer": tokenizer}
    flags |= {"tokenizer_width": 5, "tokenizer_depth": 4}
    weights = Agglomerator(**SMALL, **flags).state_dict()
    found = read(save_published(tmp_path / "p.ckpt", weights)).settings
    assert {name: found[name] for name in flags} == flags


def test_grid_head_with_the_shapes_of_a_flat_one_is_told_from_it(tmp_path):
    settings = Settings(patch_dim=32, patch_size=2, head="grid")  # 4x4 columns of 32: 512
    model = Agglomerator(**dataclasses.asdict(settings))
    content = {"state_dict": model.state_dict(), "hyper_parameters": dataclasses.asdict(settings)}
    torch.save(content | {"epoch": 0, "global_step": 1}, tmp_path / "own.ckpt")
    found = load_checkpoint(tmp_path / "own.ckpt").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images), model.eval()(images))


def test_fingerprint_tells_the_last_bit_whatever_the_strides():
    weights = {"a": torch.ones(3, 4)[:, 0], "b": torch.zeros(1).expand(4), "c": torch.tensor(7)}
    same = {name: value.clone() for name, value in weights.items()}
    assert fingerprint(weights) == fingerprint(same)
    same["a"][0] = same["a"][0].nextafter(torch.tensor(2.0))
    assert fingerprint(weights) != fingerprint(same)


def test_own_checkpoint_round_trip(stage_one_checkpoint):
    model = load_checkpoint(stage_one_checkpoint)
    assert model.settings.patch_dim == 16
    stored = torch.load(stage_one_checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[f"model.{name}"]), name


def test_given_flags_win_over_stored_ones(stage_one_checkpoint):
    assert load_checkpoint(stage_one_checkpoint).settings.n_iters == 4
    assert load_checkpoint(stage_one_checkpoint, iters=7).settings.n_iters == 7
    assert load_checkpoint(stage_one_checkpoint, denoise_iter=1).settings.denoise_iter == 1


def test_shelved_checkpoint_is_small_and_computes_the_same(stage_one_checkpoint, tmp_path):
    target = tmp_path / "shelved.ckpt"
    shelve(stage_one_checkpoint, target)
    assert target.stat().st_size < 0.5 * Path(stage_one_checkpoint).stat().st_size
    whole, small = load_checkpoint(stage_one_checkpoint), load_checkpoint(target)
    s = whole.settings
    for name in (*MODEL_SETTINGS, *INPUT_SETTINGS):
        assert getattr(small.settings, name) == getattr(s, name), name
    images = torch.rand(4, s.n_channels, s.image_size, s.image_size)
    assert torch.allclose(small(images), whole(images), atol=1e-2)


def test_unknown_pretrained_name_lists_those_that_there_are():
    with pytest.raises(UserError, match="pretrained:nothing: no such network.*pretrained:"):
        load_checkpoint("pretrained:nothing")


def test_images_of_another_data_set_are_normalised_as_the_network_knows_it(stage_one_checkpoint):
    checkpoint = read(stage_one_checkpoint)
    own = Settings(dataset="ImageFolder", normalization="CIFAR10")
    assert complete(own, {"dataset"}, checkpoint).normalization == "digits"
    assert complete(own, {"dataset", "normalization"}, checkpoint).normalization == "CIFAR10"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_file_cut_short(published, share):
    content = published.read_bytes()
    published.write_bytes(content[: int(share * len(content))])
    refused(published)


def test_file_with_a_damaged_index(published):
    content = bytearray(published.read_bytes())
    for place in range(200, 2000, 20):
        content[place] ^= 0xFF
    published.write_bytes(content)
    refused(published)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_text("--levels=2\n")
    refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.txt", "no tensors")
    refused(path)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    refused(path)
    torch.save(torch.zeros(3), path)
    refused(path)
    torch.save({"weights": torch.zeros(3)}, path)
    refused(path)
    assert "no such file" in refused(tmp_path / "none.ckpt")
    assert "folder" in refused(tmp_path)


def test_another_network(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, path)
    assert "Agglomerator" in refused(path)
    weights = Agglomerator(**SMALL).state_dict()
    torch.save({"state_dict": weights | {"further.weight": torch.zeros(2)}}, path)
    assert "further.weight" in refused(path)
    del weights["contrastive_head.8.bias"]
    torch.save({"state_dict": weights}, path)
    assert "contrastive_head.8.bias" in refused(path)


@pytest.mark.parametrize(
    "flags",
    [
        dict(patch_dim=8),
        dict(levels=3, contr_dim=7),
        dict(patch_size=2, patch_dim=8),
        dict(n_channels=1, n_classes=4),
        dict(image_size=24, conv_image_size=6),
        dict(local_consensus_radius=2),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_name_the_flags_that_do(tmp_path, flags):
    path = tmp_path / "own.ckpt"
    model = Agglomerator(**SMALL | flags)
    torch.save({"state_dict": model.state_dict()}, path)
    message = refused(path, **SMALL | dict(levels=2, patch_size=1, n_channels=3,
                                           local_consensus_radius=0))  # fmt: skip
    advice = dict(re.findall(r"--(\w+)=(\d+)", message.split("use ")[1]))
    assert set(advice) <= set(flags)
    given = SMALL | {name: int(value) for name, value in advice.items()}
    if "conv_image_size" in advice:
        given["image_size"] = 4 * given["conv_image_size"]
    found = load_checkpoint(path, **given).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_usual_width_of_the_tokenizer_may_be_spelt_out(tmp_path):
    flags = SMALL | {"tokenizer_width": SMALL["patch_dim"] // 2}
    path = tmp_path / "own.ckpt"
    torch.save({"state_dict": Agglomerator(**flags).state_dict()}, path)
    load_checkpoint(path, **flags)


class Command:
    """Runs a command when it is unpickled by a careless loader."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["lr_schedulers", "state_dict", "hyper_parameters"])
def test_code_in_a_checkpoint_is_not_run(case, tmp_path, place):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    content = {"state_dict": dict(case["state_dict"]), place: Command(f"touch {marker}")}
    torch.save(content, path)
    assert "code" in refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # a careless loader would have run it


def test_code_among_the_arguments_of_a_permitted_name_is_not_run(case, tmp_path):
    """Published checkpoints pickle a call of getattr: it must lead nowhere."""
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"

    class Hidden:
        def __reduce__(self):
            return getattr, (Command(f"touch {marker}"), "command")

    torch.save({"state_dict": case["state_dict"], "lr_schedulers": [Hidden()]}, path)
    refused(path)
    assert not marker.exists()


def test_stage_is_read(stage_one_checkpoint, stage_two_checkpoint, published):
    assert read(stage_one_checkpoint).stage == "contrastive"
    assert read(stage_two_checkpoint).stage == "supervised"
    assert read(published).stage is None
