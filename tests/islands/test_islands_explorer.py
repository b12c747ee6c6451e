"""`--mode explore` by mouse and keys: on a canvas without a window, and on a page as a browser."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, SMALL, run_main
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from agglomerator import find_islands, load_checkpoint
from agglomerator.islands.explorer import Explorer
from agglomerator.islands.segments import segment
from agglomerator.util.errors import UserError
from agglomerator.util.figure import Figure


def draw(seed):
    """An image of a few colours, (40, 40, 3) uint8."""
    colours = np.random.default_rng(seed).integers(255, size=(4, 4, 3), dtype=np.uint8)
    return colours.repeat(10, 0).repeat(10, 1)


class Gallery(list):
    """`Islands` of some images; None is one that cannot be read."""

    def __getitem__(self, number):
        if super().__getitem__(number) is None:
            raise UserError(f"{number}.png: cannot be read.")
        return super().__getitem__(number)


class Hand:
    """An `Explorer` on a canvas, and what a user does with it."""

    def __init__(self, **found_by):
        model = load_checkpoint("pretrained:PartWhole")
        self.gallery = Gallery(find_islands(model, draw(i), iters=3, **found_by) for i in (0, 1))
        self.gallery.append(None)
        self.saved, self.closed = [], []
        self.figure = Figure(layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.canvas.draw_idle = lambda: None  # windows draw once for many events
        self.explorer = Explorer(
            self.figure, self.gallery, self.save, lambda: self.closed.append(1)
        )
        self.axes = self.explorer.panels.axes

    def save(self, islands, column, t):
        self.saved.append((islands, column, t))
        return "Written: x.png"

    def click(self, ax, x, y):
        place = ax.transData.transform((x, y))
        for name in ("button_press_event", "button_release_event"):
            self.canvas.callbacks.process(name, MouseEvent(name, self.canvas, *place, 1))

    def press(self, *keys):
        for key in keys:
            event = KeyEvent("key_press_event", self.canvas, key)
            self.canvas.callbacks.process("key_press_event", event)

    @property
    def text(self):
        return self.explorer.text.get_text()

    def shows(self, image, column, t):
        """Whether the panels show what the islands say."""
        islands = self.gallery[image]
        assert self.explorer.islands is islands
        row, place = column
        maps = islands.cosines(0, column, t), islands.attention(0, column, t)
        labels = segment(islands.states[t, 0], islands.threshold, islands.loss).numpy()
        for level in (0, 1):
            for ax, values in zip(self.axes[1:, level + 1], maps, strict=True):
                np.testing.assert_array_equal(ax.images[0].get_array(), values[level])
            size, number = (labels[level] == labels[level, row, place]).sum(), labels[level]
            number = len(np.unique(number))
            text = self.axes[0, level + 1].get_xlabel()
            assert text.startswith(f"its island: {size}, {number} island")
        return True


@pytest.fixture(scope="module")
def hand():
    return Hand(threshold=0.9)


def test_point_at_a_column_of_any_level(hand):
    for ax, column in zip(hand.axes[:, 1:].flat, ((3, 5), (20, 31), (0, 0)), strict=False):
        hand.click(ax, column[1] + 0.3, column[0] - 0.3)
        assert hand.explorer.column == column and hand.shows(0, column, 3)
        assert str(column).strip("()") in hand.figure.get_suptitle()
    hand.click(hand.axes[0, 0], 7, 9)  # the input
    assert hand.explorer.column == (9, 7)
    hand.click(hand.axes[1, 0], 0.5, 0.5)  # a scale, which has no columns
    assert hand.explorer.column == (9, 7)


def test_keys_choose_image_iteration_and_threshold(hand):
    hand.press("right", "down", "down", "up")
    assert hand.shows(1, hand.explorer.column, 2)
    hand.press("-", "-", "-", "+")
    assert hand.explorer.islands.threshold == pytest.approx(0.88)
    assert hand.shows(1, hand.explorer.column, 2)
    hand.press(*["+"] * 20)
    assert hand.explorer.islands.threshold == 1
    hand.press("left", "left", *["up"] * 5)  # what is there not is passed over
    assert hand.shows(0, hand.explorer.column, 3) and hand.explorer.islands.threshold == 1


def test_sliders_do_the_same(hand):
    sliders = hand.explorer.sliders
    hand.click(sliders["iteration"].ax, 1, 0.5)
    hand.click(sliders["islands"].ax, 0.75, 0.5)
    assert hand.explorer.islands.threshold == pytest.approx(0.75, abs=0.01)
    assert hand.shows(0, hand.explorer.column, 1)


def test_a_still_is_saved_and_the_user_told(hand):
    hand.press("s")
    assert hand.saved == [(hand.explorer.islands, hand.explorer.column, hand.explorer.t)]
    assert hand.text == "Written: x.png"
    hand.press("q")
    assert hand.closed


def test_an_image_that_cannot_be_read_is_told_and_the_one_before_stays(hand):
    hand.explorer.sliders["image"].set_val(1)
    hand.press("right")
    assert hand.text == "2.png: cannot be read." and hand.shows(1, hand.explorer.column, 1)
    hand.press("left")
    assert "click: column" in hand.text


def test_islands_by_merging_have_a_slider_of_the_loss():
    hand = Hand(loss=0.02)
    assert hand.shows(0, (16, 16), 3)
    hand.press("+", "+", "-")
    assert hand.explorer.islands.loss == pytest.approx(0.02 * 10**0.05)
    hand.click(hand.explorer.sliders["islands"].ax, -1, 0.5)
    assert hand.explorer.islands.loss == pytest.approx(0.1, rel=0.05)
    assert hand.shows(0, (16, 16), 3)
    assert hand.explorer.sliders["islands"].valtext.get_text() == "0.1"


def test_without_iterations_or_other_images_there_are_no_sliders_for_them():
    islands = find_islands(load_checkpoint("pretrained:CIFAR10"), draw(0), iters=0)
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    explorer = Explorer(figure, [islands], None, None)
    assert list(explorer.sliders) == ["islands"] and explorer.t == 0


async def visit(where, folder):
    """Open the page as a browser does, point at a column, press s, and wait for the still."""
    socket = await websocket_connect(f"ws://{where}/1/ws", max_message_size=2**28)

    async def send(**message):
        await socket.write_message(json.dumps(message | {"figure_id": "1"}))

    await send(type="supports_binary", value=True)
    await send(type="refresh")
    await send(type="draw")
    while not isinstance(message := await socket.read_message(), bytes):
        pass
    assert message.startswith(b"\x89PNG")
    mouse = {"x": 350, "y": 200, "button": 0, "buttons": 1, "modifiers": [], "guiEvent": {}}
    await send(type="button_press", **mouse)
    await send(type="button_release", **mouse)
    await send(type="key_press", key="ks", guiEvent={})  # the page begins keys by k
    while json.loads(message := await socket.read_message())["type"] != "draw":
        pass
    while not (folder / "explore_1.png").is_file():
        await send(type="ack")
        await socket.read_message()
    socket.close()


@pytest.mark.slow
def test_a_page_where_there_is_no_desktop(tmp_path):
    for i in range(2):
        Image.fromarray(draw(i)).save(tmp_path / f"{i}.png")
    flags = "--mode=explore", "--load_checkpoint_dir=pretrained:CIFAR10", f"--images={tmp_path}"
    page = subprocess.Popen(
        [sys.executable, "src/main.py", *flags, f"--output_dir={tmp_path}", "--exp_name=x"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "x" / "islands"
    try:
        said = page.stdout.readline()
        where = said.split("http://")[1].split()[0]
        IOLoop(make_current=False).run_sync(lambda: visit(where, folder), timeout=400)
        page.send_signal(signal.SIGINT)
        said, fault = page.communicate(timeout=120)
    finally:
        page.kill()
    assert page.returncode == 0 and fault == ""
    assert said == f"Written: {folder / 'explore_1.png'}\n"
    with Image.open(folder / "explore_1.png") as still:
        assert still.width > 500


@pytest.mark.parametrize("backend", ["agg", "module://nowhere", "nonsense"])
def test_a_backend_that_shows_nothing_is_refused_in_a_line(backend, stage_one_checkpoint, tmp_path):
    flags = "--mode=explore", f"--load_checkpoint_dir={stage_one_checkpoint}"
    flags = *SMALL, f"--output_dir={tmp_path}", *flags
    result = run_main(*flags, ok=False, environment={"MPLBACKEND": backend})
    line, end = result.stderr.split("\n")
    assert line.startswith(f"error: MPLBACKEND={backend}: ") and not end
    assert "MPLBACKEND=webagg" in line and not (tmp_path / "digits").exists()


def test_no_such_test_image_is_told_before_a_window_opens(stage_one_checkpoint, tmp_path):
    flags = "--mode=explore", f"--load_checkpoint_dir={stage_one_checkpoint}", "--images=9000"
    flags = *SMALL, f"--output_dir={tmp_path}", *flags
    said = run_main(*flags, ok=False, environment={"MPLBACKEND": "webagg"}).stderr
    assert said.startswith("error: --images=9000: digits has the test images 0 to ")
