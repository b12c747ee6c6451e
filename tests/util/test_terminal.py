import io

import pytest

from agglomerator.util.files import written_whole
from agglomerator.util.terminal import say


@pytest.mark.parametrize(
    "encoding, text, line",
    [
        ("ascii", "lauf_ü_中", rb"lauf_\xfc_\u4e2d"),
        ("utf-8", "lauf_ü\udcff", rb"lauf_%s\udcff" % "ü".encode()),
        ("latin-1", "lauf_ü😀", rb"lauf_%s\U0001f600" % "ü".encode("latin-1")),
    ],
)
def test_what_a_stream_cannot_show_is_written_as_its_code(encoding, text, line):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding, newline="")
    say(text, stream)
    assert buffer.getvalue() == line + b"\n"


def test_text_files_take_file_names_that_are_no_text(tmp_path):
    with written_whole(tmp_path / "a.csv") as file:
        file.write("ü\udcff")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == r"ü\udcff"
