import json

import av
import numpy as np
import pytest
from conftest import SMALL, run_main, run_program, small_run
from PIL import Image


def frames_of(folder, n=5):
    folder.mkdir()
    for t in range(n):
        pixels = np.zeros((24, 24), np.uint8)
        pixels[8:16, 2 + 3 * t : 10 + 3 * t] = 255
        Image.fromarray(pixels).save(folder / f"{t}.png")
    return folder


def check_animations(folder, n):
    with Image.open(folder / "video.gif") as animation:
        assert animation.n_frames == n
    with av.open(folder / "video.mp4") as container:
        assert len(list(container.decode(video=0))) == n


def test_islands_of_an_own_moving_picture(stage_one_checkpoint, tmp_path):
    flags = "--mode=islands", "--video", f"--load_checkpoint_dir={stage_one_checkpoint}"
    frames = frames_of(tmp_path / "frames")
    said = small_run(tmp_path, *flags, "--exp_name=v", f"--images={frames}", "--iters=3").stdout
    folder = tmp_path / "v" / "islands"
    check_animations(folder, 5)
    record = json.loads((folder / "video.json").read_text())
    assert record["frames"] == 5 and record["iters"] == 3 and record["threshold"] == 0.8
    names = [f"level {k}, {of}" for of in ("carried on", "each frame anew") for k in (0, 1)]
    assert [row["of"] for row in record["rows"]] == names and all(name in said for name in names)
    for row in record["rows"]:
        assert 1 <= row["frames"] <= 5 and 0 <= row["kept"] <= 1 and row["number"] <= 16
    assert all(island["last"] < 5 for island in record["islands"])
    small_run(tmp_path, *flags, "--exp_name=v", f"--images={frames}", "--iters=2")
    assert len(list((tmp_path / "v" / "earlier").glob("*_video/islands/video.gif"))) == 1


def test_what_cannot_be_followed(stage_one_checkpoint, tmp_path):
    flags = *SMALL, f"--output_dir={tmp_path}", f"--load_checkpoint_dir={stage_one_checkpoint}"
    said = run_main(*flags, "--mode=islands", "--video", ok=False).stderr
    assert said.startswith("error: --video: digits has no clips; name one by --images")
    said = run_main(*flags, "--mode=islands", "--video", "--images=0-3", ok=False).stderr
    assert said.startswith("error: --images=0-3: there is no such file or folder")
    said = run_main(*flags, "--mode=test", "--video", ok=False).stderr
    assert said.startswith("error: --video: only --mode=islands")
    assert not list(tmp_path.glob("**/video.*"))


@pytest.mark.slow
def test_moving_scenes_are_scored(tmp_path):
    flags = "--mode=islands", "--video", "--load_checkpoint_dir=pretrained:PartWhole"
    few = "--batch_size=2", "--limit_test=1", "--accelerator=cpu", f"--output_dir={tmp_path}"
    said = run_program(*flags, *few).stdout
    folder = tmp_path / "PartWhole" / "islands"
    check_animations(folder, 16)
    record = json.loads((folder / "video.json").read_text())
    assert record["clips"] == 2 and record["frames"] == 16 and "2 clips" in said
    carried, anew = record["rows"][0], record["rows"][2]
    for row in (carried, anew):
        assert 0.2 < row["parts_ari"] < row["parts_ari_of_frames"] < 1
    assert carried != anew
    assert record["rows"][-1]["of"] == "true masks, on this grid"
    assert record["rows"][-1]["parts_ari"] > 0.9
