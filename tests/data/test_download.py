import errno
import hashlib

import pytest

from agglomerator.data.download import fetch, into
from agglomerator.util.errors import UserError


def test_files_arrive_when_all_went_well(tmp_path):
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / "a").write_text("old")
    with into(tmp_path / "data", "set", "copy it.") as temporary:
        assert temporary.parent == tmp_path / "data"
        (temporary / "set" / "raw").mkdir(parents=True)
        (temporary / "set" / "a").write_text("new")
        (temporary / "set" / "raw" / "b").write_text("b")
        assert (tmp_path / "data" / "set" / "a").read_text() == "old"
    assert (tmp_path / "data" / "set" / "a").read_text() == "new"
    files = {path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*")}
    assert {str(path) for path in files} == {"set", "set/a", "set/raw", "set/raw/b"}


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full"),
    (OSError("no\nconnection"), UserError, "cannot be downloaded (no connection); copy it."),
    (RuntimeError("wrong checksum"), UserError, "wrong checksum"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
]


@pytest.mark.parametrize("failure, raised, words", FAILURES)
def test_nothing_is_left_of_a_failed_one(tmp_path, failure, raised, words):
    with pytest.raises(raised) as error, into(tmp_path, "set", "copy it.") as temporary:
        (temporary / "half").write_text("half a file")
        raise failure
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"), into(tmp_path / "file", "set", "copy it."):
        pass


def test_fetch_checks(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    fetch(source.as_uri(), target, right)
    assert target.read_bytes() == b"content"
    with pytest.raises(RuntimeError, match="wrong checksum"):
        fetch(source.as_uri(), target, right[::-1])
