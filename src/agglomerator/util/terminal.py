"""Lines on standard output and error. If nobody reads them they are lost, but the run goes on."""

import os
import sys

from lightning_utilities.core.rank_zero import rank_zero_only


def say(text, stream=None, every_process=False):
    """Print a line at once, in the main process of a training, and never let it end the training.

    If the reader of a pipe has gone or the disk is full, all further output to that stream is
    thrown away. Letters that the stream's encoding lacks are written as codes, for example \\xfc.

    Args:
        text: one line or several.
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
    except BlockingIOError:  # the pipe is full for the moment
        pass
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def aligned(table):
    """Lines of a table, a list of rows of texts: the first column to the left, others to the right.

    Example:
        >>> aligned([["", "error"], ["digits", "0.6 %"]])
        ['        error', 'digits  0.6 %']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def escaped(text, encoding="utf-8"):
    """The text with codes for what an encoding lacks. UTF-8 lacks only the bytes of file names that
    are not text."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
