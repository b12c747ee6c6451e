"""Broken and hostile input by a seeded fuzzer: it is read, or refused in one line, soon, in little
memory, and nothing of it is run."""

import copy
import dataclasses
import gzip
import io
import pickle
import random
import resource
import signal
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from absl.flags import FLAGS
from conftest import SMALL, contents, run_program
from PIL import Image

from agglomerator import Agglomerator, checkpoints, flags
from agglomerator.data import sets
from agglomerator.data.images import read_image
from agglomerator.data.smallnorb import NAMES, read_matrix
from agglomerator.data.torchvision_sets import files_of
from agglomerator.islands import Projection
from agglomerator.settings import Settings, UserError

SECONDS = 20
MEGABYTES = 700


@pytest.fixture(autouse=True)
def within_bounds():
    """No test of this file takes up much more memory than there was in use before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < MEGABYTES * 2**10, f"{more / 2**10:.0f} MB"


def too_long(*_):
    raise AssertionError(f"takes more than {SECONDS} s")


def attempt(function, *arguments, **keywords):
    """Whether it succeeds; that it else refuses in one line is demanded."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*arguments, **keywords)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable(), repr(str(error))
        return False
    finally:
        signal.alarm(0)
    return True


def damaged(content, draw):
    """Bytes with some fault: bits flipped, cut short, parts doubled, lost or overwritten."""
    content = bytearray(content)
    place, length = draw.randrange(len(content)), draw.randrange(1, 64)
    kind = draw.randrange(7)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        del content[place : place + length]
    elif kind == 2:
        content[place:place] = content[place : place + length]
    elif kind == 3:
        content[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 2**31, 2**32 - 1)))
    elif kind == 4:
        content[place : place + length] = draw.randbytes(length)
    else:
        # Headers are where the faults are that matter.
        span = len(content) if kind == 5 else min(len(content), 256)
        for _ in range(draw.randrange(1, 9)):
            content[draw.randrange(span)] ^= 1 << draw.randrange(8)
    return bytes(content)
