import numpy as np
import pytest
import torch
from conftest import run_main, weights
from PIL import Image

from agglomerator.config import Settings
from agglomerator.data import masks
from agglomerator.data.decode import read_image, upright_size
from agglomerator.data.images import ImageFiles
from agglomerator.data.masks import (
    NOWHERE,
    masks_beside,
    of_folder,
    of_test,
    of_training,
    read_mask,
)
from agglomerator.data.module import ImageDataModule
from agglomerator.data.sets import folder as folders
from agglomerator.util.errors import UserError

TINY = (
    "--dataset=ImageFolder", "--image_size=8", "--conv_image_size=2", "--patch_dim=8",
    "--contr_dim=8", "--batch_size=4", "--max_epochs=1", "--learning_rate=0.002", "--logger=none",
    "--accelerator=cpu", "--num_workers=0",
)  # fmt: skip


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.uint8(values))
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """cat and dog, 10 images of each to train on and 4 to test, 16x12. The parts of image i are the
    columns below i % 3 + 4 and the others; cats have objects, too. Dog 3 has no mask."""
    for split, n in (("train", 10), ("test", 4)):
        for kind in ("cat", "dog"):
            for i in range(n):
                name = f"{split}/{kind}/{i}.png"
                save(tmp_path / name, np.full((12, 16, 3), 20 * i + 30))
                parts = np.ones((12, 16)) + (np.arange(16) >= i % 3 + 4)
                parts[:2], parts[-2:] = 0, NOWHERE
                if (split, kind, i) != ("test", "dog", 3):
                    save(tmp_path / "parts" / name, parts)
                if kind == "cat":
                    save(tmp_path / "objects" / name, parts == 1)
    return tmp_path


def settings(root, **changes):
    flags = dict(dataset="ImageFolder", data_dir=str(root), image_size=8, conv_image_size=2,
                 n_classes=2, num_workers=0)  # fmt: skip
    return Settings(**flags | changes)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (42, 30)])
