import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.islands import live_view
from agglomerator.islands.inspection import states_of
from agglomerator.islands.live_view import (
    EARLY,
    MOST_FRAMES,
    IslandsView,
    Window,
    samples,
)
from agglomerator.islands.projection import Projection, load_arrays
from agglomerator.islands.window import BACKEND
from agglomerator.training.module import LitAgglomerator

SMALL = Settings(
    dataset="digits", image_size=16, conv_image_size=4, n_channels=1, patch_dim=8, contr_dim=4
)


@pytest.fixture
def view(tmp_path):
    return IslandsView(tmp_path, "contrastive", 0.8)


def test_pictures_take_no_more_than_their_share(view):
    now = time.perf_counter()
    view.began, view.drawn_at, view.last = now - 1000, now - 100, 2
    for spent, due in ((17, True), (19, False)):
        view.spent = spent
        assert view._due() == due
    view.spent, view.drawn_at = 0, now - 1
    assert not view._due()


def test_pictures_come_soon_at_first_and_then_ever_later(view):
    view.provisional, view.last = True, 0.3
    drawn, now, view.began, view.drawn_at, view.spent = [], 0.0, 0.0, 0.0, 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_view, "time", clock)
        for now in np.arange(0, 1200, 0.5):
            if view._due():
                drawn.append(now)
                view.drawn_at, view.spent = now, view.spent + view.last
            if now > 150:
                assert 2 * view.spent <= max(0.02 * now, 2 * EARLY)
    assert drawn[:5] == [2, 4, 8, 16, 32] and max(np.diff(drawn)) <= 300
    assert len(drawn) * 0.3 >= 0.009 * 1200


def test_frames_stay_few_and_even(view, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    view.provisional = True
    for step in range(0, 4000, 10):
        view._keep_frame(picture, step, torch.ones(1, 4, 2, 3), f"step {step}")
    steps = [int(frame.stem) for frame in view._frames()]
    assert len(steps) == MOST_FRAMES and steps[0] == 0 and steps[-1] == 3990
    gaps = [after - before for before, after in zip(steps[:-1], steps[1:], strict=True)]
    assert max(gaps) <= 4 * 4000 / MOST_FRAMES
    view._drop_frames(2000)
    assert [int(frame.stem) for frame in view._frames()] == [s for s in steps if s <= 2000]
    names = "states", "title"
    kept = {path.stem: load_arrays(path, names) for path in view.frames.glob("*.npz")}
    assert sorted(kept) == [frame.stem for frame in view._frames()]
    assert all(arrays["title"] == f"step {int(step)}" for step, arrays in kept.items())


def test_looking_at_a_network_in_training_leaves_no_trace():
    torch.manual_seed(0)
    data = ImageDataModule(SMALL)
    data.setup()
    module = LitAgglomerator(Agglomerator(**vars(SMALL)), SMALL, data)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    images, labels = samples(data.val, 10)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    states = states_of(module.model, data.view(images))
    assert states.shape == (5, 6, 16, 2, 8)
    assert module.training and module.model.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert torch.get_rng_state().equal(generator)


def _shown(states, projection):
    """The least share, over levels, of the variance of unit vectors that a projection shows."""
    vectors = torch.nn.functional.normalize(states.double(), dim=-1).flatten(0, 1).transpose(0, 1)
    centred = vectors - vectors.mean(1, keepdim=True)
    along = centred @ torch.as_tensor(projection.axes)
    return (along.square().sum((1, 2)) / centred.square().sum((1, 2))).min().item()


def test_colours_are_for_the_trained_network_and_its_frames_drawn_again(stage_one):
    run = stage_one.output / "small"
    folder = run / "islands"
    model = load_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    data = ImageDataModule(model.settings.replace(dataset="digits"))
    data.setup()
    states = model.states(data.view(samples(data.val, 10)[0])).detach()[-1]
    kept, fresh = Projection.load(folder / "projection.npz", 2, 16), Projection.fit(states)
    assert _shown(states, kept) == pytest.approx(_shown(states, fresh), abs=0.02)
    frames = sorted((folder / "frames" / "contrastive").iterdir())
    assert {frame.suffix for frame in frames} == {".png"} and len(frames) >= 2
    last = Image.open(folder / "contrastive.png").convert("RGB")
    assert Image.open(frames[-1]).convert("RGB").tobytes() == last.tobytes()
    with Image.open(folder / "contrastive.gif") as animation:
        assert animation.n_frames == len(frames)


@pytest.fixture
def display():
    """Environment variables of a virtual display."""
    if not (shutil.which("Xvfb") and shutil.which("xdotool")) or not find_spec("tkinter"):
        pytest.skip("there is no virtual display")
    ours, theirs = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(theirs)], pass_fds=[theirs])
    with open(ours) as number:
        yield os.environ | {"DISPLAY": f":{number.readline().strip()}"}
    server.kill()
    os.close(theirs)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@contextmanager
