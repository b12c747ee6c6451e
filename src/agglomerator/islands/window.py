"""Shows a picture file in a window, or as a page in the browser, anew whenever it changes.

A program of its own: whatever happens to its window, display or page does not concern the training
that draws the pictures. It ends when its window is closed, and with the training, unless that bids
it stay.

    python src/agglomerator/islands/window.py PICTURE.png < a pipe that stays open

Each line of the pipe is JSON: {"show": path of another picture}, or at the end {"stay": whether
somebody waits}. A window then stays until it is closed, a page only while somebody waits. The
program lets go of standard output when there is nothing to wait for.
"""

import contextlib
import io
import json
import os
import sys
import textwrap
import threading

BACKEND = "AGGLOMERATOR_MPLBACKEND"  # environment variable: the user's choice for this program
MILLISECONDS = 300  # between two looks at the file
TALLEST = 900  # pixels of a window


class Screen:
    """What is shown: the path of a picture, and whether on a page; `is_open` tells when."""

    def __init__(self, path):
        self.path, self.is_page, self.is_open = path, False, threading.Event()


def leave_backend_to_window():
    """Keep matplotlib's backend for the window, which may do without: a training writes files, and
    matplotlib would end it for the sake of a backend that is not there."""
    os.environ[BACKEND] = os.environ.get("MPLBACKEND", "")
    os.environ["MPLBACKEND"] = "agg"


def main(path):
    os.environ["MPLBACKEND"] = os.environ.get(BACKEND, os.environ.get("MPLBACKEND", ""))
    screen = Screen(path)
    threading.Thread(target=listen, args=(screen,), daemon=True).start()
    try:
        show(screen)
    except Exception as error:  # each desktop has its own
        backend, reason = os.environ["MPLBACKEND"], textwrap.shorten(str(error), 120)
        named = f" by MPLBACKEND={backend}" if backend else ""
        say(
            f"--plot_islands: no window{named} ({reason}), the pictures are files; "
            "MPLBACKEND=webagg makes a page."
        )
    os._exit(0)  # the thread may hold the pipe, which an orderly end would wait for and abort


def say(text):
    with contextlib.suppress(OSError):  # nobody takes it
        print(text, file=sys.__stdout__, flush=True)


def listen(screen):
    """Do what the training tells, and end with it."""
    stays = False
    for line in sys.stdin.buffer:
        told = json.loads(line)
        screen.path = told.get("show", screen.path)
        if "stay" in told:
            screen.is_open.wait()
            stays = not screen.is_page
            if stays:
                say("The islands stay in their window until you close it.")
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            elif told["stay"]:
                say("The islands stay on their page until you press Ctrl-C.")
            else:
                break
    if not stays:
        os._exit(0)


def show(screen):
    """Show a PNG file until its window is closed, for ever on a page. Nothing where matplotlib is
    for files alone, by the user's choice or for want of a display."""
    import matplotlib

    matplotlib.rcParams["backend_fallback"] = False  # without a word
    from matplotlib import pyplot as plt
    from matplotlib.backends.registry import BackendFilter, backend_registry

    matplotlib.rcParams["webagg.open_in_browser"] = False  # it might be one of the terminal
    matplotlib.rcParams["figure.raise_window"] = False
    backend = matplotlib.get_backend().lower()
    if backend in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        return
    if backend not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
        raise RuntimeError("it opens none")
    pixels, seen = plt.imread(screen.path), None
    height, width = pixels.shape[:2]
    inches = min(1, TALLEST / height) / 100
    figure = plt.figure("Islands of agreement", figsize=(width * inches, height * inches), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))

    def look():
        nonlocal seen
        with contextlib.suppress(OSError):  # moved away; another will come
            found = screen.path, os.stat(screen.path).st_mtime_ns
            if found != seen:
                ax.clear()
                ax.axis("off")
                ax.imshow(plt.imread(screen.path))
                seen = found
                figure.canvas.draw_idle()

    look()
    timer = figure.canvas.new_timer(MILLISECONDS)
    timer.add_callback(look)
    timer.start()
    if backend == "webagg":
        screen.is_page = True
        tell_address()
    screen.is_open.set()
    with contextlib.redirect_stdout(io.StringIO()):
        plt.show()


def tell_address():
    from matplotlib.backends.backend_webagg import WebAggApplication as Server

    Server.initialize()
    where = f"{Server.address}:{Server.port}"
    say(
        f"Islands live: http://{where} (from another machine first: ssh -L {Server.port}:{where} "
        "THIS_MACHINE)"
    )


if __name__ == "__main__":
    main(sys.argv[1])
