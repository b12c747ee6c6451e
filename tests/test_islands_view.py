import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT
from PIL import Image
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from agglomerator import Agglomerator
from agglomerator.data.module import Data
from agglomerator.islands_view import MOST_FRAMES, IslandsView, samples, states_of
from agglomerator.settings import Settings
from agglomerator.stages import Stage

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


def test_frames_stay_few_and_even(view, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    for step in range(0, 4000, 10):
        view._keep_frame(picture, step)
    steps = [int(frame.stem) for frame in view._frames()]
    assert len(steps) == MOST_FRAMES and steps[0] == 0 and steps[-1] == 3990
    gaps = [after - before for before, after in zip(steps[:-1], steps[1:], strict=True)]
    assert max(gaps) <= 4 * 40
    view._drop_frames(2000)
    assert [int(frame.stem) for frame in view._frames()] == [s for s in steps if s <= 2000]


def test_looking_at_a_network_in_training_leaves_no_trace():
    torch.manual_seed(0)
    data = Data(SMALL)
    data.setup()
    module = Stage(Agglomerator(**vars(SMALL)), SMALL, data)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    chance = torch.get_rng_state()
    images, labels = samples(data.val, 10)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    states = states_of(module, data.view(images))
    assert states.shape == (5, 6, 16, 2, 8)
    assert module.training and module.model.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert torch.get_rng_state().equal(chance)


def test_page_shows_the_picture_anew_and_ends_with_its_training(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    program = ROOT / "src" / "agglomerator" / "islands_window.py"
    page = subprocess.Popen(
        [sys.executable, program, picture],
        env=os.environ | {"MPLBACKEND": "webagg"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = page.stdout.readline()
        address = said.split("http://")[1].split()[0]
        for _ in range(50):
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
    finally:
        page.kill()
