"""Figures as files, with texts that look as they are written, whatever users call their runs and
classes."""

import io
import textwrap
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import matplotlib.figure
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.ft2font import FaceFlags
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from agglomerator.util.files import written_whole

PHOTOGRAPH = 128  # pixels: in PDF and SVG, viewers would blur the edges of smaller ones
# Journals refuse the fonts of kind 3 that matplotlib embeds otherwise. Equal figures, equal files.
STYLE = {"pdf.fonttype": 42, "svg.hashsalt": "agglomerator"}
NO_DATE = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that draws its texts letter by letter: `$` begins no formula.

    If a font lacks a letter, another font of the machine draws it. If no font has it, its code
    stands in its place, as \\u4e2d. Long titles continue on the next line.
    """

    def write(self, stem, kinds, dpi):
        """Write it as files, whole or not at all.

        Args:
            stem: path without the ending.
            kinds: endings of the files, such as "png", "pdf", "svg".
            dpi: dots an inch, of PNG. Photographs in the other kinds keep their own pixels.

        Returns:
            The paths.
        """
        paths = [Path(f"{stem}.{kind}") for kind in kinds]
        images = [image for image in self.findobj(AxesImage) if min(image.get_size()) >= PHOTOGRAPH]
        usual = {image: image.get_interpolation() for image in images}
        for path, kind in zip(paths, kinds, strict=True):
            for image, interpolation in usual.items():
                image.set_interpolation(interpolation if kind == "png" else "none")
            with written_whole(path, "wb") as file, rc_context(STYLE):
                self.savefig(file, format=kind, dpi=dpi, metadata=NO_DATE.get(kind))
        return paths

    def _repr_png_(self):
        """How notebooks show it, with pyplot or without."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def draw(self, renderer):
        texts = self.findobj(Text)
        ticks = [axis for ax in self.axes for axis in (ax.xaxis, ax.yaxis)]
        named = [axis for axis in ticks if isinstance(axis.get_major_locator(), FixedLocator)]
        labels = {axis: [text.get_text() for text in axis.get_ticklabels()] for axis in named}
        letters = set("".join(text.get_text() for text in texts))
        fonts = {findfont(font) for font in {text.get_fontproperties() for text in texts}}
        families, codes = _fallback(frozenset(letters), frozenset(fonts))
        for text in texts:
            text.set(parse_math=False, text=text.get_text().translate(codes))
            text.set_fontfamily(list(dict.fromkeys((*text.get_fontfamily(), *families))))
        for axis, names in labels.items():
            axis.set_ticklabels([name.translate(codes) for name in names])
        for text in (self._suptitle, self._supxlabel):
            if text is not None:
                _break_lines(text, renderer, self.bbox.width * 0.98)
        super().draw(renderer)


def as_drawn(text):
    """The text as a `Figure` draws it: codes in place of letters that no font has.

    Example:
        >>> as_drawn("cat$" + chr(0xDCFF))
        'cat$\\\\udcff'
    """
    return text.translate(_fallback(frozenset(text), frozenset((findfont(FontProperties()),)))[1])


@lru_cache
def _fallback(letters, fonts):
    """Where to find the letters that a font lacks.

    Args:
        letters: frozenset of the letters to draw.
        fonts: frozenset of paths of the fonts to draw them in.

    Returns:
        (families, codes): families of further fonts that have what one of these lacks, and by
        ordinal the codes of letters that no font has.
    """
    missing = {c for c in letters if c != "\n" and not all(_has(path, c) for path in fonts)}
    families = []
    if missing:
        _find_new_fonts()
        real = [font for font in fontManager.ttflist if "Last Resort" not in font.name]  # boxes
        for font in sorted(real, key=lambda f: (f.style != "normal", str(f.weight), f.name)):
            new = {c for c in missing if font.name not in families and _has(font.fname, c)}
            families += [font.name] * bool(new)
            missing -= new
            if not missing:
                break
    return families, {ord(c): ascii(c)[1:-1] for c in missing}


def _find_new_fonts():
    """Tell matplotlib of fonts that were installed after it listed the fonts of the machine."""
    known = {font.fname for font in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:
        with suppress(Exception):  # a font that cannot be drawn
            fontManager.addfont(path)


def _has(path, letter):
    """Whether a font can draw a letter. Fonts of coloured pixels cannot be drawn at all."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # a damaged file
        return False
    drawable = font.scalable and FaceFlags.COLOR not in font.face_flags
    return drawable and font.get_char_index(ord(letter)) > 0


def _break_lines(text, renderer, most):
    """Break the lines of a text so that none is wider than `most` pixels."""
    lines = text.get_text().split("\n")
    for length in range(max(map(len, lines)), 10, -1):
        if text.get_window_extent(renderer).width <= most:
            break
        text.set_text("\n".join(textwrap.fill(line, length) for line in lines))
