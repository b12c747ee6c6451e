import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from agglomerator.data.clips import read_frames, write_mp4
from agglomerator.util.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    """Twelve frames 48 x 64 as PNG files 0.png, ..., 11.png: a bright square moves to the right."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(12):
        pixels = np.full((48, 64, 3), (30, 60, 200), np.uint8)
        pixels[16:32, 8 + 3 * t : 24 + 3 * t] = (230, 220, 40)
        Image.fromarray(pixels).save(folder / f"{t}.png")
    return folder


def write_gif(folder, path, pause):
    frames = [Image.open(folder / f"{t}.png").convert("P") for t in range(12)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pause, loop=0)
    return path


def squares(images):
    """Column of the middle of the bright square in each frame, in shares of the side."""
    bright = images[:, 0].float() > 128
    columns = torch.arange(images.shape[-1]) + 0.5
    return ((bright * columns).sum((1, 2)) / bright.sum((1, 2)) / images.shape[-1]).tolist()


def test_a_folder_a_gif_and_an_mp4_are_read_alike(pictures, tmp_path):
    gif = write_gif(pictures, tmp_path / "clip.gif", 40)
    write_mp4([pictures / f"{t}.png" for t in range(12)], tmp_path / "clip.mp4", 25)
    rates = {pictures: 10, gif: 25, tmp_path / "clip.mp4": 25}
    for path, rate in rates.items():
        frames = read_frames(path, 32, 3)
        assert frames.images.shape == (12, 3, 32, 32) and frames.images.dtype == torch.uint8
        assert frames.shown.shape == (12, 3, 48, 48) and frames.rate == rate
        expected = [(16 + 3 * t - 8) / 48 for t in range(3, 9)]  # of the middle square
        assert squares(frames.images)[3:9] == pytest.approx(expected, abs=0.03)
    assert read_frames(gif, 16, 1).images.shape == (12, 1, 16, 16)


def test_a_clip_has_the_pace_of_most_of_its_frames(pictures, tmp_path):
    gif = write_gif(pictures, tmp_path / "clip.gif", [2000] + 11 * [50])
    assert read_frames(gif, 16, 3).rate == 20


def test_frames_of_more_than_8_bits_are_as_bright_as_each_other(tmp_path):
    """12 bits: the greatest value of the others needs 10 or 11 bits alone."""
    for t, greatest in enumerate((1000, 1030, 4000, 1000)):
        values = np.full((16, 16), 800, np.uint16)
        values[0, 0] = greatest
        Image.fromarray(values).save(tmp_path / f"{t}.png")
    frames = read_frames(tmp_path, 16, 1).images
    assert (frames[:, 0, 8:, 8:] == 800 * 256 // 4096).all()


def test_a_long_clip_is_cut_and_a_line_says_so(pictures, capsys):
    assert len(read_frames(pictures, 16, 3, most=12).images) == 12
    assert capsys.readouterr().out == ""
    assert len(read_frames(pictures, 16, 3, most=5).images) == 5
    assert "the first 5 frames are taken" in capsys.readouterr().out


def test_what_is_no_moving_picture_is_refused_in_one_line(pictures, tmp_path):
    gif = write_gif(pictures, tmp_path / "clip.gif", 40)
    broken, text = tmp_path / "broken.gif", tmp_path / "text.mp4"
    broken.write_bytes(gif.read_bytes()[: gif.stat().st_size // 2])
    text.write_text("no film")
    mp4 = tmp_path / "cut.mp4"
    write_mp4([pictures / f"{t}.png" for t in range(12)], mp4, 25)
    mp4.write_bytes(mp4.read_bytes()[:300])
    empty, one = tmp_path / "empty", tmp_path / "one"
    empty.mkdir()
    one.mkdir()
    Image.new("RGB", (20, 20)).save(one / "0.png")
    words = {
        tmp_path / "none.gif": "no such file or folder",
        broken: "cannot be read as a clip",
        text: "cannot be read as a clip",
        mp4: "cannot be read as a clip",
        empty: "holds no image",
        one: "holds one image",
        pictures / "0.png": "holds one image",
    }
    for path, said in words.items():
        with pytest.raises(UserError, match=said) as error:
            read_frames(path, 16, 3)
        assert f"--images={path}" in str(error.value) and "\n" not in str(error.value)
    for clip in "ab":
        shutil.copytree(pictures, tmp_path / "clips" / clip)
    with pytest.raises(UserError, match="its frames lie in 2 folders, as .*a and .*b; name"):
        read_frames(tmp_path / "clips", 16, 3)
    Image.new("RGB", (64, 40)).save(pictures / "7.png")
    with pytest.raises(UserError, match="7.png has 64x40 pixels, 0.png 64x48"):
        read_frames(pictures, 16, 3)
    (pictures / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="frame 7 cannot be read"):
        read_frames(pictures, 16, 3)


def test_an_mp4_of_odd_size_plays(tmp_path):
    for t in range(3):
        Image.new("RGB", (51, 33), (80 * t, 0, 0)).save(tmp_path / f"{t}.png")
    write_mp4([tmp_path / f"{t}.png" for t in range(3)], tmp_path / "odd.mp4", 2.5)
    with av.open(tmp_path / "odd.mp4") as container:
        assert container.streams.video[0].average_rate == Fraction(5, 2)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 50, 3)] * 3
    assert frames[2][..., 0].mean() == pytest.approx(160, abs=12)
