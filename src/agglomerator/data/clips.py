"""Moving pictures: files and folders of frames -> frames, and pictures -> MP4.

Pillow reads GIF, PNG and WebP, PyAV (FFmpeg's libraries, which come with it) everything else.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from agglomerator.data.decode import bits_of, formats, of_8_bits, pixels_of
from agglomerator.data.sets.folder import images_below
from agglomerator.util.errors import UserError
from agglomerator.util.files import written_whole
from agglomerator.util.terminal import say

MOST_FRAMES = 300
MOST_PIXELS = 256  # a side of the frames that are shown
OF_PILLOW = "GIF", "PNG", "WEBP"
RATE = 10.0  # frames a second, where a clip does not tell
FASTEST = 50.0  # that a GIF can be


@dataclass(frozen=True)
class Frames:
    """The frames of a clip.

    Attributes:
        images: (F, n_channels, S, S) uint8, what the network sees.
        shown: (F, n_channels, H, H) uint8, the same for people.
        rate: frames a second.
    """

    images: torch.Tensor
    shown: torch.Tensor
    rate: float


def read_frames(path, size, n_channels, most=MOST_FRAMES):
    """Read a clip. Its middle square is cut out, as of every image.

    Args:
        path: of a GIF, MP4 or other file, or of a folder of images, whose frames come in the order
            of their names; numbers in names count by their value.
        size: side S of the frames.
        n_channels: 1 or 3.
        most: frames to read; a line says so if there are more.

    Returns:
        `Frames`.

    Raises:
        UserError: there is nothing, or not two frames, or they cannot be read, or differ in size.
    """
    path = Path(path)
    where = f"--images={path}"
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder; check the path.")
    folder = path.is_dir()
    opened = _of_folder(path, where) if folder else _of_file(path)
    images, shown, first, more = [], [], None, False
    try:
        rate, frames = next(opened), opened
        for number, (name, frame) in enumerate(islice(frames, most + 1)):
            more = number == most
            if more:
                break
            first = (name, frame.size) if first is None else first
            if frame.size != first[1]:
                raise UserError(
                    f"{where}: {name} has {_in_words(frame.size)} pixels, {first[0]} "
                    f"{_in_words(first[1])}; give all frames one size."
                )
            images.append(pixels_of(frame, size, n_channels))
            side = min(max(min(frame.size), size), max(MOST_PIXELS, size))
            shown.append(pixels_of(frame, side, n_channels))
    except UserError:
        raise
    except Exception as error:  # damaged files raise anything
        what = f"frame {len(images)} " if images else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: {what}cannot be read as a clip ({reason}); give a GIF, an MP4 or "
            "a folder of frames."
        ) from None
    if more:
        say(f"{where}: the first {most} frames are taken.")
    if len(images) < 2:
        raise UserError(
            f"{where}: holds {'one image' if images else 'no image'}, not a clip; give a "
            "GIF, an MP4 or a folder of frames, or leave out --video."
        )
    return Frames(torch.stack(images), torch.stack(shown), rate)


def _in_words(size):
    return "x".join(map(str, size))


def _of_folder(path, where):
    """Yield the rate, then names and frames of a folder of images."""
    yield RATE
    paths, others = images_below(path)
    if others:
        say(f"{where}: left out {sum(others.values())} files that are no images.")
    folders = sorted({str(Path(each).parent) for each in paths})
    if len(folders) > 1:
        raise UserError(
            f"{where}: its frames lie in {len(folders)} folders, as {folders[0]} and {folders[1]}; "
            "name the folder of one clip."
        )
    paths = sorted(paths, key=_by_numbers)
    bits = _most_bits(paths[: MOST_FRAMES + 1])
    for each in paths:
        with open(each, "rb") as file, Image.open(file, formats=formats()) as image:
            yield Path(each).name, ImageOps.exif_transpose(of_8_bits(image, file, bits))


def _most_bits(paths):
    """The bits of a value in the frame that has most, so that all frames are as bright. Frames that
    cannot be read are found later."""
    most = 0
    for path in paths:
        with (
            suppress(Exception),
            open(path, "rb") as file,
            Image.open(file, formats=formats()) as image,
        ):
            most = max(most, bits_of(image, file))
    return most


def _by_numbers(path):
    """A key that sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def _of_file(path):
    """Yield the rate, then names and frames of a file."""
    with open(path, "rb") as file:
        try:
            image = Image.open(file, formats=OF_PILLOW)
        except UnidentifiedImageError:
            file.seek(0)
            yield from _of_video(file)
            return
        image.load()
        yield _rate_of(image)
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            yield f"frame {number}", frame


def _rate_of(image):
    """Frames a second of an animation, by the median of its pauses; RATE where it tells none."""
    pauses = []
    with suppress(Exception):  # a damaged frame is found later
        for frame in islice(ImageSequence.Iterator(image), MOST_FRAMES):
            pauses.append(frame.info.get("duration", 0))
    pause = median(pauses) if pauses else 0
    return min(1000 / pause, FASTEST) if pause else RATE


def _of_video(file):
    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        yield float(container.streams.video[0].average_rate or RATE)
        for number, frame in enumerate(container.decode(video=0)):
            image = frame.to_image()
            yield f"frame {number}", image.rotate(frame.rotation, expand=True)


def write_mp4(pictures, path, rate):
    """Write pictures as an MP4, in H.264 if FFmpeg has it here, else in MPEG-4.

    Args:
        pictures: paths of PNG files of one size.
        path: of the file.
        rate: pictures a second.
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with (
        written_whole(Path(path), "wb") as file,
        av.open(file, "w", format="mp4") as container,
    ):
        stream = None
        for picture in pictures:
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            pixels = pixels[: len(pixels) // 2 * 2, : pixels.shape[1] // 2 * 2]  # codecs want even
            if stream is None:
                stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
