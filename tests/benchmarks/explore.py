"""How soon --mode explore shows what the user asks for, on 32 x 32 columns.

    PYTHONPATH=src python tests/benchmarks/explore.py

Prints, for islands by threshold and by merging, the milliseconds from a key or click to the
finished picture, with numbers, panels and all pixels: the median, and the least time that a core
was at work, which other work on the machine hardly lengthens. Seen on two cores of a Xeon with
little else to do: 132 to 175 ms; of a core 116 to 129.
"""

import statistics
import time

import numpy as np
import torch
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg

from agglomerator import find_islands, load_checkpoint
from agglomerator.islands.explorer import Explorer
from agglomerator.util.figure import Figure

TIMES = 20
KEYS = {"islands": "-+", "iteration": ("down", "up"), "image": ("right", "left")}


def main():
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(255, size=(2, 8, 8, 3), dtype=np.uint8)
    images = images.repeat(16, 1).repeat(16, 2)  # 128 x 128, of even patches
    model = load_checkpoint("pretrained:PhotoParts")
    for found_by in ({"threshold": 0.8}, {"loss": 0.03}):
        gallery = [find_islands(model, image, **found_by) for image in images]
        figure = Figure(layout="constrained")
        canvas = FigureCanvasAgg(figure)
        canvas.draw_idle = lambda: None  # once for each event, below
        explorer = Explorer(figure, gallery, None, None)
        places = explorer.panels.axes[0, 1].transData.transform([(5, 9), (25, 16)])
        acts = {name: [("key", key) for key in keys] for name, keys in KEYS.items()}
        acts["column"] = [("click", place) for place in places]
        print(*found_by)
        for name, both in acts.items():
            spent = [act(canvas, *both[i % 2]) for i in range(TIMES)]
            wall, core = zip(*spent, strict=True)
            print(f"  {name:<10}{statistics.median(wall):6.0f} ms, of a core {min(core):.0f}")


def act(canvas, kind, what):
    """Milliseconds from an event to the picture, and how many of them a core was at work."""
    began = time.perf_counter(), time.process_time()
    if kind == "key":
        canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, what))
    else:
        event = MouseEvent("button_press_event", canvas, *what, 1)
        canvas.callbacks.process("button_press_event", event)
    canvas.draw()
    ended = time.perf_counter(), time.process_time()
    return [1000 * (end - begin) for begin, end in zip(began, ended, strict=True)]


if __name__ == "__main__":
    main()
