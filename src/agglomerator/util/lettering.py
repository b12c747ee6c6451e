"""Texts in pictures: as they are, whatever users call their runs, classes and files."""

import textwrap
from contextlib import suppress
from functools import lru_cache

import matplotlib.figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.ft2font import FaceFlags
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows its texts letter by letter: `$` begins no formula.

    Letters that the font lacks come from another font of the machine. Where no font has one, its
    code stands in its place, as \\u4e2d. Titles that are too long continue on the next line.
    """

    def draw(self, renderer):
        texts = self.findobj(Text)
        ticks = [axis for ax in self.axes for axis in (ax.xaxis, ax.yaxis)]
        labels = {axis: [text.get_text() for text in axis.get_ticklabels()] for axis in ticks}
        letters = set("".join(text.get_text() for text in texts))
        fonts = {findfont(text.get_fontproperties()) for text in texts}
        families, codes = _fallback(frozenset(letters), frozenset(fonts))
        for text in texts:
            text.set(parse_math=False, text=text.get_text().translate(codes))
            text.set_fontfamily(list(dict.fromkeys((*text.get_fontfamily(), *families))))
        for axis, names in labels.items():
            if isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels([name.translate(codes) for name in names])
        for text in (self._suptitle, self._supxlabel):
            if text is not None:
                _break_lines(text, renderer, self.bbox.width * 0.98)
        super().draw(renderer)


def shown(text):
    """The text as a `Figure` shows it: letters that no font has as their codes."""
    return text.translate(_fallback(frozenset(text), frozenset((findfont(FontProperties()),)))[1])


@lru_cache
def _fallback(letters, fonts):
    """The families of further fonts that have letters which one of some fonts (paths) lacks; and
    the codes, by letter, of those that no font has."""
    lacking = {c for c in letters if c != "\n" and not all(_has(path, c) for path in fonts)}
    families = []
    if lacking:
        _find_new_fonts()
        plain = [font for font in fontManager.ttflist if "Last Resort" not in font.name]  # boxes
        for font in sorted(plain, key=lambda f: (f.style != "normal", str(f.weight), f.name)):
            found = {c for c in lacking if font.name not in families and _has(font.fname, c)}
            families += [font.name] * bool(found)
            lacking -= found
            if not lacking:
                break
    return families, {ord(c): ascii(c)[1:-1] for c in lacking}


def _find_new_fonts():
    """Make fonts known that were installed after matplotlib listed those of the machine."""
    known = {font.fname for font in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:
        with suppress(Exception):  # it cannot be drawn
            fontManager.addfont(path)


def _has(path, letter):
    """Whether a font can draw a letter. Fonts of coloured pixels cannot be drawn at all."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # damaged
        return False
    drawn = font.scalable and FaceFlags.COLOR not in font.face_flags
    return drawn and font.get_char_index(ord(letter)) > 0


def _break_lines(text, renderer, most):
    """Break the lines of a text so that none is wider than so many pixels."""
    lines = text.get_text().split("\n")
    for length in range(max(map(len, lines)), 10, -1):
        if text.get_window_extent(renderer).width <= most:
            break
        text.set_text("\n".join(textwrap.fill(line, length) for line in lines))
