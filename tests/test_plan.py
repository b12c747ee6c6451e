"""What comes from the checkpoint: classes, split, normalisation; in files as a user has them."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_SETTINGS, run_here
from PIL import Image

from agglomerator import load_checkpoint
from agglomerator.cli import Given
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.plan import complete_from_checkpoint, resolve
from agglomerator.runs.checkpoints import read
from agglomerator.util.errors import UserError

SHADES = {"ash": 20, "bone": 90, "clay": 160, "dust": 230}
FOLDER = dict(
    dataset="ImageFolder", image_size=16, conv_image_size=4, n_channels=1, patch_dim=16,
    contr_dim=32, batch_size=16, learning_rate=0.01, num_workers=0, logger="none",
    max_epochs=6, lr_speed=6, supervised_epochs=20, exp_name="run", augmentation="mirror",
)  # fmt: skip


def write(root, shades, n_train=16, n_test=6):
    """A folder with a class for each name, told by how bright its images are."""
    random = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for name, shade in shades.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = random.normal(shade, 12, (16, 16)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return str(root)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, output) of a network trained on the shades, both stages."""
    place = tmp_path_factory.mktemp("trained")
    folder, output = write(place / "shades", SHADES), place / "output"
    run_here(**FOLDER | dict(mode="all", data_dir=folder, output_dir=str(output)))
    return folder, output / "run"


def checkpoint(trained, stage="supervised_"):
    return str(trained[1] / "checkpoints" / f"{stage}best.ckpt")


def run(capsys, tmp_path, **flags):
    """What a run says, and its folder."""
    capsys.readouterr()
    run_here(**FOLDER | dict(output_dir=str(tmp_path), exp_name="new") | flags)
    return capsys.readouterr().out, tmp_path / "new"


def record_of(folder, stage="supervised"):
    return json.loads((folder / f"test_{stage}.json").read_text())


@pytest.fixture
def tested(trained):
    record = record_of(trained[1])
    assert record["top1"] > 0.8  # or the tests below say little
    return record


