import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_main
from torchvision import datasets

from agglomerator.config import Settings
from agglomerator.data import registry
from agglomerator.data.sets.torchvision_sets import check, downloader, files_of, image_set, unpack
from agglomerator.util.errors import UserError


def idx(array):
    """A uint8 array in the IDX format."""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


def arrays(split):
    rng = np.random.default_rng(split == "train")
    n = {"train": 60, "t10k": 20}[split]
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10


@pytest.fixture(params=["MNIST", "FashionMNIST"])
def name(request):
    return request.param


@pytest.fixture
def root(tmp_path, name):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = arrays(split)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def settings(root, name, **changes):
    s = Settings(dataset=name, data_dir=str(root), image_size=28, conv_image_size=7)
    return s.replace(**({"n_channels": 1} | changes))


def test_idx_is_read_exactly(root, name):
    for split, file in (("train", "train"), ("test", "t10k")):
        found = registry.read_split(settings(root, name), split)
        images, labels = arrays(file)
        assert np.array_equal(found.images[:, 0], images) and found.images.dtype == torch.uint8
        assert np.array_equal(found.labels, labels)
        assert len(found.classes) == 10
    colour = registry.read_split(settings(root, name, n_channels=3), "train").images
    assert torch.equal(colour[:, 0], colour[:, 2]) and colour.shape == (60, 3, 28, 28)


def test_nothing_is_downloaded_where_all_is_there(root, name):
    before = sorted(root.rglob("*"))
    downloader(name)(settings(root, name))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("content", ["cut short", "empty", "longer", "text", "other type"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_idx(root, name, file, content):
    path = root / name / "raw" / file
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[:-1],
            "empty": b"",
            "longer": whole + b"x",
            "text": b"<html>404 Not Found</html>",
            "other type": whole[:2] + b"\x0d" + whole[3:],
        }[content]
    )
    for step in (downloader(name), lambda s: registry.read_split(s, "train")):
        with pytest.raises(UserError) as error:
            step(settings(root, name))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_number_of_labels(root, name):
    (root / name / "raw" / "train-labels-idx1-ubyte").write_bytes(idx(arrays("t10k")[1]))
    with pytest.raises(UserError, match="60 images, but 20 labels"):
        registry.read_split(settings(root, name), "train")


