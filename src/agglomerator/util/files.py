"""Files that are there whole or not at all."""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path


def partial(path):
    """Where a file is written before it takes its name."""
    return Path(f"{path}.partial")


@contextmanager
def written_whole(path, mode="w"):
    """Open a file to write that is there whole at the end, or as it was before.

    Raises:
        OSError: it cannot be written; it names the file.
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
        while isinstance(cause, RuntimeError):  # PyTorch's, of a write that failed
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_json(path, content, indent=2):
    """Write a file of JSON, with null for numbers that are not known: JSON has no NaN."""
    with written_whole(path) as file:
        file.write(json.dumps(_known(content), indent=indent, allow_nan=False) + "\n")


def _known(content):
    if isinstance(content, dict):
        return {name: _known(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_known(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