def test_the_same_classes_in_another_order(trained, tested, tmp_path, capsys):
    names = {"Dust": 230, "ash": 20, "bone": 90, "clay": 160}  # upper case comes first
    folder = write(tmp_path / "other", names)
    load = dict(data_dir=folder, load_checkpoint_dir=checkpoint(trained))
    said, place = run(capsys, tmp_path, mode="test", **load)
    record = record_of(place)
    assert "mapped by name" in said
    assert record["top1"] > 0.8 and list(record["per_class"]) == list(SHADES)

    said, place = run(capsys, tmp_path, mode="freeze", **load)
    with (place / "images_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.load(place / "labels_test.npy")
    assert [int(row["label"]) for row in rows] == labels.tolist()
    for row in rows:
        name = list(SHADES)[int(row["label"])]
        assert row["class"] == name and f"/test/{name}/" in row["file"].lower()
    assert [int(row["index"]) for row in rows] == list(range(24))


def test_some_of_the_classes(trained, tested, tmp_path, capsys):
    folder = write(tmp_path / "some", {name: SHADES[name] for name in ("bone", "dust")})
    load = dict(data_dir=folder, load_checkpoint_dir=checkpoint(trained))
    said, place = run(capsys, tmp_path, mode="test", **load)
    record = record_of(place)
    assert "2 of the 4 classes" in said
    assert record["per_class"]["ash"] is None and record["top1"] > 0.7


def test_other_classes(trained, tmp_path, capsys):
    names = {"ebony": 20, "flax": 125, "gold": 230}
    folder = write(tmp_path / "other", names)
    flags = dict(data_dir=folder, load_checkpoint_dir=checkpoint(trained))
    with pytest.raises(UserError, match="ebony, flax, gold.*ash, bone, clay, dust.*--supervise"):
        run(capsys, tmp_path, mode="test", **flags)
    with pytest.raises(UserError, match="--n_classes=7.*3 classes"):
        run(capsys, tmp_path, supervise=True, n_classes=7, **flags)
    with pytest.raises(UserError, match="--resume_training.*ebony.*ash"):
        run(capsys, tmp_path, supervise=True, resume_training=True, **flags)
    said, place = run(capsys, tmp_path, mode="freeze", **flags)
    assert "nearest class mean" in said
    assert json.loads((place / "embedding.json").read_text())["error"] < 0.3
    said, place = run(capsys, tmp_path, mode="islands", **flags)
    assert (place / "islands" / "test.png").is_file()

    said, place = run(capsys, tmp_path, supervise=True, **flags)
    assert "A new classifier for the 3 classes" in said
    best = place / "checkpoints" / "supervised_best.ckpt"
    run(capsys, tmp_path, mode="test", data_dir=folder, load_checkpoint_dir=str(best))
    assert record_of(place)["top1"] > 0.7
    assert load_checkpoint(best).class_names == list(names)

    # Stage one as well, and a checkpoint of it is tested by the class means of whatever is there.
    said, place = run(capsys, tmp_path, **flags)
    assert "A new classifier" in said
    start = checkpoint(trained, stage="")
    run(capsys, tmp_path, mode="test", data_dir=folder, load_checkpoint_dir=start)
    assert record_of(place, "contrastive")["top1"] > 0.7


def test_the_split_is_that_of_the_checkpoint(trained, tmp_path, capsys):
    folder, _ = trained
    start = checkpoint(trained)

    def held_out(**flags):
        said, place = run(capsys, tmp_path, mode="freeze", load_checkpoint_dir=start, **flags)
        with (place / "images_val.csv").open(newline="") as file:
            return said, [int(row["index"]) for row in csv.DictReader(file)]

    data = ImageDataModule(Settings(**FOLDER | dict(data_dir=folder, n_classes=4)))
    data.setup()
    said, rows = held_out(data_dir=folder)
    assert rows == list(data.val.indices) and "--seed" not in said
    said, rows = held_out(data_dir=folder, seed=7, val_share=0.5)
    assert rows == list(data.val.indices)
    assert "--seed=7: the images held out stay" in said and "--val_share=0.5" in said
    other = write(tmp_path / "other", SHADES, n_train=20)
    said, rows = held_out(data_dir=other)
    assert "learned from other images" in said and len(rows) == 16


def test_stage_two_holds_out_what_stage_one_did(tmp_path, capsys):
    one = SMALL_SETTINGS | dict(max_epochs=1, limit_train=2, limit_val=1, exp_name="one")
    one |= dict(output_dir=str(tmp_path))
    run_here(**one, seed=7)
    start = tmp_path / "one" / "checkpoints"
    run_here(**one, supervise=True, load_checkpoint_dir=str(start / "best.ckpt"))
    stored = torch.load(start / "supervised_best.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["seed"] == stored["split_seed"] == 7
    flags = one | dict(load_checkpoint_dir=str(start / "best.ckpt"), exp_name="two")
    run_here(**flags, supervise=True, seed=8)
    path = tmp_path / "two" / "checkpoints" / "supervised_best.ckpt"
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (stored["seed"], stored["split_seed"]) == (8, 7)
    assert "stay those of" in capsys.readouterr().out


def test_another_normalisation_is_said(trained, tmp_path, capsys):
    flags = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained))
    said, _ = run(capsys, tmp_path, mode="test", normalization="MNIST", **flags)
    assert "--normalization=MNIST" in said and "ImageFolder" in said


