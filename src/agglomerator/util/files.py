"""Files that are written whole or not at all."""

import csv
import io
import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def partial(path):
    """The path at which a file is written before it takes its own name."""
    return Path(f"{path}.partial")


@contextmanager
def written_whole(path, mode="w"):
    """Open a file for writing. At the end it is there whole; after an error it is as before.

    Raises:
        OSError: the file cannot be written. The error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    text = {} if "b" in mode else encoding
    try:
        with partial(path).open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial(path).replace(path)
    except BaseException as error:
        partial(path).unlink(missing_ok=True)
        cause = error
        while isinstance(cause, RuntimeError):  # PyTorch raises it when a write fails
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_json(path, content, indent=2):
    """Write a JSON file. NaN and infinities become null: JSON has no such numbers."""
    with written_whole(path) as file:
        file.write(json.dumps(_known(content), indent=indent, allow_nan=False) + "\n")


def write_rows(path, rows, names=None):
    """Write dictionaries as a CSV file with a header: `names`, or all keys that occur."""
    names = names or dict.fromkeys(name for row in rows for name in row)
    with written_whole(path) as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def copy_whole(source, target):
    """Copy a file, whole or not at all."""
    with source.open("rb") as file, written_whole(target, "wb") as copy:
        shutil.copyfileobj(file, copy)


def read_rows(path):
    """(names, rows) of a CSV file that another process may be writing: without a torn last line.
    names is None if there is no header yet."""
    text = path.read_text(encoding="utf-8", errors="replace")
    table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return table.fieldnames, list(table)


def _known(content):
    if isinstance(content, dict):
        return {name: _known(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_known(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
