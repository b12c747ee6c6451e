from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from agglomerator.config import Settings
from agglomerator.data.images import ImageSet
from agglomerator.data.module import ImageDataModule, split
from agglomerator.data.registry import DATA_SETS
from agglomerator.plan import complete_from_data
from agglomerator.util.errors import UserError
from agglomerator.util.random import seeded_generator

DIGITS = dict(dataset="digits", image_size=16, conv_image_size=4, n_channels=1)


def read(**flags):
    data = ImageDataModule(Settings(**DIGITS | flags))
    data.setup()
    return data


def test_a_fifth_is_held_out_by_seed():
    data, again, other = read(), read(), read(seed=1)
    train, val = list(data.train.indices), list(data.val.indices)
    assert sorted(train + val) == list(range(1437))
    assert len(val) == round(1437 / 5)
    assert train == sorted(train) and val == sorted(val)
    assert list(again.val.indices) == val
    assert list(other.val.indices) != val


def test_the_held_out_fifth_is_always_the_same_one():
    """Checkpoints of earlier versions were validated on it."""
    expected = torch.randperm(1437, generator=torch.Generator().manual_seed(3))[:287].sort()[0]
    assert list(read(seed=3).val.indices) == expected.tolist()


def toys(of_classes):
    """Three images of each toy, scattered; of each class so many toys."""
    labels = torch.arange(len(of_classes)).repeat_interleave(torch.tensor(of_classes)).repeat(3)
    groups = np.arange(sum(of_classes)) * 7 % 1000
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet(images, labels, "abcde", groups=np.tile(groups, 3))


@pytest.mark.parametrize(
    "of_classes, share, held_out",
    [
        ([5] * 5, 0.2, [1] * 5),
        ([5] * 5, 0.4, [2] * 5),
        ([5] * 5, 0.6, [3] * 5),
        ([10, 5, 5], 0.2, [2, 1, 1]),
        ([5] * 5, 0, [0] * 5),
    ],
)
def test_whole_groups_are_held_out_in_equal_shares_of_all_classes(of_classes, share, held_out):
    whole = toys(of_classes)
    for seed in range(5):
        train, val = split(whole, share, seed)
        assert sorted(train.indices + val.indices) == list(range(len(whole)))
        assert set(whole.groups[train.indices]).isdisjoint(whole.groups[val.indices])
        found = torch.bincount(whole.labels[val.indices], minlength=len(of_classes))
        assert found.tolist() == [3 * n for n in held_out]
        assert split(whole, share, seed)[1].indices == val.indices


def test_a_class_keeps_an_image_to_learn_from():
    labels = torch.tensor([0] * 20 + [1] + [2] * 2)
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    for seed in range(20):
        train, val = split(ImageSet(images, labels, "abc"), 0.5, seed)
        assert sorted(train.indices + val.indices) == list(range(23))
        assert set(labels[train.indices].tolist()) == {0, 1, 2}
        assert 9 <= len(val) <= 12


def test_a_small_share_of_groups_is_one_at_least_drawn_by_seed():
    held_out = [split(toys([5] * 5), 0.01, seed)[1] for seed in range(50)]
    assert {len(val) for val in held_out} == {3}
    assert len({val.indices[0] for val in held_out}) > 15
    assert len({int(val[0][1]) for val in held_out}) == 5
    two = [split(toys([5] * 5), 0.08, seed)[1] for seed in range(20)]
    assert all(len({int(label) for label in val[:][1]}) == 2 for val in two)


def test_test_set_is_whole_and_the_same_for_every_seed():
    data, other = read(), read(seed=1)
    assert list(data.test.indices) == list(range(360))
    for found, expected in zip(other.test[:], data.test[:], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 20])
def test_images_have_the_size_and_channels_asked_for(image_size, n_channels):
    flags = dict(image_size=image_size, conv_image_size=image_size, n_channels=n_channels)
    data = read(**flags)
    images, labels = data.train[[0, 5, 7]]
    assert images.shape == (3, n_channels, image_size, image_size)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [int(data.train.dataset.labels[data.train.indices[i]])
                               for i in (0, 5, 7)]  # fmt: skip


def test_view_normalises_and_changes_nothing_else():
    data = read()
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[..., :3] = torch.tensor([0, 51, 255])
    found = data.view(images)
    assert found.shape == images.shape
    torch.testing.assert_close(found[0, 0, 0, :3], torch.tensor([-1.0, -0.6, 1.0]))


def test_augmented_views_differ_and_repeat_with_their_seed():
    data = read()
    images, _ = data.train[list(range(16))]
    draw = seeded_generator(1, 2)
    first, second = data.augmented_view(images, draw), data.augmented_view(images, draw)
    assert not torch.equal(first, second)
    assert torch.equal(first, data.augmented_view(images, seeded_generator(1, 2)))


@pytest.mark.parametrize("name", [name for name in DATA_SETS if DATA_SETS[name].n_classes])
def test_number_of_classes_follows_the_data_and_a_contradiction_is_refused(name):
    right = DATA_SETS[name].n_classes
    wrong = Settings(dataset=name, n_classes=right + 1)
    assert complete_from_data(wrong, given=set()).n_classes == right
    with pytest.raises(UserError, match=f"--n_classes={right}"):
        complete_from_data(wrong, given={"n_classes"})


def test_unknown_data_set_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="--dataset=fashionmnist: did you mean FashionMNIST"):
        ImageDataModule(Settings(dataset="fashionmnist"))


@pytest.mark.parametrize(
    "flags, world_size, word",
    [
        (dict(limit_val=0.1, batch_size=64), 1, "--limit_val=0.1"),
        (dict(limit_val=0.25, batch_size=64), 2, "--limit_val=0.25"),
        (dict(limit_train=0.01, batch_size=64), 1, "--limit_train=0.01"),
        (dict(batch_size=1), 288, "287 images to validate"),
        (dict(batch_size=600), 2, "--batch_size=600"),
    ],
)
def test_too_little_for_a_process(flags, world_size, word):
    with pytest.raises(UserError, match=word):
        read(**flags).check_batch_size(world_size)
    read(**flags | dict(limit_val=1, limit_train=1, batch_size=4)).check_batch_size(2)


def test_validation_mixes_the_classes_of_a_folder_in_an_order_fixed_by_the_seed(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate("abcd"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(40):
                Image.new("L", (8, 8), 50 * label).save(folder / f"{number:02}.png")
    flags = dict(dataset="ImageFolder", data_dir=str(tmp_path), n_classes=4, val_share=0.5)
    epochs = []
    for _ in range(2):
        data = read(**flags, image_size=8, conv_image_size=8, batch_size=16, num_workers=0)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
        epochs.append(torch.cat([labels for _, labels in data.val_dataloader()]).tolist())
    expected = sorted(int(data.val[i][1]) for i in range(len(data.val)))
    assert epochs[0] == epochs[1] and sorted(epochs[0]) == expected
    assert len(set(epochs[0][:16])) == 4