def test_limits_are_drawn_from_all_of_a_folder(trained, tested, tmp_path, capsys):
    flags = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained))
    said, place = run(capsys, tmp_path, mode="test", limit_test=1, **flags)
    record = record_of(place)
    assert "--limit_test=1: 16 of 24 test images, drawn by --seed=42" in said
    assert record["images"] == 16 and None not in record["per_class"].values()
    assert record["top1"] > 0.7

    start = flags | dict(load_checkpoint_dir=checkpoint(trained, stage=""))
    said, place = run(capsys, tmp_path, mode="test", limit_train=1, **start)
    assert "16 of 52 training images" in said or "16 of 51 training images" in said
    assert record_of(place, "contrastive")["top1"] > 0.6

    said, place = run(capsys, tmp_path, mode="freeze", limit_train=2, limit_val=0, **flags)
    for name, n in (("train", 32), ("val", 0), ("test", 24)):
        assert np.load(place / f"features_{name}.npy").shape == (n, 32)
        assert np.load(place / f"labels_{name}.npy").shape == (n,)
    labels = np.load(place / "labels_train.npy")
    assert (np.diff(labels) >= 0).all() and len(set(labels)) == 4  # in data-set order


def test_the_contrastive_loss_of_a_test_is_of_mixed_batches(trained):
    settings = Settings(**FOLDER | dict(data_dir=trained[0], n_classes=4))
    for supervise in (False, True):
        data = ImageDataModule(settings.replace(supervise=supervise))
        data.setup()
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
        labels = [data.test_labels(rows).tolist() for _, rows in data.test_dataloader()]
        again = [data.test_labels(rows).tolist() for _, rows in data.test_dataloader()]
        assert labels == again
        in_order = sorted(sum(labels, []))
        assert (sum(labels, []) == in_order) == supervise
        assert supervise or len(set(labels[0])) == 4


def test_preprocess_gives_what_a_test_gives(trained):
    model = load_checkpoint(checkpoint(trained))
    assert model.class_names == list(SHADES)
    data = ImageDataModule(Settings(**FOLDER | dict(data_dir=trained[0], n_classes=4)))
    data.setup()
    pixels, _ = data.test[list(range(24))]
    expected = data.view(pixels)
    paths = sorted((Image.open(p) for p in data_paths(trained[0])), key=lambda i: i.filename)
    arrays = np.stack([np.asarray(image) for image in paths])
    for images in (
        [image.filename for image in paths], paths, arrays[..., None], list(arrays),
        arrays[..., None].repeat(3, -1), pixels, list(pixels), list(pixels.expand(-1, 3, -1, -1)),
    ):  # fmt: skip
        assert torch.equal(model.preprocess(images), expected)
    assert torch.equal(model.preprocess(paths[0]), expected[:1])
    wide = Image.new("RGBA", (80, 40), "white")
    assert model.preprocess(wide).shape == (1, 1, 16, 16)
    gray = torch.from_numpy(arrays)
    wrong = arrays, gray, gray[:3], gray[:4], arrays / 255, arrays.astype(int), []
    for images in (*wrong, np.zeros((2, 2, 2, 2, 2), np.uint8)):
        with pytest.raises(UserError, match="preprocess"):
            model.preprocess(images)


def data_paths(folder):
    from pathlib import Path

    return sorted((Path(folder) / "test").rglob("*.png"))


def test_images_that_are_not_normalised_are_warned_of(trained, recwarn):
    model = load_checkpoint(checkpoint(trained))
    pixels = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        model.classify(model.preprocess(pixels))
        assert not [w for w in recwarn if "preprocess" in str(w.message)]
        model(model.preprocess(np.full((9, 9), 200, np.uint8)))
        assert not [w for w in recwarn if "preprocess" in str(w.message)]
        for use in (model, model.classify, model.states):
            for images in (pixels, pixels / 255):
                with pytest.warns(UserWarning, match="model.preprocess"):
                    use(images)


