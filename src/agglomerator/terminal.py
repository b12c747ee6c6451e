"""Lines on standard output and error, which are lost if nobody takes them, and nothing else is."""

import os
import sys


def write(text, stream=None):
    """Print a line at once.

    A reader of a pipe that has gone, or a full disk, is no reason to lose a training: what is
    written to such a stream from then on is thrown away.

    Args:
        text: the line, or lines.
        stream: open text file; None for standard output.
    """
    stream = sys.stdout if stream is None else stream  # None still where it was closed
    try:
        print(text, file=stream, flush=True)
    except BlockingIOError:  # full for the moment
        pass
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
