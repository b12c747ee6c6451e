import dataclasses
import math
import os
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, save_published
from PIL import Image

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.config import INPUT_SETTINGS, MODEL_SETTINGS, Settings
from agglomerator.plan import complete_from_checkpoint
from agglomerator.runs.checkpoints import fingerprint, read, shelve
from agglomerator.util.errors import UserError

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


@pytest.mark.parametrize("tokenizer", ["convmlp", "residual", "vgg", "pyramid"])
def test_shapes_tell_the_flags_of_the_head_and_the_tokenizer(tmp_path, tokenizer):
    flags = {"head": "grid", "head_side": 3, "tokenizer": tokenizer}
    flags |= {"tokenizer_width": 5, "tokenizer_depth": 4}
    weights = Agglomerator(**SMALL, **flags).state_dict()
    found = read(save_published(tmp_path / "p.ckpt", weights)).settings
    assert {name: found[name] for name in flags} == flags


def check_round_trip(settings, tmp_path):
    """A network of these settings computes the same when it is read again."""
    model = Agglomerator(**dataclasses.asdict(settings))
    content = {"state_dict": model.state_dict(), "hyper_parameters": dataclasses.asdict(settings)}
    torch.save(content | {"epoch": 0, "global_step": 1}, tmp_path / "own.ckpt")
    found = load_checkpoint(tmp_path / "own.ckpt").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images), model.eval()(images))


@pytest.mark.parametrize("radius", [0, 1.5])
def test_own_checkpoint_without_weights_for_places_is_read_again(tmp_path, radius):
    settings = Settings(
        patch_dim=16, head="grid", column_norm="plain", local_consensus_radius=radius,
        conv_image_size=16, tokenizer="pyramid",
    )  # fmt: skip
    check_round_trip(settings, tmp_path)


def test_grid_head_with_the_shapes_of_a_flat_one_is_told_from_it(tmp_path):
    settings = Settings(patch_dim=32, patch_size=2, head="grid")  # 4x4 columns of 32: 512
    check_round_trip(settings, tmp_path)


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


def test_a_network_keeps_the_stride_of_its_tokenizer(stage_one_checkpoint):
    for size in (13, 15):  # of which the tokenizer also makes 4x4
        assert load_checkpoint(stage_one_checkpoint, image_size=size).settings.image_size == size
    with pytest.raises(UserError, match="use --image_size=16") as error:
        load_checkpoint(stage_one_checkpoint, image_size=8)
    assert "\n" not in str(error.value)


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
    assert complete_from_checkpoint(own, {"dataset"}, checkpoint).normalization == "digits"
    assert (
        complete_from_checkpoint(own, {"dataset", "normalization"}, checkpoint).normalization
        == "CIFAR10"
    )


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


MASK = "attention.non_local_mask"
RADII = [0.5, 1, math.sqrt(2), 1.5, 2, 2.2, math.sqrt(5), 3, 3.7, 4.2, 4.3, 7, 1e9]


