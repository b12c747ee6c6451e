import io

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from agglomerator.commands.report import draw_confusion
from agglomerator.hierarchy.figures import draw_embedding
from agglomerator.hierarchy.marks import Marks
from agglomerator.util.figure import Figure, as_drawn

NAMES = ["$b$_^{", r"\frac", "_d", "Кот", "قطة", "a\udcff", "\x07", "e\ufdd0", "ü😀中"]


def drawn(figure, dpi=60):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_letter_by_letter_and_what_no_font_has_as_its_code():
    figure = draw_confusion(
        np.eye(9, dtype=int), NAMES, {"dataset": "ImageFolder", "top1": 1, "images": 9}
    )
    texts = drawn(figure)
    assert {"$b$_^{", r"\frac", "_d", "Кот", r"a\udcff", r"\x07", r"e\ufdd0"} <= texts
    assert not any(text.get_parse_math() for text in figure.findobj(Text))
    assert as_drawn("ü$") == "ü$" and as_drawn("a\udcff") == r"a\udcff"


@pytest.mark.filterwarnings("error")
def test_legends_have_every_class():
    generator = np.random.default_rng(0)
    xy, labels = generator.normal(size=(90, 2)), np.arange(90) % 9
    points = type("Points", (), dict(pca=xy, tsne=None, labels=labels, shares=[0.5, 0.2]))
    marks = Marks.of(NAMES, None, range(9))
    figure = draw_embedding(points, marks, NAMES, "$t$: " + "long_name_of_a_run" * 10)
    drawn(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:4] == NAMES[:4] and len(legend) == 9


def test_titles_are_not_cut_off():
    for title in ("a_name_without_end" * 9, "short words " * 20, "中" * 80, "fits"):
        figure = Figure(figsize=(4, 3), layout="constrained")
        figure.suptitle(title)
        figure.subplots()
        drawn(figure)
        assert figure._suptitle.get_window_extent().width <= figure.bbox.width
        lines = figure._suptitle.get_text().split("\n")
        assert (len(lines) > 1) == (title != "fits")
        figure.clear()


def test_a_letter_comes_from_another_font_where_one_has_it():
    with matplotlib.rc_context({"font.family": "cmr10"}):
        figure = Figure()
        figure.text(0.5, 0.5, "Ж")
        assert "Ж" in drawn(figure)
        assert len(figure.texts[0].get_fontfamily()) == 2
