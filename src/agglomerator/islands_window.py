"""Shows a picture file in a window, or as a page in the browser, anew whenever it changes.

A program of its own: whatever happens to its window, display or page does not concern the training
that draws the picture. It ends when its window is closed or when who started it ends.

    python src/agglomerator/islands_window.py PICTURE.png < a pipe that stays open
"""

import contextlib
import io
import os
import sys
import threading

import matplotlib
from matplotlib.backends.registry import BackendFilter, backend_registry

MILLISECONDS = 300  # between two looks at the file


def main(path):
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        show(path)
    except Exception as error:  # each desktop has its own
        say(f"--plot_islands: no window: {' '.join(str(error).split())}")
    os._exit(0)  # the thread may hold the pipe, which an orderly end would wait for and abort


def say(text):
    with contextlib.suppress(OSError):  # nobody takes it
        print(text, flush=True)


def is_there_a_screen():
    """Whether matplotlib would show something here, in a window or, as webagg, on a page."""
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    return matplotlib.get_backend().lower() in windows


def end_with_parent():
    sys.stdin.buffer.read()
    os._exit(0)


def show(path):
    """Show a PNG file until its window is closed, for ever on a page."""
    from matplotlib import pyplot as plt  # the training, which asks for a screen, needs none of it

    matplotlib.rcParams["webagg.open_in_browser"] = False  # it might be one of the terminal
    matplotlib.rcParams["figure.raise_window"] = False
    pixels, seen = plt.imread(path), os.stat(path).st_mtime_ns
    height, width = pixels.shape[:2]
    if not is_there_a_screen():
        raise RuntimeError("matplotlib finds none to open here; MPLBACKEND=webagg makes a page")
    figure = plt.figure("Islands of agreement", figsize=(width / 100, height / 100), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    picture = ax.imshow(pixels)

    def look():
        nonlocal seen
        with contextlib.suppress(OSError):  # moved away; another will come
            if os.stat(path).st_mtime_ns != seen:
                picture.set_data(plt.imread(path))
                seen = os.stat(path).st_mtime_ns
                figure.canvas.draw_idle()

    timer = figure.canvas.new_timer(MILLISECONDS)
    timer.add_callback(look)
    timer.start()
    if matplotlib.get_backend().lower() == "webagg":
        tell_address()
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
