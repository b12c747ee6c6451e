"""Lines on standard output and error. If nobody reads them they are lost, but the run goes on."""

import os
import sys

from lightning_utilities.core.rank_zero import rank_zero_only


def write(text, stream=None):
    """Print a line at once, and never let it end a training.

    If the reader of a pipe has gone or the disk is full, all further output to that stream is
    thrown away. Letters that the stream's encoding lacks are written as codes, for example \\xfc.

    Args:
        text: one line or several.
        stream: open text file; None for standard output.
    """
    stream = sys.stdout if stream is None else stream  # None still where it was closed
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(escaped(text, stream.encoding), file=stream, flush=True)
    except BlockingIOError:  # the pipe is full for the moment
        pass
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def escaped(text, encoding="utf-8"):
    """The text with codes for what an encoding lacks. UTF-8 lacks only the bytes of file names that
    are not text."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text):
    """`write`, but only in the main process of a training."""
    if getattr(rank_zero_only, "rank", 0) == 0:  # Lightning sets it
        write(text)