def test_a_pillow_image_comes_out_as_its_file_does(trained, tmp_path):
    values = (np.arange(16 * 16, dtype=np.uint16) * 16).reshape(16, 16)  # 12 bits
    Image.fromarray(values).save(tmp_path / "x.png")
    preprocess = load_checkpoint(checkpoint(trained)).preprocess
    of_file = preprocess(str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        assert torch.equal(preprocess(image), of_file)
        assert preprocess.photographs(image)[0].shape == (1, 16, 16)
        image.paste(0, (0, 0, 16, 16))
        assert not torch.equal(preprocess(image), of_file)


def test_a_published_network_needs_its_data_set_named(trained, tmp_path):
    weights = load_checkpoint(checkpoint(trained)).state_dict()
    path = tmp_path / "p.pt"
    torch.save(weights, path)
    assert load_checkpoint(path).preprocess is None
    assert load_checkpoint(path).class_names is None
    model = load_checkpoint(path, dataset="MNIST")
    assert model.preprocess.mean == (0.5,)


def test_numbered_folders_are_taken_in_the_order_of_the_classes(trained, tmp_path, capsys):
    folder = write(tmp_path / "numbered", dict(zip("0123", SHADES.values(), strict=True)))
    load = dict(data_dir=folder, load_checkpoint_dir=checkpoint(trained))
    said, place = run(capsys, tmp_path, mode="test", **load)
    assert "0, 1, ..." in said and "are taken for ash, bone, clay, dust" in said
    assert record_of(place)["top1"] > 0.7


def test_another_network_than_the_trained_one_is_said(trained, tmp_path, capsys):
    load = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained))
    said, place = run(capsys, tmp_path, mode="test", iters=1, denoise_iter=-1, **load)
    assert "--iters=1:" in said and "was trained with 4" in said
    assert "the image reaches the top level" in said and "--denoise_iter=-1: " not in said
    said, place = run(capsys, tmp_path, mode="islands", consensus_self=True, **load)
    assert "--consensus_self=True:" in said


def test_iterations_that_a_published_network_did_not_have_are_said(trained, tmp_path, capsys):
    path = tmp_path / "p.pt"
    torch.save(load_checkpoint(checkpoint(trained)).state_dict(), path)
    load = dict(data_dir=trained[0], load_checkpoint_dir=str(path), supervise=True, mode="test")
    assert "--iters=3: " in run(capsys, tmp_path, iters=3, **load)[0]
    assert "was trained with" not in run(capsys, tmp_path, iters=4, **load)[0]


def test_a_config_of_another_network_leaves_a_published_one_as_it_is(trained, tmp_path, capsys):
    path = tmp_path / "p.pt"
    torch.save(load_checkpoint(checkpoint(trained)).state_dict(), path)
    load = dict(data_dir=trained[0], load_checkpoint_dir=str(path), supervise=True, mode="test")
    _, plain = run(capsys, tmp_path / "plain", **load)
    flags = dict(head="grid", tokenizer="vgg", iters=3, consensus_temperature=0.1)
    said, place = run(capsys, tmp_path / "config", **load | flags)
    assert "--iters=3: not used" in said and "--consensus_temperature=0.1: not used" in said
    assert record_of(place)["loss"] == record_of(plain)["loss"]
    typed = Given([*FOLDER, *load, *flags])
    typed.typed = {"iters"}
    settings = complete_from_checkpoint(Settings(**flags), typed, read(path))
    assert (settings.iters, settings.consensus_temperature) == (3, None)
    flags |= dict(head="flatten", tokenizer="convmlp")
    said, place = run(capsys, tmp_path / "given", **load | flags)
    assert "is left out" not in said and record_of(place)["loss"] != record_of(plain)["loss"]


def test_pictures_of_other_images_are_kept(trained, tmp_path, capsys):
    load = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained), mode="islands")
    images = trained[0] + "/test/ash", trained[0] + "/test/bone/00.png"
    _, place = run(capsys, tmp_path, images=images[0], **load)
    before = (place / "islands" / "images.png").read_bytes()
    said, place = run(capsys, tmp_path, images=images[1], **load)
    (kept,) = place.glob("earlier/*/islands/images.png")
    assert kept.read_bytes() == before and "were moved to" in said
    assert (place / "islands" / "images.png").read_bytes() != before


