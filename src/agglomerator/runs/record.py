"""The record of a run: one run at a time in a folder, what ran there, what earlier runs left."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from agglomerator.config import FIELDS, GROUPS, LOSS_SETTINGS
from agglomerator.runs.checkpoints import fingerprint
from agglomerator.runs.signals import Stopped
from agglomerator.util.errors import UserError
from agglomerator.util.files import copy_whole, write_json
from agglomerator.util.terminal import say

try:
    import fcntl
except ImportError:  # Windows: two runs of one name are not noticed there
    fcntl = None


# The settings that decide the figures of a test or of freeze.
DECISIVE = {*GROUPS["Data"], *GROUPS["Model"], *LOSS_SETTINGS}
DECISIVE |= {"seed", "precision", "island_threshold", "island_loss", "images"}
DECISIVE -= {"num_workers", "recompute"}

_HELD = {}  # path of a lock -> its open file, for as long as this process lives


def lock_run_folder(folder, what):
    """Lock a run's folder for this process. The lock ends with the process, however that ends, and
    is not passed on to processes that it starts.

    Args:
        folder: path of the run's folder.
        what: is done in it. Different things may be done at the same time.

    Raises:
        UserError: another process holds the lock.
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
    """A context that records a run as JSON: command, settings, versions and machine, and at its end
    when and how it ended. A killed run has no end.

    Args:
        settings: of the run.
        path: of the file. It holds a list, with an entry for each time that the run was continued.
        goes_on: whether this continues the run that the file records.
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
    earlier = _read(path) if goes_on else None
    parts = [*(earlier if isinstance(earlier, list) else []), part]
    write(path, parts)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Stopped)
        what = f"stopped by {error.signal}" if stopped else str(error) or type(error).__name__
        part["outcome"] = what
        raise
    else:
        part["outcome"] = "finished"
    finally:
        part["ended"] = now()
        with suppress(OSError):  # what happened before is what counts
            write(path, parts)


@rank_zero_only
def write(path, parts):
    """Write the parts of a run as JSON, in the main process."""
    write_json(path, parts, indent=1)


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@rank_zero_only
def put_aside(folder, start, move=True):
    """Keep what an earlier run of the same stage and name left, in earlier/.

    Args:
        folder: the `RunFolder`.
        start: the checkpoint that this run starts from, or None. It also stays where it is, since
            other processes may be about to read it.
        move: False if the run continues from before its end: everything also stays where it is.
    """
    left = folder.of_training() + _figures(folder)
    if folder.stage in ("contrastive", "masked"):
        left = [path for path in left if path.parent != folder.islands] + [folder.islands]
    aside = _keep(left, folder.path, folder.stage, None if start is None else start.path, move)
    if aside is None:
        return
    if not move:  # the last checkpoint is now the one that the run goes back to
        copy_whole(start.path, folder.last)
    said = "An earlier run of this name was moved to" if move else "This run as it was is kept in"
    say(f"{said} {aside}.")


@rank_zero_only
def put_figures_aside(folder):
    """Keep the figures of a network that is about to learn more in earlier/."""
    aside = _keep(_figures(folder), folder.path, folder.stage)
    if aside is not None:
        say(f"The figures of the network as it was were moved to {aside}.")


def _figures(folder):
    """What a test and freeze left of the stage of a `RunFolder`."""
    frozen = _read(folder.frozen_record)
    of_stage = isinstance(frozen, dict) and frozen.get("stage") == folder.stage
    return folder.of_test() + (folder.of_freeze() if of_stage else [])


@rank_zero_only
def make_room(paths, folder, settings, start):
    """Keep the results of a test or of freeze in earlier/ if other weights or settings made them.

    Args:
        paths: of the results, first their record.
        folder: path of the run's folder.
        settings: of the results to come.
        start: their checkpoint.

    Returns:
        What made the results to come, for their record: weights, settings, git commit.
    """
    made = {name: getattr(settings, name) for name in FIELDS if name in DECISIVE}
    made["iters"] = settings.n_iters
    made["normalization"] = settings.normalization or settings.dataset
    weights, before = fingerprint(start.weights), _read(paths[0])
    if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
        before = {"settings": {}}
    earlier = before["settings"]
    differ = [  # as JSON has them: a number of batches, 1, is not a share, 1.0
        name for name in made if json.dumps(earlier.get(name)) != json.dumps(made[name])
    ]
    if differ or before.get("weights") != weights:
        aside = _keep(paths, folder, paths[0].stem)
        of = [f"--{name}={earlier[name]}" for name in differ if name in earlier]
        if before.get("weights") != weights:
            of.insert(0, f"other weights, {before.get('checkpoint', 'not known which')}")
        if aside is not None:
            of = ", ".join(of) or "settings that they do not tell"
            say(f"Earlier results (of {of}) were moved to {aside}.")
    return {"weights": weights, "settings": made, "git": git_state()}


@rank_zero_only
def clear(paths, folder, kind):
    """Move results to earlier/ that a run of the same settings did not make again."""
    aside = _keep(paths, folder, kind)
    if aside is not None:
        say(f"Earlier pictures of other images were moved to {aside}.")


def _keep(paths, folder, kind, stays=None, move=True):
    """Move files and folders of a run, or copy them, to a folder in earlier/.

    Args:
        paths: in the folder; those that are not there, and folders without a file, do not count.
        folder: path of the run's folder.
        kind: ends the name of the new folder.
        stays: path of a file that is copied in any case.
        move: False to copy all.

    Returns:
        The new folder, or None if there was nothing.
    """
    left = [path for path in paths if _is_left(path)]
    if not left:
        return None
    moment = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    aside = folder / "earlier" / f"{moment}_{kind}"
    while aside.exists():
        aside = aside.with_name(f"{aside.name}_")
    for source in left:
        target = aside / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        is_folder = source.is_dir()
        if move and not (stays is not None and source.samefile(stays)):
            shutil.move(source, target)
            if is_folder:  # loggers have made sure that theirs is there
                source.mkdir()
        elif is_folder:
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    return aside


def _is_left(path):
    return path.is_file() or any(each.is_file() for each in path.rglob("*"))


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
