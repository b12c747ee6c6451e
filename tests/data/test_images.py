import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch.utils.data import Subset

from agglomerator.config import Settings
from agglomerator.data.classes import ClassMap
from agglomerator.data.decode import UnreadableImage, read_image, to_8_bits
from agglomerator.data.images import ImageSet, OnDevice, photographs

GRAY, RGB, GRAY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # PNG's types of colour


def chunk(name, content):
    size, check = len(content), zlib.crc32(name + content)
    return struct.pack(">I", size) + name + content + struct.pack(">I", check)


def png(path, values, colour, depth=16, clear=None):
    """A PNG of values (H, W, channels) of so many bits, which Pillow writes in part only."""
    height, width, _ = values.shape
    rows = values.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth)[::-1] & 1).reshape(height, -1)
        packed = [np.packbits(row.astype(np.uint8)).tobytes() for row in bits]
    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if clear is not None:
        content += chunk(b"tRNS", np.array(clear, ">u2").tobytes())
    content += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    path.write_bytes(content + chunk(b"IEND", b""))
    return path


def read(path, n_channels=1):
    return read_image(path, 8, n_channels).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("colour", [GRAY, GRAY_ALPHA, RGB, RGB_ALPHA])
def test_values_of_fewer_bits_than_16_keep_their_range(tmp_path, bits, colour):
    """A ramp from black to white, of so many bits in a PNG of 16."""
    ramp = np.arange(64).reshape(8, 8) * (2**bits - 1) // 63
    values = np.stack([ramp] * (3 if colour & 2 else 1), -1)
    if colour & 4:
        values = np.concatenate([values, np.full((8, 8, 1), 65535)], -1)
    found = read(png(tmp_path / "x.png", values, colour), 3)
    assert np.array_equal(found, np.stack([ramp >> (bits - 8)] * 3, -1))


def test_values_that_need_all_16_bits_keep_their_upper_8(tmp_path):
    values = np.full((8, 8, 1), 9 * 256 + 200)
    values[0, 0] = 40000
    found = read(png(tmp_path / "x.png", values, GRAY))
    assert found[0, 0] == 40000 >> 8 and set(found.flatten()[1:]) == {9}


@pytest.mark.parametrize("colour", [GRAY, RGB])
@pytest.mark.parametrize("other", [1000, 65535])
def test_clear_value_of_16_bits(tmp_path, colour, other):
    """It comes out white, and a value whose upper byte is the same does not."""
    values = np.full((8, 8, 3 if colour else 1), 40)
    values[:, 4:], values[4, 4] = 41, other
    clear = [40] * values.shape[-1]
    found = read(png(tmp_path / "x.png", values, colour, clear=clear))
    assert (found[:, :4] == 255).all() and (found[5:, 4:] < 20).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_clear_value_of_few_bits(tmp_path, depth):
    """Gray values 0 and 1, of which 0 is black and 1 is clear, so white."""
    values = np.zeros((8, 8, 1), int)
    values[:, 4:] = 1
    found = read(png(tmp_path / "x.png", values, GRAY, depth, clear=[1]))
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [1, 255])
def test_float_with_a_value_that_is_not_finite(tmp_path, bad, scale):
    values = np.linspace(0, scale, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected = read(tmp_path / "x.tif")
    assert expected.max() == 255
    values[2, 3] = bad
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected[2, 3] = 0
    assert np.array_equal(read(tmp_path / "x.tif"), expected)


def test_float_without_a_finite_value(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match="x.tif: .*no finite value"):
        read(tmp_path / "x.tif")


def test_float_a_little_above_1_is_on_the_scale_0_to_1():
    assert to_8_bits(np.array([0, 0.5, 1.02], np.float32)).tolist() == [0, 127, 255]


@pytest.mark.parametrize("greatest, bits", [(2**20, 21), (2**31 - 1, 31)])
def test_integers_of_32_bits(tmp_path, greatest, bits):
    values = np.full((8, 8), greatest, np.int32)
    values[:, 4:], values[0, 0] = greatest // 2, -5
    Image.fromarray(values).save(tmp_path / "x.tif")
    found = read(tmp_path / "x.tif")
    assert found[0, 0] == 0 and found[1, 0] == greatest >> (bits - 8)
    assert found[1, 4] == greatest // 2 >> (bits - 8)


def tiff(path, values, **tags):
    """A TIFF of gray values; tags by number in place of those that Pillow writes."""
    Image.fromarray(values).save(path, tiffinfo={int(name[1:]): tag for name, tag in tags.items()})
    return path


def test_integers_of_32_bits_without_sign(tmp_path):
    values = np.full((8, 8), 2**32 - 1, np.uint32)
    values[:, 4:] = 2**31
    path = tiff(tmp_path / "x.tif", values.view(np.int32))
    whole = path.read_bytes()
    entry = struct.pack("<HHI", 339, 3, 1)  # SampleFormat: 2, of signed numbers
    assert whole.count(entry) == 1
    start = whole.index(entry) + len(entry)
    path.write_bytes(whole[:start] + struct.pack("<I", 1) + whole[start + 4 :])
    found = read(path)
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 128).all()


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_tiff_in_which_zero_is_white(tmp_path, kind):
    values = np.zeros((8, 8), kind)
    values[:, 4:] = 1 if kind == np.float32 else 65535
    path = tiff(tmp_path / "x.tif", values)
    whole = path.read_bytes()
    entry = struct.pack("<HHII", 262, 3, 1, 1)
    assert whole.count(entry) == 1
    path.write_bytes(whole.replace(entry, struct.pack("<HHII", 262, 3, 1, 0)))
    found = read(path)
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGB", "I;16", "F"])
def test_tiff_is_turned_upright_once(tmp_path, mode):
    """White on the left, which a quarter turn clockwise brings to the top."""
    values = np.zeros((8, 16), np.uint16 if mode == "I;16" else np.uint8)
    values[:, :8] = 255
    image = Image.fromarray(values)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "x.tif", tiffinfo={274: 6})
    found = read_image(tmp_path / "x.tif", 8, 1)[0]
    assert (found[:4] == 255).all() and (found[4:] == 0).all()


