"""Shows a picture file in a window or on a page in the browser, and shows it again when it changes.

It is a program of its own: a fault of the window, the display or the page cannot harm the training
that draws the pictures. It ends when the user closes the window, or when the training ends without
a word.

    python src/agglomerator/islands/window.py PICTURE.png < a pipe that stays open

Each line of the pipe is JSON. {"show": PATH} names another picture. {"stay": true or false} comes
at the end of the training: true if the training waits for Ctrl-C. A window then stays until the
user closes it, a page stays only while the training waits. Once nothing waits, the program closes
standard output.
"""

import contextlib
import io
import json
import os
import sys
import textwrap
import threading

BACKEND = "AGGLOMERATOR_MPLBACKEND"  # environment variable: the user's choice for this program
MILLISECONDS = 300  # between two checks of the file
TALLEST = 900  # pixels, greatest height of a window


class Screen:
    """The path of the picture shown, and whether it is on a page. `is_open` is set when it is."""

    def __init__(self, path):
        self.path, self.is_page, self.is_open = path, False, threading.Event()


def leave_backend_to_window():
    """Keep matplotlib's backend from the training, and hand it to this program.

    A training only writes files. A backend that is not there would end it; here it only costs the
    window."""
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
    os._exit(0)  # an orderly end would wait for the pipe, which the thread may hold


def say(text):
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, file=sys.__stdout__, flush=True)


def listen(screen):
    """Follow the messages of the training, and end with it."""
    stays = False
    for line in sys.stdin.buffer:
        message = json.loads(line)
        screen.path = message.get("show", screen.path)
        if "stay" in message:
            screen.is_open.wait()
            stays = not screen.is_page
            if stays:
                say("The islands stay in their window until you close it.")
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            elif message["stay"]:
                say("The islands stay on their page until you press Ctrl-C.")
            else:
                break
    if not stays:
        os._exit(0)


def show(screen):
    """Show a PNG file in a window until the user closes it, or on a page for ever.

    Shows nothing if matplotlib's backend only writes files: the user chose it, or there is no
    display.

    Raises:
        RuntimeError: the backend opens no windows.
    """
    import matplotlib

    matplotlib.rcParams["backend_fallback"] = False  # which would be silent
    from matplotlib import pyplot as plt

    backend = matplotlib.get_backend().lower()
    if not opens_windows(backend):
        return
    pixels, seen = plt.imread(screen.path), None
    height, width = pixels.shape[:2]
    inches = min(1, TALLEST / height) / 100
    figure = plt.figure("Islands of agreement", figsize=(width * inches, height * inches), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))

    def look():
        nonlocal seen
        with contextlib.suppress(OSError):  # it was moved away; another will come
            current = screen.path, os.stat(screen.path).st_mtime_ns
            if current != seen:
                ax.clear()
                ax.axis("off")
                ax.imshow(plt.imread(screen.path))
                seen = current
                figure.canvas.draw_idle()

    look()
    timer = figure.canvas.new_timer(MILLISECONDS)
    timer.add_callback(look)
    timer.start()
    if backend == "webagg":
        screen.is_page = True
        say(f"Islands live: {address()}")
    screen.is_open.set()
    wait()


def opens_windows(backend):
    """Whether a backend of matplotlib shows figures; it may open no browser, nor raise windows.

    Raises:
        RuntimeError: it neither shows nor writes figures.
    """
    import matplotlib
    from matplotlib.backends.registry import BackendFilter, backend_registry

    matplotlib.rcParams["webagg.open_in_browser"] = False  # it could be one in the terminal
    matplotlib.rcParams["figure.raise_window"] = False
    if backend in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        return False
    if backend not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
        raise RuntimeError("it opens none")
    return True


def address():
    """The address of the page, and how to come to it from another machine."""
    from matplotlib.backends.backend_webagg import WebAggApplication as Server

    Server.initialize()
    where = f"{Server.address}:{Server.port}"
    return f"http://{where} (from another machine first: ssh -L {Server.port}:{where} THIS_MACHINE)"


def wait():
    """Show the figures until the user closes the last window, or stops the page by Ctrl-C."""
    from matplotlib import pyplot as plt

    with contextlib.redirect_stdout(io.StringIO()):  # the page has its own words for it
        plt.show()


if __name__ == "__main__":
    main(sys.argv[1])