def test_label_out_of_range(root, name):
    labels = arrays("train")[1]
    labels[3] = 10
    (root / name / "raw" / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(UserError, match="image 3 .*label 10"):
        registry.read_split(settings(root, name), "train")


def test_command_line(root, name, tmp_path):
    run_main(
        f"--flagfile=config/config_{name}.cfg",
        f"--data_dir={root}",
        f"--output_dir={tmp_path / 'out'}",
        "--patch_dim=8",
        "--contr_dim=8",
        "--batch_size=16",
        "--max_epochs=1",
        "--logger=none",
    )
    assert (tmp_path / "out" / name / "checkpoints" / "best.ckpt").is_file()


def test_colour_arrays_become_channels_first():
    """The arrays as torchvision reads CIFAR; its files have checksums, so a test cannot make any
    that it would read."""
    data = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    found = image_set(SimpleNamespace(data=data, targets=[0, 1, 2, 0, 1, 2], classes=list("abc")))
    assert np.array_equal(found.images, data.transpose(0, 3, 1, 2))
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.classes == ["a", "b", "c"]


@pytest.mark.parametrize("cifar", ["CIFAR10", "CIFAR100"])
def test_cifar_file_with_a_wrong_checksum(tmp_path, cifar):
    assert not check(cifar, tmp_path)
    path = files_of(cifar, tmp_path)[0][0]
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    with pytest.raises(UserError) as error:
        registry.read_split(Settings(dataset=cifar, data_dir=str(tmp_path)), "train")
    assert str(path) in str(error.value) and "checksum" in str(error.value)


@pytest.mark.parametrize("cifar", ["CIFAR10"])
def test_no_files_and_no_internet(tmp_path, cifar):
    nowhere = tmp_path / "nowhere"
    flags = f"--dataset={cifar}", f"--data_dir={nowhere}", f"--output_dir={tmp_path}"
    said = run_main(*flags, "--patch_dim=8", "--contr_dim=8", ok=False).stderr
    assert "data_batch_1" in said and str(nowhere / "cifar-10-batches-py") in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not list(nowhere.rglob("*"))


def pack(root, name, place):
    """Put the files of a data set into archives at a place below the root, and remove them."""
    (root / place).mkdir(exist_ok=True)
    for path in sorted((root / name / "raw").glob("*-ubyte")):
        (root / place / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()


def know(monkeypatch, name, root):
    """Have torchvision know the archives in a folder as those of a data set."""
    names = [file for file, _ in datasets.MNIST.resources]
    sums = [hashlib.md5((root / file).read_bytes()).hexdigest() for file in names]
    monkeypatch.setattr(getattr(datasets, name), "resources", list(zip(names, sums, strict=True)))


@pytest.mark.parametrize("place", ["{}/raw", "{}", "."])
def test_archives_are_unpacked_and_stay(root, name, place, monkeypatch):
    place = place.format(name)
    pack(root, name, place)
    know(monkeypatch, name, root / place)
    archives = {path: path.read_bytes() for path in root.rglob("*.gz")}
    assert len(archives) == 4
    downloader(name)(settings(root, name))
    assert {path: path.read_bytes() for path in root.rglob("*.gz")} == archives
    assert len([path for path in root.rglob("*") if path.is_file()]) == 8
    test_idx_is_read_exactly(root, name)


def test_archives_packed_anew_are_taken_in_their_place_alone(root, name):
    pack(root, name, ".")
    with pytest.raises(UserError, match=f"no known archive.*{name}/raw if it is right") as error:
        downloader(name)(settings(root, name))
    assert str(root / "train-images-idx3-ubyte.gz") in str(error.value)
    for path in root.glob("*.gz"):
        path.rename(root / name / "raw" / path.name)
    downloader(name)(settings(root, name))
    test_idx_is_read_exactly(root, name)


def test_archives_of_another_data_set(root, name, monkeypatch):
    other = {"MNIST": "FashionMNIST", "FashionMNIST": "MNIST"}[name]
    pack(root, name, ".")
    know(monkeypatch, other, root)
    unpack(name, root)
    assert not check(name, root)
    for path in root.glob("*.gz"):
        path.rename(root / name / path.name)
    with pytest.raises(UserError, match=f"is an archive of {other}, not of {name}"):
        unpack(name, root)


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "a byte", "too much"])
def test_damaged_archive(root, name, damage):
    pack(root, name, f"{name}/raw")
    path = root / name / "raw" / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut short": whole[:-9],
            "empty": b"",
            "text": b"<html>404 Not Found</html>",
            "a byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            "too much": gzip.compress(gzip.decompress(whole) + bytes(2**26), 1),
        }[damage]
    )
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as error:
        downloader(name)(settings(root, name))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(root.rglob("*")) == before


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    """(name, arrays): an archive in tmp_path of 10 images a file, which torchvision knows."""
    source = getattr(datasets, request.param)
    rng, images, members = np.random.default_rng(0), [], {}
    for file, _ in (*source.train_list, *source.test_list):
        images.append(rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8))
        labels = {"labels" if request.param == "CIFAR10" else "fine_labels": list(range(10))}
        members[file] = pickle.dumps({"data": images[-1].reshape(10, -1)} | labels)
    members[source.meta["filename"]] = pickle.dumps({source.meta["key"]: list("abcdefghij")})
    sums = {file: hashlib.md5(content).hexdigest() for file, content in members.items()}
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[file, sums[file]] for file, _ in getattr(source, part)])
    known = source.meta | {"md5": sums[source.meta["filename"]]}
    monkeypatch.setattr(source, "meta", known)
    path = tmp_path / source.filename
    with tarfile.open(path, "w:gz") as archive:
        for file, content in members.items():
            entry = tarfile.TarInfo(f"{source.base_folder}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return request.param, images, path


def test_archive_of_cifar_is_unpacked_and_stays(cifar, tmp_path):
    name, images, path = cifar
    whole = path.read_bytes()
    s = Settings(dataset=name, data_dir=str(tmp_path))
    downloader(name)(s)
    assert path.read_bytes() == whole
    assert np.array_equal(registry.read_split(s, "train").images, np.concatenate(images[:-1]))
    assert np.array_equal(registry.read_split(s, "test").images, images[-1])


def test_damaged_archive_of_cifar(cifar, tmp_path):
    name, _, path = cifar
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="wrong checksum") as error:
        downloader(name)(Settings(dataset=name, data_dir=str(tmp_path)))
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
