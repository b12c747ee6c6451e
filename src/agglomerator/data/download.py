"""Downloads: the files of a data set arrive all together or not at all."""

import errno
import hashlib
import http.client
import shutil
import tempfile
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from agglomerator.util.errors import UserError


@contextmanager
def into(folder, name, way_out, done="downloaded"):
    """A temporary folder for a download. Its files move to `folder` if nothing fails.

    Args:
        folder: the final place. The temporary folder lies in it, so that a move is a renaming.
        name: of the data set, for messages.
        way_out: what the user can do if the download fails; the end of a sentence.
        done: "downloaded" or "unpacked", for messages.

    Raises:
        UserError: no connection, a wrong checksum, a full disk, or no permission to write.
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
                f"{where} cannot be {done}: the disk is full; make room, or name "
                "another folder by --data_dir."
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where} is not there and cannot be {done} ({reason}); {way_out}"
        ) from None


def fetch(url, path, sha256):
    """Download a file and check it.

    Args:
        url: of the file.
        path: where to write it.
        sha256: its checksum, in hexadecimal digits.

    Raises:
        OSError: no connection, or a full disk.
        RuntimeError: another checksum.
    """
    with urllib.request.urlopen(url, timeout=60) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise RuntimeError(f"{url} has a wrong checksum")


@contextmanager
def one_at_a_time(folder):
    """Let one process of this machine in at a time, for each folder. The others wait."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"agglomerator-{name}.lock"
    with ExitStack() as stack:
        with suppress(OSError):  # the lock is another user's: go on without it
            fcntl.lockf(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield
