import gzip
import struct

import numpy as np
import pytest
import torch
from conftest import run_main

from agglomerator.config import Settings
from agglomerator.data import registry
from agglomerator.data.module import ImageDataModule
from agglomerator.data.sets.smallnorb import NAMES, download_smallnorb, read_matrix, read_smallnorb
from agglomerator.util.errors import UserError

PAIRS = 60
MAGIC = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}


def matrix(array):
    """An array in NYU's binary matrix format."""
    sizes = [*array.shape, 1, 1][: max(3, array.ndim)]
    header = struct.pack(f"<{2 + len(sizes)}I", MAGIC[array.dtype.name], array.ndim, *sizes)
    return header + array.tobytes()


def parts_of(train):
    """Of each class 4 toys, of each toy 3 pairs."""
    rng = np.random.default_rng(int(train))
    info = rng.integers(0, 9, (PAIRS, 4))
    info[:, 0] = np.arange(PAIRS) // 15 + 6
    return {
        "dat": rng.integers(0, 256, (PAIRS, 2, 96, 96), dtype=np.uint8),
        "cat": (np.arange(PAIRS) % 5).astype(np.int32),
        "info": info.astype(np.int32),
    }


@pytest.fixture
def root(tmp_path):
    """60 pairs a split; the training files as they are, the test files packed."""
    folder = tmp_path / "smallNORB"
    folder.mkdir()
    for train in (True, False):
        for part, array in parts_of(train).items():
            content, name = matrix(array), NAMES[train].format(part)
            if train:
                (folder / name).write_bytes(content)
            else:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    return tmp_path


def settings(root):
    s = Settings(dataset="smallNORB", data_dir=str(root), n_channels=1, n_classes=5)
    return s.replace(num_workers=0)


@pytest.mark.parametrize("train", [True, False])
def test_reads_exactly(root, train):
    found, parts = read_smallnorb(settings(root), train), parts_of(train)
    assert found.images.shape == (2 * PAIRS, 1, 96, 96) and found.images.dtype == torch.uint8
    assert np.array_equal(found.images[0::2, 0], parts["dat"][:, 0])  # left eyes
    assert np.array_equal(found.images[1::2, 0], parts["dat"][:, 1])
    assert np.array_equal(found.labels[0::2], parts["cat"])
    assert np.array_equal(found.labels[1::2], parts["cat"])
    assert np.array_equal(found.extra["info"][1::2], parts["info"])
    assert found.classes == ["animal", "human", "airplane", "truck", "car"]


def test_48_pixels_of_which_the_network_sees_32(root):
    data = ImageDataModule(settings(root))
    data.prepare_data()
    data.setup()
    images, _ = data.test.dataset[list(range(8))]
    assert images.shape == (8, 1, 48, 48)
    middle = images[..., 8:40, 8:40]
    assert torch.equal(data.crop(images), middle)
    assert torch.allclose(data.view(images), (middle.float() / 255 - 0.5) / 0.5, atol=1e-5)
    draw = torch.Generator().manual_seed(0)
    assert data.augmented_view(images, draw).shape == (8, 1, 32, 32)


def test_both_eyes_of_a_pair_are_on_one_side_of_the_split(root):
    data = ImageDataModule(settings(root))
    data.setup()
    assert (len(data.train), len(data.val), len(data.test)) == (96, 24, 120)
    pairs = {index // 2 for index in data.train.indices}
    assert len(pairs) == 48 and pairs.isdisjoint(index // 2 for index in data.val.indices)


@pytest.mark.parametrize("seed", range(3))
def test_no_toy_is_on_both_sides_of_the_split(root, seed):
    data = ImageDataModule(settings(root).replace(seed=seed))
    data.setup()
    found = data.train.dataset
    toys = np.stack([found.labels, found.extra["info"][:, 0]], 1)
    train, val = ({tuple(toys[i]) for i in part.indices} for part in (data.train, data.val))
    assert len(train) == 16 and len(val) == 4 and train.isdisjoint(val)
    assert len({label for label, _ in val}) == 4


def test_nothing_is_downloaded_where_all_is_there(root):
    before = sorted(root.rglob("*"))
    download_smallnorb(settings(root))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("part", ["dat", "cat", "info"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fault", ["cut short", "empty", "longer", "text", "swapped"])
def test_faults_name_the_file(root, fault, train, part):
    path = root / "smallNORB" / NAMES[train].format(part)
    if not train:
        path = path.with_name(path.name + ".gz")
    content = path.read_bytes()
    other = "info" if part == "cat" else "cat"
    damaged = {
        "cut short": content[:-3],
        "empty": b"",
        "longer": content + b"xyz",
        "text": b"<html>404 Not Found</html>" * 9,
        "swapped": matrix(parts_of(train)[other]),
    }[fault]
    if fault == "swapped" and not train:
        damaged = gzip.compress(damaged)
    path.write_bytes(damaged)
    with pytest.raises(UserError) as error:
        read_smallnorb(settings(root), train)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dims", [(7,), (3, 2), (2, 3, 4), (2, 1, 2, 2, 3)])
def test_matrices_of_any_dimension(tmp_path, dims):
    array = np.arange(np.prod(dims), dtype=np.int32).reshape(dims)
    (tmp_path / "x.mat").write_bytes(matrix(array))
    assert np.array_equal(read_matrix(tmp_path / "x.mat"), array)


def test_label_out_of_range(root):
    labels = parts_of(True)["cat"]
    labels[7] = 5
    (root / "smallNORB" / NAMES[True].format("cat")).write_bytes(matrix(labels))
    with pytest.raises(UserError, match="image 14 .*label 5"):
        registry.read_split(settings(root), "train")


def test_command_line(root, tmp_path):
    flags = (
        "--flagfile=config/config_smallNORB.cfg",
        f"--data_dir={root}",
        f"--output_dir={tmp_path / 'out'}",
        "--patch_dim=8",
        "--contr_dim=8",
        "--batch_size=24",
        "--max_epochs=1",
        "--logger=none",
    )
    assert "96 images to train on, 24 to validate" in run_main(*flags).stdout
    (root / "smallNORB" / NAMES[True].format("dat")).write_bytes(b"short")
    said = run_main(*flags, ok=False).stderr
    assert "training-dat.mat" in said and said.startswith("error: ") and said.count("\n") == 1


def test_command_line_without_files_and_internet(tmp_path):
    nowhere = tmp_path / "nowhere"
    flags = "--dataset=smallNORB", f"--data_dir={nowhere}", "--n_channels=1"
    said = run_main(*flags, f"--output_dir={tmp_path}", ok=False).stderr
    assert f"into {nowhere / 'smallNORB'}" in said and said.count("\n") == 1
    assert not list(nowhere.rglob("*"))
