"""Lines on standard output and error, which are lost if nobody takes them, and nothing else is."""

import os
import sys

from lightning_utilities.core.rank_zero import rank_zero_only


def say(text, stream=None, every_process=False):
    """Print a line at once, in the main process of a training.

    A reader of a pipe that has gone, or a full disk, is no reason to lose a training: what is
    written to such a stream from then on is thrown away. Nor are letters that the stream's encoding
    does not have: their codes are written, as \\xfc.

    Args:
        text: the line, or lines.
        stream: open text file; None for standard output.
        every_process: print it in all processes.
    """
    if getattr(rank_zero_only, "rank", 0) and not every_process:  # Lightning sets it
        return
    stream = sys.stdout if stream is None else stream  # None still where it was closed
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            print(escaped(text, stream.encoding), file=stream, flush=True)
    except BlockingIOError:  # full for the moment
        pass
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def escaped(text, encoding="utf-8"):
    """The text with codes in place of what an encoding does not have: of UTF-8 that is the bytes of
    file names that are no text."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
