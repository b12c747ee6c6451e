"""Text in pictures: shown as it is, whatever users call their runs, classes and files."""

import textwrap
from contextlib import suppress
from functools import lru_cache

import matplotlib.figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.ft2font import FaceFlags
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows every text letter by letter: `$` does not begin a formula.

    A letter that the font lacks comes from another font of the machine. If no font has it, its
    code is shown, for example \\u4e2d. Titles that are too long continue on the next line.
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
    """The text as a `Figure` shows it, with codes for letters that no font has."""
    return text.translate(_fallback(frozenset(text), frozenset((findfont(FontProperties()),)))[1])


@lru_cache
def _fallback(letters, fonts):
    """How to show letters that some of the fonts lack.

    Args:
        letters: frozenset of characters.
        fonts: frozenset of paths.

    Returns:
        (families, codes): names of other font families that have these letters; and a dict from
        letter to code for those that no font has.
    """
    lacking = {c for c in letters if c != "\n" and not all(_has(path, c) for path in fonts)}
    families = []
    if lacking:
        _find_new_fonts()
        plain = [f for f in fontManager.ttflist if "Last Resort" not in f.name]  # draws only boxes
        for font in sorted(plain, key=lambda f: (f.style != "normal", str(f.weight), f.name)):
            found = {c for c in lacking if font.name not in families and _has(font.fname, c)}
            families += [font.name] * bool(found)
            lacking -= found
            if not lacking:
                break
    return families, {ord(c): ascii(c)[1:-1] for c in lacking}


def _find_new_fonts():
    """Add the fonts that were installed after matplotlib made its list."""
    known = {font.fname for font in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:
        with suppress(Exception):  # matplotlib cannot draw this font
            fontManager.addfont(path)


def _has(path, letter):
    """Whether matplotlib can draw a letter with a font. It cannot use fonts of coloured pixels."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # damaged
        return False
    drawn = font.scalable and FaceFlags.COLOR not in font.face_flags
    return drawn and font.get_char_index(ord(letter)) > 0


def _break_lines(text, renderer, most):
    """Break the lines of a text so that none is wider than `most` pixels."""
    lines = text.get_text().split("\n")
    for length in range(max(map(len, lines)), 10, -1):
        if text.get_window_extent(renderer).width <= most:
            break
        text.set_text("\n".join(textwrap.fill(line, length) for line in lines))
