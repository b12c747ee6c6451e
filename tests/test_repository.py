import json
import re
import subprocess

import pytest
from conftest import ROOT

TOP_LEVEL = {"src", "config", "img", "tests", "Pipfile", "Pipfile.lock", "README.md"}
INDEX = re.compile(rb"https?://[^\s\"']*(/simple\b|pypi\.org|pythonhosted|artifactory|nexus)")


@pytest.fixture(scope="module")
def tracked():
    """Paths of the tracked files; those of a copy without git are all files in its folders."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_top_level_holds_what_it_should(tracked):
    found = {path.relative_to(ROOT).parts[0] for path in tracked}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_lock_names_no_package_index():
    lock = json.loads((ROOT / "Pipfile.lock").read_text())
    assert lock["_meta"]["sources"] == []
    assert lock["default"]["torch"]["version"]
    assert not [name for name, entry in lock["default"].items() if "index" in entry]


def test_no_file_names_a_package_index(tracked):
    assert [path for path in tracked if INDEX.search(path.read_bytes())] == []


def test_no_file_is_large(tracked):
    networks = [path for path in tracked if path.parent.name == "pretrained"]
    assert sum(path.stat().st_size for path in networks) <= 24 * 2**20
    others = set(tracked) - set(networks)
    assert [path for path in others if path.stat().st_size > 2_000_000] == []


def test_readme_is_short_and_its_files_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 16000
    for path in re.findall(r"\bimg/[\w./]+\w|\bconfig/\w+\.cfg|\btests/\w+/\w+\.py", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:config|data|model|training|hierarchy)/[\w/]+(?:\.py)?)/?`", text):
        assert (ROOT / "src" / "agglomerator" / path).exists(), path