@pytest.mark.parametrize("radius", RADII)
def test_radius_of_a_published_mask_gives_the_same_states(tmp_path, radius):
    model = Agglomerator(**SMALL, local_consensus_radius=radius).eval()
    path = save_published(tmp_path / "p.ckpt", model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    for flags in ({}, {"local_consensus_radius": radius}):
        found = load_checkpoint(path, **flags)
        assert torch.equal(found.attention.non_local_mask, model.attention.non_local_mask)
        torch.testing.assert_close(found.states(images), model.states(images))


@pytest.mark.parametrize("radius", RADII)
def test_own_checkpoint_keeps_its_radius(tmp_path, radius):
    model = Agglomerator(**SMALL, local_consensus_radius=radius)
    content = {"state_dict": model.state_dict(), "epoch": 0, "global_step": 1}
    content["hyper_parameters"] = dataclasses.asdict(model.settings) | {"stage": "contrastive"}
    torch.save(content, tmp_path / "own.ckpt")
    settings = load_checkpoint(tmp_path / "own.ckpt").settings
    assert settings.local_consensus_radius == radius
    completed = complete_from_checkpoint(Settings(), set(), read(tmp_path / "own.ckpt"))
    assert completed.local_consensus_radius == radius


def test_radii_fit_that_give_the_same_mask_and_no_others(tmp_path):
    path, images = tmp_path / "own.ckpt", torch.randn(2, 3, 16, 16)
    model = Agglomerator(**SMALL, local_consensus_radius=1.5).eval()
    torch.save({"state_dict": model.state_dict()}, path)
    for radius in (math.sqrt(2), 1.9):
        found = load_checkpoint(path, local_consensus_radius=radius)
        torch.testing.assert_close(found.states(images), model.states(images))
    for radius in (0, 1, 1.4, 2, 5, "wide"):
        message = refused(path, local_consensus_radius=radius)
        assert f"local_consensus_radius={radius}" in message
        assert "--local_consensus_radius=1.5" in message


def test_mask_beyond_the_grid_is_that_of_no_limit(tmp_path):
    model = Agglomerator(**SMALL, local_consensus_radius=9).eval()
    path, images = (
        save_published(tmp_path / "p.ckpt", model.state_dict()),
        torch.randn(2, 3, 16, 16),
    )
    found = load_checkpoint(path, local_consensus_radius=0)
    torch.testing.assert_close(found.states(images), model.states(images))


def test_mask_of_no_radius_is_refused(tmp_path):
    weights = Agglomerator(**SMALL, local_consensus_radius=1).state_dict()
    whole = weights[MASK]
    torn = whole.clone()
    torn[0, 9, 3] ^= True  # not in the first row
    for mask in (
        torn,
        torch.ones_like(whole),
        whole[0],
        whole[:, 1:],
        whole[:, :1],
        torch.ones(()),
    ):
        path = save_published(tmp_path / "p.ckpt", weights | {MASK: mask})
        assert MASK in refused(path)
        assert MASK in refused(path, local_consensus_radius=1)


def test_published_checkpoint_without_a_mask_has_no_radius(tmp_path):
    path = save_published(tmp_path / "p.ckpt", Agglomerator(**SMALL).state_dict())
    assert "--local_consensus_radius=0" in refused(path, local_consensus_radius=2)


@pytest.mark.parametrize("kind", [torch.save, safetensors.torch.save_file])
def test_derived_buffers_may_be_left_out(tmp_path, kind):
    model = Agglomerator(**SMALL, local_consensus_radius=2).eval()
    left_out = MASK, "num_batches_tracked"
    weights = {n: v for n, v in model.state_dict().items() if not n.endswith(left_out)}
    kind(weights, tmp_path / "weights")
    found = load_checkpoint(tmp_path / "weights", local_consensus_radius=2)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found.states(images), model.states(images))
    assert load_checkpoint(tmp_path / "weights").settings.local_consensus_radius == 0


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def wrapped(*names):
    def wrap(weights):
        for name in reversed(names):
            weights = {name: weights, "epoch": 3}
        return weights

    return wrap


def prefixed(prefix):
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize(
    "bring",
    [
        *map(wrapped, ["state_dict", "model", "model_state_dict", "module", "net"]),
        wrapped("model", "state_dict"),
        *map(prefixed, ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod."]),
        *map(prefixed, ["_orig_mod.module.model.", "model.net._orig_mod."]),
        lambda weights: wrapped("model")(prefixed("module.")(weights)),
        lambda weights: {n.replace(".net.", "._orig_mod.net."): v for n, v in weights.items()},
        lambda weights: {n: torch.nn.Parameter(v, v.dtype.is_floating_point) for n, v in
                         weights.items()},
    ],
)  # fmt: skip
def test_state_dicts_as_users_save_them(tmp_path, bring, save):
    model, path = Agglomerator(**SMALL, local_consensus_radius=1.5).eval(), tmp_path / "x.pth"
    save(bring(model.state_dict()), path)
    found = load_checkpoint(path)
    assert found.settings.local_consensus_radius == 1.5
    fingerprint(read(path).weights)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found(images), model(images))


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_safetensors(tmp_path, name):
    flags = dict(iters=6, tokenizer_depth=11, consensus_self=True, local_consensus_radius=1.5)
    model = Agglomerator(**SMALL, **flags).eval()
    told = {"format": "pt", "iters": "6", "consensus_self": "True", "consensus_temperature": "None"}
    weights = prefixed("module.")(model.state_dict())
    safetensors.torch.save_file(
        weights, tmp_path / name, told | {"dataset": "digits", "x": "[" * 9}
    )
    found = load_checkpoint(tmp_path / name)
    for name_, value in (flags | {"dataset": "digits"}).items():
        assert getattr(found.settings, name_) == value, name_
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found(images), model(images))


def test_archive_that_is_named_like_another_format(tmp_path):
    torch.save(Agglomerator(**SMALL).state_dict(), tmp_path / "x.safetensors")
    load_checkpoint(tmp_path / "x.safetensors")


def test_names_that_become_one_are_refused(tmp_path):
    weights = Agglomerator(**SMALL).state_dict()
    torch.save(weights | prefixed("module.")(weights), tmp_path / "two.pth")
    assert "more than once" in refused(tmp_path / "two.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats_become_float32(tmp_path, dtype):
    model = Agglomerator(**SMALL).to(dtype)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    found = load_checkpoint(tmp_path / "x.safetensors").state_dict()
    for name, value in model.state_dict().items():
        assert found[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e200])
@pytest.mark.parametrize("name", ["wTD", "bottom_up.net.2.weight",
                                  "image_to_tokens.0.block.1.running_var"])  # fmt: skip
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    weights = Agglomerator(**SMALL).double().state_dict()
    weights[name].view(-1)[-1] = value
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    message = refused(tmp_path / "x.ckpt")
    assert name in message and "finite" in message and "earlier checkpoint" in message


def test_weights_that_are_integers_are_refused(tmp_path):
    weights = Agglomerator(**SMALL).state_dict()
    weights["bottom_up.net.2.weight"] = weights["bottom_up.net.2.weight"].to(torch.int8)
    torch.save(weights, tmp_path / "x.pth")
    assert "bottom_up.net.2.weight is of int8" in refused(tmp_path / "x.pth")


def test_network_that_is_pickled_whole(tmp_path):
    torch.save(Agglomerator(**SMALL), tmp_path / "x.pth")
    assert "state_dict()" in refused(tmp_path / "x.pth")


class Command:
    """Runs a command when it is unpickled by a careless loader."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize("place", ["lr_schedulers", "state_dict", "hyper_parameters"])
def test_code_in_a_checkpoint_is_not_run(case, tmp_path, place, save):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    content = {"state_dict": dict(case["state_dict"]), place: Command(f"touch {marker}")}
    save(content, path)
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


def test_a_head_that_somebody_has_added(stage_one_checkpoint, tmp_path, monkeypatch):
    """As README says: a branch in `contrastive_head`, and its name among the choices of --head."""
    from agglomerator.config import FIELDS
    from agglomerator.model import agglomerator, heads

    class Peak(torch.nn.Module):
        def forward(self, columns):
            return columns.amax(1)

    def with_peak(settings):
        if settings.head != "peak":
            return heads.contrastive_head(settings)
        return torch.nn.Sequential(Peak(), torch.nn.Linear(settings.patch_dim, settings.contr_dim))

    monkeypatch.setattr(agglomerator, "contrastive_head", with_peak)
    metadata = FIELDS["head"].metadata
    monkeypatch.setattr(
        FIELDS["head"], "metadata", metadata | {"choices": (*metadata["choices"], "peak")}
    )
    content = torch.load(stage_one_checkpoint, weights_only=True)
    content["hyper_parameters"]["head"] = "peak"
    flags = {k: v for k, v in content["hyper_parameters"].items() if k in FIELDS}
    model = Agglomerator(**flags).eval()
    content["state_dict"] = {f"model.{k}": v for k, v in model.state_dict().items()}
    path = tmp_path / "peak.ckpt"
    torch.save(content, path)
    images = torch.randn(2, 1, 16, 16).clamp(-1, 1)
    assert torch.equal(load_checkpoint(path)(images), model(images))