def test_a_mask_is_cut_as_its_image(tmp_path, shape):
    segments = np.arange(shape[0] * shape[1]).reshape(shape) % 250
    image, mask = (save(tmp_path / name, segments) for name in ("image.png", "mask.png"))
    side = min(shape)
    whole = read_mask(mask, image, side)
    np.testing.assert_array_equal(whole, read_image(image, side, 1)[0])
    half = read_mask(mask, image, side // 2)
    nearest = (np.arange(side // 2) + 0.5) * side / (side // 2)
    rows = nearest.astype(int)
    np.testing.assert_array_equal(half, whole[rows[:, None], rows])


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_a_mask_is_of_the_upright_image(tmp_path, ending):
    pixels = np.arange(6 * 4).reshape(6, 4) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    lying = Image.fromarray(np.uint8(np.rot90(pixels)))
    image = save(tmp_path / f"image.{ending}", lying, exif=exif, quality=100)
    assert upright_size(image) == (4, 6)
    seen = read_image(image, 4, 1)[0].numpy().astype(int)
    assert np.abs(seen - read_mask(save(tmp_path / "mask.png", pixels), image, 4)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "1", "2 bits", "4 bits"])
def test_one_channel_of_any_depth(tmp_path, mode):
    segments = np.arange(16).reshape(4, 4) % (2 if mode == "1" else 4)
    path, image = tmp_path / "mask.png", save(tmp_path / "x.png", np.zeros((4, 4)))
    if mode.endswith("bits"):
        write_gray(path, segments, int(mode[0]))
        with Image.open(path) as stored:
            assert np.asarray(stored).max() > 3  # Pillow scales them
    elif mode == "P":
        of_palette = Image.fromarray(np.uint8(segments))
        of_palette.putpalette([255 - i % 256 for i in range(768)])
        save(path, of_palette)
    else:
        save(path, Image.fromarray(segments > 0 if mode == "1" else np.uint8(segments)))
    np.testing.assert_array_equal(read_mask(path, image, 4), segments)


def write_gray(path, values, bits):
    """A gray PNG of few bits, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width = values.shape
    rows = b""
    for row in values:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


MASK = "parts/test/cat/1.png"
FAULTS = {
    "other size": (lambda path: save(path, np.ones((12, 15))), "a mask of 15x12, but .*has 16x12"),
    "turned": (lambda path: save(path, np.ones((16, 12))), "a mask of 12x16, but .*has 16x12"),
    "channels": (lambda path: save(path, np.ones((12, 16, 3))), "mode RGB; save it with one"),
    "16 bits": (lambda path: save(path, Image.new("I;16", (16, 12))), "mode I;16; save it"),
    "no PNG": (
        lambda path: save(path, np.ones((12, 16)), format="JPEG"),
        "cannot be read as a mask",
    ),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a mask"),
    "cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        "cannot be read as a mask",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_file(root, fault):
    spoil, words = FAULTS[fault]
    spoil(root / MASK)
    truth = of_folder(settings(root, mode="islands", images=str(root)))
    with pytest.raises(UserError, match=words) as error:
        list(truth.batches(3))
    assert str(root / MASK) in str(error.value) and "\n" not in str(error.value)


def test_masks_that_fit_no_image(root, capfd):
    images = [str(path) for path in sorted((root / "test").rglob("*.png"))]
    save(root / "parts/test/cat/9.png", np.ones((12, 16)))
    assert not masks_beside(root, "test", images, 8)["parts"].known[-1]
    said = capfd.readouterr().out
    assert "left out 1 files" in said and str(root / "parts/test/cat/9.png") in said
    with pytest.raises(UserError, match="no image has this name; .* should be .*x.png"):
        masks_beside(root, "test", [str(root / "test/cat/x.jpg")], 8)
    save(root / "test/cat/1.jpg", np.ones((12, 16)))
    with pytest.raises(UserError, match="1.png: the mask of 2 images"):
        masks_beside(root, "test", [*images, str(root / "test/cat/1.jpg")], 8)
    for path in (root / "objects/test").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="objects/test: no masks in it"):
        masks_beside(root, "test", images, 8)


@pytest.mark.parametrize("share", [folders.MEMORY_SHARE, 0])
def test_images_with_masks_in_batches(root, share, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY_SHARE", share)
    data = ImageDataModule(settings(root))
    data.setup()
    assert isinstance(data.test.dataset, ImageFiles) == (not share)
    truth = of_test(data)
    assert len(truth) == 7  # of 8: dog 3 has none
    batches = list(truth.batches(3))
    assert [len(images) for images, _ in batches] == [3, 3, 1]
    images, found = batches[1]
    assert images[:, 0, 0, 0].tolist() == [90, 30, 50]  # cat 3, dogs 0 and 1
    assert (found["objects"][1:] == NOWHERE).all() and (found["objects"][0] != NOWHERE).any()
    # The middle 12x12 of 16x12 begins at column 2, and 8 of 12 columns are kept.
    assert found["parts"][0, 4].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert found["parts"][1, 4].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert found["parts"][2, 4].tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    assert (found["parts"][0, 0] == 0).all() and (found["parts"][0, -1] == NOWHERE).all()
    other = of_folder(settings(root, mode="islands", images=str(root)))
    for (one, of_one), (two, of_two) in zip(truth.batches(7), other.batches(7), strict=True):
        assert one.equal(two) and all(of_one[name].equal(of_two[name]) for name in of_one)


def test_a_folder_may_be_scored_in_part(root, capfd):
    own = settings(root, mode="islands", images=str(root), batch_size=2, limit_test=2)
    assert len(of_folder(own)) in (3, 4)  # one of all has no mask
    assert "--limit_test=2: 4 of 8 test images are scored" in capfd.readouterr().out


def test_images_kept_larger_than_they_are_scored(root):
    for kind in ("", "parts/", "objects/"):
        (root / f"{kind}test").rename(root / f"{kind}val")  # as ImageNet has it
    data = ImageDataModule(settings(root, dataset="IMAGENET"))
    data.setup()
    assert data.test.dataset.images.shape[2:] == (9, 9)
    ((images, found),) = of_test(data).batches(10)
    assert images.shape[2:] == found["parts"].shape[1:] == (8, 8)


def test_without_masks(root):
    for kind in masks.MASKS:
        (root / kind).rename(root / f"no_{kind}")
    data = ImageDataModule(settings(root))
    data.setup()
    assert of_test(data) is None and of_training(settings(root)) == {}
    assert of_folder(settings(root, mode="islands", images=str(root))) is None
    digits = ImageDataModule(Settings(dataset="digits", n_channels=1, image_size=8,
                                      conv_image_size=2))  # fmt: skip
    digits.setup()
    assert of_test(digits) is None and of_training(digits.settings) == {}


def test_training_masks_are_spread_over_the_images(root):
    found = of_training(settings(root), most=5)
    assert found["parts"].shape == found["objects"].shape == (5, 8, 8)
    whole = of_training(settings(root))
    assert whole["parts"].shape[0] == 20 and whole["objects"].shape[0] == 10
    np.testing.assert_array_equal(found["parts"][[0, -1]], whole["parts"][[0, -1]])
    scenes = of_training(Settings(dataset="PartWhole", n_classes=10), most=3)
    assert scenes["parts"].shape == (3, 32, 32) and scenes["objects"].max() == 1


def test_training_reads_no_masks(root, tmp_path):
    """Masks that cannot be read do not disturb it, and it learns the same without them."""
    for path in [*(root / "parts").rglob("*.png"), *(root / "objects").rglob("*.png")]:
        path.write_bytes(b"no mask")
    flags = *TINY, f"--data_dir={root}", "--agreement=1", "--seed=1"
    run_main(*flags, f"--output_dir={tmp_path}/with")
    for kind in masks.MASKS:
        (root / kind).rename(root / f"no_{kind}")
    run_main(*flags, f"--output_dir={tmp_path}/without")
    one, two = (
        weights(tmp_path / each / "ImageFolder/checkpoints/last.ckpt")
        for each in ("with", "without")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
