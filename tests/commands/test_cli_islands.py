import json

import numpy as np
import pytest
import torch
from conftest import SMALL, run_main, run_program, small_run
from PIL import Image

from agglomerator import load_checkpoint
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.islands.segments import count, segment
from agglomerator.runs.checkpoints import SHELF

CONFIGS = {
    "CIFAR100": "config_CIFAR100.cfg",
    "PhotoParts": "config_PhotoParts.cfg",
    "CIFAR10": "config_CIFAR10.cfg",
    "FashionMNIST": "config_FashionMNIST.cfg",
    "MNIST": "config_MNIST.cfg",
    "PartWhole": "config_PartWhole_islands.cfg",
}
PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(path):
    return path.read_bytes().startswith(PNG)


def test_training_draws_logs_and_animates_islands(stage_one):
    folder = stage_one.output / "small" / "islands"
    for name in ("contrastive.png", "contrastive_iterations.png"):
        assert is_picture(folder / name)
    frames = sorted((folder / "frames" / "contrastive").iterdir())
    assert [int(frames[i].stem) for i in (0, -1)] == [0, 24]
    with Image.open(folder / "contrastive.gif") as animation:
        assert animation.n_frames == len(frames)
    header, *_ = (stage_one.output / "small/logs/contrastive/metrics.csv").read_text().splitlines()
    for name in ("cosine", "number", "size", "inside"):
        assert {f"val_islands_{name}_{level}" for level in (0, 1)} <= set(header.split(","))


@pytest.mark.slow
def test_a_backend_that_is_not_there_does_not_stop_a_run(tmp_path):
    backend = "module://matplotlib_inline.backend_inline"
    flags = "--exp_name=n", "--max_epochs=1", "--limit_train=2", "--limit_val=1", "--plot_islands"
    flags = *SMALL, f"--output_dir={tmp_path}", *flags
    said = run_program(*flags, environment={"MPLBACKEND": backend}).stdout
    assert said.count(f"MPLBACKEND={backend}") == 1
    assert is_picture(tmp_path / "n" / "islands" / "contrastive.png")