def program(picture, backend, environment=os.environ):
    window = subprocess.Popen(
        [sys.executable, ROOT / "src" / "agglomerator" / "islands" / "window.py", picture],
        env=environment | {"MPLBACKEND": backend},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
        text=True,
    )
    try:
        yield window
    finally:
        window.kill()


def press_q(window, environment):
    """Close a window from its keyboard, as soon as it is there and listens."""
    close = ["search", "--name", "Islands", "windowfocus", "key", "q"]
    for _ in range(60):
        time.sleep(1)
        subprocess.run(["xdotool", *close], env=environment, capture_output=True, timeout=60)
        if window.poll() is not None:
            break
    assert window.wait(timeout=30) == 0


@pytest.mark.slow
def test_window_opens_and_ends_in_order_when_it_is_closed(picture, display):
    with program(picture, "tkagg", display) as window:
        press_q(window, display)
        assert window.stdout.read() == ""


@pytest.mark.slow
def test_window_outlives_a_training_that_bids_it_stay(picture, display):
    with program(picture, "tkagg", display) as window:
        window.stdin.write(json.dumps({"stay": False}) + "\n")
        assert window.stdout.read() == "The islands stay in their window until you close it.\n"
        window.stdin.close()
        time.sleep(1)
        assert window.poll() is None
        press_q(window, display)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.slow
def test_page_stays_while_somebody_waits(picture, waits):
    with program(picture, "webagg") as page:
        assert "http://" in page.stdout.readline()
        page.stdin.write(json.dumps({"stay": waits}) + "\n")
        if waits:
            assert "until you press Ctrl-C" in page.stdout.readline()
            assert page.poll() is None
            page.stdin.close()
        assert page.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_run_in_the_foreground_of_a_terminal_waits_for_ctrl_c(picture):
    code = (
        "import sys; from pathlib import Path; from agglomerator.islands.live_view import Window; "
        "window = Window(); window.wanted = True; window.show(Path(sys.argv[1])); window.stay(); "
        "print('at its end')"
    )
    environment = os.environ | {"MPLBACKEND": "webagg", "PYTHONPATH": str(ROOT / "src")}
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background has it ignored
        os.execve(sys.executable, [sys.executable, "-c", code, str(picture)], environment)
    said, pressed = b"", False
    with suppress(OSError):  # that is how a terminal ends
        while part := os.read(terminal, 4096):
            said += part
            if b"until you press Ctrl-C." in said and not pressed:
                assert b"at its end" not in said
                time.sleep(0.5)  # it says so just before it waits
                os.write(terminal, b"\x03")
                pressed = True
    assert os.waitpid(process, 0)[1] == 0
    assert b"at its end" in said, said


def test_no_window_is_told_once_and_only_where_one_is_wanted(picture, monkeypatch, capfd):
    monkeypatch.setenv(BACKEND, "module://nowhere")
    window = Window()
    window.show(picture)
    assert window.process is None
    window.wanted = True
    for _ in range(2):
        window.show(picture)
    window.stay()
    line, nothing = capfd.readouterr().out.split("\n")
    assert line.startswith("--plot_islands: no window by MPLBACKEND=module://nowhere (")
    assert "MPLBACKEND=webagg" in line and not nothing
    monkeypatch.setenv(BACKEND, "agg")
    window.process = None
    window.show(picture)
    window.stay()
    assert capfd.readouterr().out == ""


def test_page_shows_the_picture_anew_and_ends_with_its_training(tmp_path, picture):
    with program(picture, "webagg") as page:
        said = page.stdout.readline()
        address = said.split("http://")[1].split()[0]
        for _ in range(600):
            try:
                html = urllib.request.urlopen(f"http://{address}/1", timeout=10).read().decode()
                break
            except OSError:
                time.sleep(0.1)
        assert "ws" in html

        async def watch():
            socket = await websocket_connect(f"ws://{address}/1/ws")
            for message in ({"type": "supports_binary", "value": True}, {"type": "refresh"}):
                await socket.write_message(json.dumps(message | {"figure_id": "1"}))
            other = tmp_path / "other.png"
            drawn, changed = 0, False
            while drawn < 2:
                message = await socket.read_message()
                if isinstance(message, bytes):
                    assert message.startswith(b"\x89PNG")
                    drawn += 1
                    if not changed:
                        Image.new("RGB", (40, 30), "blue").save(other)
                        other.replace(picture)
                        changed = True
                elif json.loads(message)["type"] == "draw":
                    await socket.write_message(json.dumps({"type": "draw", "figure_id": "1"}))

        IOLoop(make_current=False).run_sync(watch, timeout=60)
        page.stdin.close()
        assert page.wait(timeout=30) == 0
