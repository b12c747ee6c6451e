"""A run's folder belongs to one run at a time, and records what ran in it."""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from agglomerator.resume import Stopped, write_json
from agglomerator.settings import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs of one name are not noticed there
    fcntl = None

_HELD = {}  # path of a lock -> its open file, for as long as this process lives


def hold(folder, what):
    """Keep a run's folder for this process. The system lets it go when the process ends, however
    it ends; processes that it starts do not hold it.

    Args:
        folder: of the run.
        what: is done in it; different things may be done at once.

    Raises:
        UserError: another process holds it.
    """
    path = Path(folder) / f".{what}.lock"
    if fcntl is None or path in _HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        raise UserError(
            f"--exp_name={Path(folder).name}: {holder} is at work in {folder}; wait for its end, "
            "or take another name by --exp_name."
        ) from None
    except OSError:  # a file system without locks
        return
    _HELD[path] = file
    with suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


@contextmanager
def recorded(settings, path, goes_on=False):
    """Record as JSON what runs, by what and where; at the end, when and how it ended. A part of a
    run that was killed has neither.

    Args:
        settings: of the run.
        path: of the file, a list of the parts of a run.
        goes_on: the run is an earlier one's next part.
    """
    part = {
        "command": shlex.join([sys.executable, *sys.argv]),
        "started": now(),
        "ended": None,
        "outcome": None,
        "seed": settings.seed,
        "git": git_state(),
        "machine": machine(),
        "python": platform.python_version(),
        "packages": packages(),
        "flags": asdict(settings),
    }
    parts = [*(earlier_parts(path) if goes_on else []), part]
    write(path, parts)
    try:
        yield
    except BaseException as error:
        part["outcome"] = f"stopped by {error.signal}" if isinstance(error, Stopped) else str(error)
        raise
    else:
        part["outcome"] = "finished"
    finally:
        part["ended"] = now()
        with suppress(OSError):  # what happened before is what counts
            write(path, parts)


@rank_zero_only
def write(path, parts):
    write_json(path, parts, indent=1)


def earlier_parts(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def now():
    return datetime.now().astimezone().isoformat(timespec="seconds")


def git_state():
    """Commit of the program and whether its files were changed since; None without git."""
    here = Path(__file__).parent

    def git(*words):
        done = subprocess.run(
            ["git", "-C", here, *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def machine():
    import torch

    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def packages():
    """Name -> version of every package that is installed."""
    found = {
        package.metadata["Name"]: package.version for package in importlib.metadata.distributions()
    }
    return dict(sorted(found.items(), key=lambda item: str(item[0]).lower()))
