import numpy as np
import pytest
import torch
from conftest import ROOT, run_main

from agglomerator import Agglomerator
from agglomerator.config import FIELDS, Settings
from agglomerator.data import registry
from agglomerator.data.images import ImageSet
from agglomerator.data.module import ImageDataModule, split
from agglomerator.data.sets.partwhole import CLASSES, PartWhole
from agglomerator.plan import complete_from_data
from agglomerator.util.errors import UserError

PUBLISHED = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "smallNORB", "IMAGENET")


def numbers(n):
    """n images of 4x4 whose values are their numbers."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4)
    return ImageSet(images.contiguous(), [0] * n, ["only"])


def config(name):
    """Flags of a config, by name, as text."""
    lines = (ROOT / "config" / f"config_{name}.cfg").read_text().splitlines()
    flags = [line.removeprefix("--").split("=") for line in lines if not line.startswith("#")]
    return dict(flags)


def test_help_names_every_data_set():
    help = FIELDS["dataset"].metadata["help"]
    assert [name for name in registry.DATA_SETS if name not in help] == []


@pytest.mark.parametrize("name", registry.DATA_SETS)
def test_every_data_set_has_a_config_that_says_what_it_is(name):
    text = (ROOT / "config" / f"config_{name}.cfg").read_text()
    assert text.startswith("# ") and f"python src/main.py --flagfile config/config_{name}.cfg" in (
        text
    )
    flags = config(name)
    assert flags["dataset"] == name
    n_classes = registry.DATA_SETS[name].n_classes
    assert n_classes is None or int(flags["n_classes"]) == n_classes


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_channels_of_the_published_table(name):
    flags = {key: int(config(name)[key]) for key in ("image_size", "n_channels", "n_classes")}
    assert flags["image_size"] == {"MNIST": 28, "FashionMNIST": 28, "IMAGENET": 256}.get(name, 32)
    assert flags["n_channels"] == (1 if name in ("FashionMNIST", "smallNORB") else 3)
    classes = {"CIFAR100": 100, "smallNORB": 5, "IMAGENET": 1000}
    assert flags["n_classes"] == classes.get(name, 10)


@pytest.mark.parametrize("name", registry.DATA_SETS)
def test_network_of_every_config_can_be_built(name):
    flags = {"conv_image_size": int(config(name)["image_size"]) // 4} | config(name)
    names = ["image_size", "conv_image_size", "n_channels", "patch_size", "patch_dim", "levels"]
    with torch.device("meta"):
        Agglomerator(**{key: int(flags[key]) for key in names})


@pytest.mark.parametrize("wrong, near", [("cifar10", "CIFAR10"), ("smalnorb", "smallNORB")])
def test_unknown_name(wrong, near):
    with pytest.raises(UserError, match=f"did you mean {near}"):
        ImageDataModule(Settings(dataset=wrong))
    with pytest.raises(UserError, match=", ".join(registry.DATA_SETS)):
        ImageDataModule(Settings(dataset="xyzzy"))


def test_n_classes_follows_and_contradicts():
    s = Settings(dataset="CIFAR100")
    assert complete_from_data(s, given=set()).n_classes == 100
    with pytest.raises(UserError, match="--n_classes=10.*use --n_classes=100"):
        complete_from_data(s, given={"n_classes"})


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "digits"])
def test_normalisation_fits_the_channels(name):
    images = torch.full((2, 1, 32, 32), 100, dtype=torch.uint8)
    entry = registry.DATA_SETS[name]
    s = Settings(dataset=name, n_classes=entry.n_classes)
    gray = ImageDataModule(s.replace(n_channels=1)).view(images)
    expected = (100 / 255 - np.mean(entry.mean)) / np.mean(entry.std)
    assert gray.shape == (2, 1, 32, 32) and gray.mean().item() == pytest.approx(expected, abs=1e-5)
    colour = ImageDataModule(s).view(images.expand(2, 3, 32, 32))
    expected = (100 / 255 - np.array(entry.mean)) / np.array(entry.std)
    expected = np.broadcast_to(expected, 3)
    assert colour.mean((0, 2, 3)).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_normalisation_of_another_data_set():
    entry = registry.DATA_SETS["CIFAR100"]
    data = ImageDataModule(Settings(normalization="CIFAR100"))
    assert (data.mean, data.std) == (entry.mean, entry.std)
    with pytest.raises(UserError, match="--normalization=CIFAR: .*CIFAR10"):
        ImageDataModule(Settings(normalization="CIFAR"))


def test_split_is_fixed_by_the_seed_and_divides_all():
    train, val = split(numbers(100), 0.2, seed=3)
    again, _ = split(numbers(100), 0.2, seed=3)
    other, _ = split(numbers(100), 0.2, seed=4)
    assert (len(train), len(val)) == (80, 20)
    assert train.indices == again.indices != other.indices
    assert sorted(train.indices + val.indices) == list(range(100))
    assert train.indices == sorted(train.indices)


def test_each_view_is_cropped_in_its_own_way():
    data = ImageDataModule(Settings(dataset="smallNORB", n_channels=1, n_classes=5))
    ramp = (torch.arange(48 * 48) % 251).to(torch.uint8).view(1, 1, 48, 48).repeat(400, 1, 1, 1)
    views = data.augmented_view(ramp, torch.Generator().manual_seed(0))
    assert views.shape == (400, 1, 32, 32)
    assert len(views.flatten(1).unique(dim=0)) > 200


def partwhole(**changes):
    return Settings(dataset="PartWhole").replace(num_workers=2, **changes)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr("agglomerator.data.sets.partwhole.SPLITS", {"train": 300, "test": 20})


@pytest.mark.parametrize("objects, difficulty", [(1, 1), (3, 2)])
def test_partwhole_in_memory(few_scenes, monkeypatch, objects, difficulty):
    monkeypatch.setattr(registry, "_READ", {})
    s = partwhole(objects=objects, difficulty=difficulty)
    for part, n in (("train", 300), ("test", 20)):
        found = registry.read_split(s, part)
        scenes = PartWhole(part, n, difficulty=difficulty, objects=objects)
        assert len(found) == n and found.classes == list(CLASSES)
        for i in (0, 7, n - 1):
            scene = scenes[i]
            assert np.array_equal(found.images[i], scene.image) and found.labels[i] == scene.label
            assert np.array_equal(found.extra["parts"][i], scene.parts)
            assert np.array_equal(found.extra["objects"][i], scene.objects)


def test_partwhole_does_not_depend_on_seed_or_workers(few_scenes, monkeypatch):
    found = []
    for changes in ({"seed": 1}, {"seed": 2}):
        monkeypatch.setattr(registry, "_READ", {})
        found.append(registry.read_split(partwhole(**changes), "train").images)
    assert torch.equal(*found)


def test_partwhole_sizes():
    s = Settings(dataset="PartWhole", image_size=16, conv_image_size=4)
    with pytest.raises(UserError, match="image_size=16"):
        registry.read_split(s, "train")


@pytest.mark.slow
def test_command_line_partwhole(tmp_path):
    flags = (
        "--flagfile=config/config_PartWhole.cfg",
        f"--output_dir={tmp_path}",
        "--patch_dim=8",
        "--contr_dim=8",
        "--batch_size=32",
        "--limit_train=2",
        "--limit_val=2",
        "--max_epochs=1",
        "--logger=none",
    )
    said = run_main(*flags).stdout
    assert "PartWhole: 64 of 16000 images to train on, 64 of 4000 to validate" in said