def test_a_rate_of_zero_is_one(trained, tmp_path, capsys):
    start = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained, stage=""))
    rates = dict(supervise=True, supervised_learning_rate=0.0, supervised_epochs=1)
    said, place = run(capsys, tmp_path, **start | rates)
    assert "; 1 epochs (--supervised_epochs), learning rate up to 0.0 (--supervised_l" in said
    with (place / "logs" / "supervised" / "metrics.csv").open(newline="") as file:
        logged = [row["learning_rate"] for row in csv.DictReader(file) if row["learning_rate"]]
    assert logged and set(map(float, logged)) == {0.0}


def test_a_test_takes_its_loss_and_its_islands_from_the_checkpoint(trained, tmp_path):
    start, told_file = checkpoint(trained, stage=""), str(tmp_path / "told.ckpt")
    content = torch.load(start, weights_only=True)
    told = dict(temperature=0.3, augmentation="crop", island_loss=0.1, island_threshold=0.6)
    content["hyper_parameters"] |= told
    torch.save(content, told_file)
    settings = Settings(**FOLDER | dict(data_dir=trained[0], augmentation="flip",
                        load_checkpoint_dir=told_file, mode="test"))  # fmt: skip
    found = resolve(settings, set(FOLDER) - {"augmentation"}, "test").settings
    assert {name: getattr(found, name) for name in told} == told
    found = resolve(settings.replace(island_threshold=0.9), {*FOLDER, "island_threshold"}, "test")
    assert found.settings.found_by == {"threshold": 0.9, "loss": None}
    assert found.settings.augmentation == "flip"
    model = load_checkpoint(told_file, island_threshold=0.9)
    assert model.settings.found_by == {"threshold": 0.9, "loss": None}


def test_a_test_with_another_loss_than_the_training_is_said(trained, tmp_path, capsys):
    load = dict(data_dir=trained[0], load_checkpoint_dir=checkpoint(trained, stage=""))
    said, _ = run(capsys, tmp_path, mode="test", temperature=0.5, **load)
    assert "--temperature=0.5: " in said and "was trained with 0.07" in said
    assert "--augmentation" not in said


def test_one_image_is_a_test_set(trained, tmp_path, capsys):
    folder = write(tmp_path / "few", {"ash": 20, "bone": 90}, n_train=1, n_test=1)
    shutil.rmtree(tmp_path / "few" / "test" / "bone")
    load = dict(data_dir=folder, load_checkpoint_dir=checkpoint(trained))
    for mode in ("test", "islands", "freeze"):
        _, place = run(capsys, tmp_path, mode=mode, **load)
    assert record_of(place)["images"] == record_of(place)["islands"]["images"] == 1
    with (place / "images_test.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [f"{folder}/test/ash/00.png"]


TAUGHT = dict(agreement=10.0, agreement_cue="islands", augmentation="views", resume_training=True)


def test_a_teacher_that_is_not_there_is_asked_for(trained, tmp_path, capsys):
    with pytest.raises(UserError, match="name the network that teaches"):
        run(capsys, tmp_path, data_dir=trained[0], **TAUGHT)
    assert not (tmp_path / "new").exists()


def test_a_taught_run_begins_with_its_teacher_and_goes_on_with_itself(trained, tmp_path, capsys):
    taught = TAUGHT | dict(data_dir=trained[0], head="flatten", max_epochs=1)
    teacher = dict(load_checkpoint_dir=checkpoint(trained, stage=""))
    said, place = run(capsys, tmp_path, **taught | teacher)
    assert "is its teacher" in said and "epoch 1/1" in said
    said, _ = run(capsys, tmp_path, **taught | dict(max_epochs=2))
    assert "epoch 2/2" in said and "epoch 1/2" not in said


def test_a_cue_without_its_loss_is_said(trained, tmp_path, capsys):
    said, _ = run(capsys, tmp_path, data_dir=trained[0], max_epochs=1, agreement_cue="composites")
    assert "--agreement_cue: does nothing without --agreement" in said