def test_range_that_a_file_tells_counts(tmp_path):
    """A dark PGM of values to 1023, of which none is above 63."""
    values = np.full((8, 8), 63, ">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 8 8 1023\n" + values.tobytes())
    assert set(read(tmp_path / "x.pgm").flatten()) == {63 >> 2}


def test_lab_in_gray(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    ImageCms.applyTransform(red, to_lab).save(tmp_path / "x.tif")
    gray = np.array(red.convert("L")).astype(int)
    assert abs(read(tmp_path / "x.tif")[..., 0] - gray).max() < 6
    assert abs(read(tmp_path / "x.tif", 3) - np.array(red).astype(int)).max() < 6


def test_much_text_in_a_png_does_no_harm(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    Image.new("L", (8, 8), 77).save(tmp_path / "x.png", pnginfo=text)
    assert set(read(tmp_path / "x.png").flatten()) == {77}


def test_beyond_the_limits(tmp_path):
    """Both are small files that would take much memory."""
    many = tmp_path / "many.png"
    png(many, np.zeros((1, 1, 1), int), GRAY)
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)
    content = many.read_bytes()
    many.write_bytes(content[:8] + chunk(b"IHDR", header) + content[8 + 25 :])
    long = tmp_path / "long.png"
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * (2**26 + 1), zip=True)
    Image.new("L", (8, 8)).save(long, pnginfo=text)
    for path, words in (many, "2500000000 pixels.*make it smaller"), (long, "without the text"):
        with pytest.raises(UnreadableImage, match=words) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_photographs_keep_their_own_pixels_within_limits(tmp_path):
    pixels = np.random.default_rng(0).integers(255, size=(600, 900, 3), dtype=np.uint8)
    paths = []
    for side in (20, 100, 600):
        paths.append(tmp_path / f"{side}.png")
        Image.fromarray(pixels[:side, : side * 3 // 2]).save(paths[-1])
    small, own, large = photographs(paths, Settings(image_size=32))
    assert [image.shape for image in (small, own, large)] == [(3, s, s) for s in (32, 100, 256)]
    assert (own.numpy() == pixels[:100, 25:125].transpose(2, 0, 1)).all()
    (middle,) = photographs(paths[1:2], Settings(image_size=32, n_channels=1), margin=1.25)
    assert (middle == read_image(paths[1], 100, 1)[:, 10:90, 10:90]).all()


def test_batches_gathered_on_a_device_are_those_of_the_subset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8, generator=generator)
    whole = ImageSet(images, torch.arange(20) % 3, "abc")
    relabelled = ClassMap(("c", "a", "b"), (2, 0, 1)).apply(whole)
    device = torch.device("cpu")
    for dataset in (whole, relabelled):
        subset = Subset(Subset(dataset, range(3, 19)), [9, 2, 2, 15, 0])
        there = OnDevice(subset, device)
        assert len(there) == 5
        for found, expected in zip(
            there.__getitems__([4, 1, 0]), subset.__getitems__([4, 1, 0]), strict=True
        ):
            assert torch.equal(found, expected)
    assert not OnDevice.fits(subset, device)  # it is there already
