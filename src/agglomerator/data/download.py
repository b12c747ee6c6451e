"""Downloads, and what is unpacked, that are there whole or not at all."""

import errno
import hashlib
import http.client
import shutil
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from agglomerator.util.errors import UserError


@contextmanager
def into(folder, name, way_out, done="downloaded"):
    """A temporary folder for a download, whose files move to `folder` when all went well.

    Args:
        folder: where to; the temporary folder lies in it, so that moving is renaming.
        name: of the data set.
        way_out: what the user can do if it cannot be downloaded, the end of a sentence.
        done: what is done there, to say that it cannot be.

    Raises:
        UserError: no connection, a wrong checksum, a full disk, a folder that cannot be written.
    """
    folder = Path(folder)
    where = f"--data_dir={folder}: {name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            yield Path(temporary)
            for path in sorted(Path(temporary).rglob("*")):
                target = folder / path.relative_to(temporary)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    path.replace(target)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{where} cannot be {done}: the disk is full; make room there, or name "
                "another place by --data_dir."
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where} is not there and cannot be {done} ({reason}); {way_out}"
        ) from None


def fetch(url, path, sha256):
    """Download a file and check it.

    Raises:
        OSError: no connection, or no room.
        RuntimeError: the file is not the expected one.
    """
    with urllib.request.urlopen(url, timeout=60) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise RuntimeError(f"{url} has a wrong checksum")