def test_scores_of_a_test_are_those_of_its_islands(stage_one_checkpoint, tmp_path):
    result = small_run(
        tmp_path,
        "--exp_name=tested",
        "--mode=test",
        "--island_threshold=0.5",
        "--plot_islands",
        "--figure_format=pdf",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
    )
    record = json.loads((tmp_path / "tested" / "test_contrastive.json").read_text())["islands"]
    assert record["threshold"] == 0.5 and len(record["rows"]) == 2
    names = (
        "islands/contrastive_test",
        "islands/contrastive_test_iterations",
        "confusion_contrastive",
    )
    for name in names:
        assert is_picture(tmp_path / "tested" / f"{name}.png") and f"{name}.pdf" in result.stdout
        assert (tmp_path / "tested" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "level 1" in result.stdout and "cosine of at least 0.5" in result.stdout

    model = load_checkpoint(stage_one_checkpoint)
    data = ImageDataModule(Settings(**vars(model.settings) | {"dataset": "digits"}))
    data.setup()
    images, _ = data.test.dataset[:]
    assert record["images"] == len(images)
    with torch.no_grad():
        number, inside = count(segment(model.states(data.view(images))[-1], 0.5))
    for level, row in enumerate(record["rows"]):
        assert row["of"] == f"level {level}"
        assert row["number"] == pytest.approx(number[:, level].mean().item(), rel=1e-3)
        assert row["inside"] == pytest.approx(inside[:, level].mean().item(), abs=1e-3)
        assert row["size"] == pytest.approx(16 / row["number"])


def test_islands_of_test_images_and_of_own_ones(stage_one_checkpoint, tmp_path):
    flags = "--exp_name=drawn", "--mode=islands", f"--load_checkpoint_dir={stage_one_checkpoint}"
    small_run(tmp_path, *flags)
    folder = tmp_path / "drawn" / "islands"
    assert is_picture(folder / "test.png") and is_picture(folder / "test_iterations.png")
    (colours,) = folder.glob("projection_*.npz")  # of a network that was trained elsewhere
    projection = colours.read_bytes()

    own = tmp_path / "own" / "deeper"
    own.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(9):
        pixels = draw.integers(255, size=(20 + i, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(own / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}")
    (own / "notes.txt").write_text("no image")
    result = small_run(tmp_path, *flags, f"--images={own.parent}")
    names = "images.png", "images_iterations.png", "images_2.png", "images_2_iterations.png"
    assert all(is_picture(folder / name) and name in result.stdout for name in names)
    assert colours.read_bytes() == projection
    for i in range(8):
        next(own.glob(f"{i}.*")).unlink()
    result = small_run(tmp_path, *flags, f"--images={own.parent}")
    assert "Earlier pictures of other images were moved to" in result.stdout
    assert [path.name for path in folder.glob("images_2*")] == []
    assert len(list((folder.parent / "earlier").glob("*_images/islands/images_2*.png"))) == 2

    content = torch.load(stage_one_checkpoint, weights_only=True)
    content["state_dict"]["model.init_levels"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    small_run(tmp_path, *flags[:2], f"--load_checkpoint_dir={tmp_path / 'other.ckpt'}")
    assert len(list(folder.glob("projection_*.npz"))) == 2 and colours.read_bytes() == projection


@pytest.mark.slow
def test_chosen_test_images_as_png_and_vectors(stage_one_checkpoint, tmp_path):
    flags = "--exp_name=drawn", "--mode=islands", f"--load_checkpoint_dir={stage_one_checkpoint}"
    flags = *flags, "--images=3,10-17", "--figure_format"
    said = small_run(tmp_path, *flags, "svg", "--figure_dpi=50").stdout
    folder = tmp_path / "drawn" / "islands"
    names = "test", "test_iterations", "test_2", "test_2_iterations", "test_level0", "test_level1"
    for name in names:
        assert is_picture(folder / f"{name}.png") and str(folder / f"{name}.svg") in said
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    assert not (folder / "test_3.png").exists()
    with Image.open(folder / "test.png") as picture:
        width = picture.width
    small_run(tmp_path, *flags, "pdf", "--figure_dpi=100")
    with Image.open(folder / "test.png") as picture:
        assert picture.width == pytest.approx(2 * width, abs=1)
    assert (folder / "test.pdf").read_bytes().startswith(b"%PDF")
    wrong = *SMALL, f"--output_dir={tmp_path}", *flags[:-2], "png"
    for numbers in ("3-2", "0,9000"):
        said = run_main(*wrong[:-1], f"--images={numbers}", ok=False).stderr
        assert said.startswith(f"error: --images={numbers}: digits has the test images 0 to ")


def test_islands_of_the_parts_that_a_data_set_knows(tmp_path):
    flags = "--mode=islands", "--images=0", "--load_checkpoint_dir=pretrained:PartWhole"
    flags = *flags, "--figure_format=svg", f"--output_dir={tmp_path}"
    run_main("--flagfile=config/config_PartWhole_islands.cfg", *flags)
    picture = next(tmp_path.glob("*/islands/test.svg")).read_text()
    for text in ("true parts", "true objects", "level 1"):
        assert f"<!-- {text} -->" in picture


@pytest.fixture
def photographs(tmp_path):
    """A folder of 12 images to train on and 8 to test; those of the first class have masks."""
    draw, root = np.random.default_rng(0), tmp_path / "photographs"
    for split, n in (("train", 6), ("test", 4)):
        for name in ("other", "things"):
            for i in range(n):
                left = draw.integers(4, 14)
                thing = np.zeros((20, 24), np.uint8)
                thing[5:15, left : left + 8] = 1
                pixels = draw.integers(60, size=(20, 24), dtype=np.uint8) + 180 * thing
                paths = [root / kind / split / name for kind in ("", "parts", "objects")]
                parts = thing * (1 + (np.arange(20) > 9)[:, None])
                for path, image in zip(paths, (pixels, parts, thing), strict=True):
                    if name == "things" or path == paths[0]:
                        path.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(np.uint8(image)).save(path / f"{i}.png")
    return root


def test_masks_beside_a_folder_score_islands_in_both_modes(
    stage_one_checkpoint, photographs, tmp_path
):
    flags = f"--load_checkpoint_dir={stage_one_checkpoint}", "--island_threshold=0.6"
    own = small_run(tmp_path, *flags, "--exp_name=p", "--mode=islands", f"--images={photographs}")
    record = json.loads((tmp_path / "p/islands/islands.json").read_text())
    assert record["images"] == 4 and record["masks"] == {"parts": 4, "objects": 4}
    assert record["masks_for_ari"] == {"parts": 4, "objects": 0}
    assert "parts of 4, objects of 4 (ARI: of 0 with two segments or more);" in own.stdout
    assert record["threshold"] == 0.6 and record["checkpoint"] == str(stage_one_checkpoint)
    names = [row["of"] for row in record["rows"]]
    assert names[:2] == ["level 0", "level 1"] and "position alone, true number" in names
    assert all(f"\n  {name}  " in own.stdout for name in names)
    assert "objects, clusters" in own.stdout and "explains" in own.stdout
    level = record["rows"][1]
    assert {"cosine", "number", "size", "inside", "parts_ari", "parts_iou", "objects_iou",
            "clustered_parts_ari", "clustered_objects_iou", "position"} <= level.keys()  # fmt: skip

    as_data = "--dataset=ImageFolder", f"--data_dir={photographs}", "--normalization=digits"
    tested = small_run(tmp_path, *flags, "--exp_name=t", "--mode=test", *as_data)
    of_test = json.loads((tmp_path / "t/test_contrastive.json").read_text())
    assert of_test["images"] == 8 and "4 test images with masks" in tested.stdout
    drawn = small_run(tmp_path, *flags, "--exp_name=d", "--mode=islands", *as_data)
    of_data = json.loads((tmp_path / "d/islands/islands.json").read_text())
    assert "islands.json" in drawn.stdout
    for found in (of_test["islands"], of_data):
        for one, other in zip(found["rows"], record["rows"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_masks_of_other_numbers_and_beside_val(stage_one_checkpoint, photographs, tmp_path):
    for folder in photographs, photographs / "parts", photographs / "objects":
        (folder / "test").rename(folder / "val")
    for path in (photographs / "objects/val/things").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * 255).save(path)
    flags = "--dataset=ImageFolder", f"--data_dir={photographs}", "--normalization=digits"
    flags = *flags, f"--load_checkpoint_dir={stage_one_checkpoint}", "--mode=islands"
    said = small_run(tmp_path, *flags, "--exp_name=v").stdout
    assert "objects: no mask has a segment, a value from 1 to 254 (255 is ignored)" in said
    record = json.loads((tmp_path / "v/islands/islands.json").read_text())
    assert record["images"] == 4 and record["masks"] == {"parts": 4, "objects": 0}


def test_a_mask_that_is_wrong_ends_the_run_with_its_name(
    stage_one_checkpoint, photographs, tmp_path
):
    path = photographs / "parts/test/things/2.png"
    Image.new("L", (9, 9)).save(path)
    flags = *SMALL, f"--output_dir={tmp_path}", f"--load_checkpoint_dir={stage_one_checkpoint}"
    said = run_main(*flags, "--mode=islands", f"--images={photographs}", ok=False).stderr
    image = photographs / "test/things/2.png"
    assert said == f"error: {path}: a mask of 9x9, but {image} has 24x20; save it so.\n"

    as_data = "--dataset=ImageFolder", f"--data_dir={photographs}", "--normalization=digits"
    done = run_main(*flags, *as_data, "--exp_name=t", "--mode=test", ok=False)
    assert done.stderr.startswith(f"error: {path}: a mask of 9x9")
    assert "top-1 " in done.stdout  # what the test found is kept
    record = json.loads((tmp_path / "t/test_contrastive.json").read_text())
    assert record["images"] == 8 and (tmp_path / "t/predictions_contrastive.csv").is_file()


def test_a_test_tells_what_position_explains_without_masks(stage_one_checkpoint, tmp_path):
    flags = "--exp_name=q", "--mode=test", f"--load_checkpoint_dir={stage_one_checkpoint}"
    small_run(tmp_path, *flags)
    record = json.loads((tmp_path / "q/test_contrastive.json").read_text())["islands"]
    model = load_checkpoint(stage_one_checkpoint)
    data = ImageDataModule(Settings(**vars(model.settings) | {"dataset": "digits"}))
    data.setup()
    images, _ = data.test.dataset[:]
    with torch.no_grad():
        unit = torch.nn.functional.normalize(model.states(data.view(images))[-1].double(), dim=-1)
    for level, row in enumerate(record["rows"]):
        vectors = unit[:, :, level]
        of_places = vectors.mean(0).var(0, correction=0).sum()
        share = of_places / vectors.flatten(0, 1).var(0, correction=0).sum()
        assert row["position"] == pytest.approx(share.item(), rel=1e-3)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHELF.glob("*.ckpt")))
def test_networks_that_come_with_the_project_look_at_own_images(name, tmp_path):
    path = tmp_path / "own.png"
    pixels = np.random.default_rng(0).integers(255, size=(40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    flags = "--mode=islands", f"--load_checkpoint_dir=pretrained:{name}", f"--images={path}"
    program = run_program if name == "FashionMNIST" else run_main
    program(f"--flagfile=config/{CONFIGS[name]}", *flags, f"--output_dir={tmp_path}")
    assert list(tmp_path.glob("*/islands/images_iterations.png"))
