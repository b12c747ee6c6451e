"""Batch and length of a training on a folder of images, and a classifier that begins from class
means, as a user runs them."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from conftest import run_here, run_main, small_run
from test_flags import parse
from test_plan import FOLDER, SHADES, write

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.config import Settings
from agglomerator.model.heads import classifier, start_from_means
from agglomerator.runs.checkpoints import read
from agglomerator.training.length import LENGTH, complete_from_images, length_for, tell_length

SMALL = {name: value for name, value in FOLDER.items() if name not in LENGTH[:4]}
DERIVED = length_for(8000) | {"learning_rate": SMALL["learning_rate"]}  # this one is given


def test_length_for_any_number_of_images():
    previous = None
    for n_images in (1, 2, 3, 10, 96, 120, 1000, 10**4, 10**5, 10**6, 10**7):
        found = length_for(n_images)
        batch, epochs = found["batch_size"], found["max_epochs"]
        assert 1 <= batch <= 256 and batch <= n_images and found["lr_speed"] == epochs
        assert n_images < 4 or n_images // batch >= 4
        assert 2 <= found["supervised_epochs"] <= max(2, epochs)
        if previous is not None:
            assert batch >= previous[0] and epochs <= previous[1]
            assert epochs * n_images >= previous[1] * previous[2]  # more images, more work
        previous = batch, epochs, n_images
    assert length_for(10**4, optimizer="muon")["learning_rate"] == 0.012  # that of CIFAR-10
    assert length_for(800, optimizer="muon")["learning_rate"] == 0.006
    few = length_for(10**4, optimizer="muon", batch=32, accumulate=4)
    assert few["learning_rate"] == 0.012  # a step of as many images
    assert length_for(96)["max_epochs"] == round(1000 * 96**-0.4)
    whole = length_for(10**5)["batch_size"]
    assert [length_for(10**5, n)["batch_size"] for n in (2, 8, 1000)] == [whole // 2, whole // 8, 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, output, what was said) of a network trained on a folder, no length given: 8000
    images to learn from, so that there are few epochs."""
    place = tmp_path_factory.mktemp("length")
    folder, output = write(place / "shades", SHADES, n_train=100), place / "output"
    for path in list((place / "shades" / "train").rglob("*.png")):
        for copy in range(1, 25):
            os.link(path, path.with_name(f"{path.stem}_{copy}.png"))
    flags = dict(SMALL, mode="all", data_dir=folder, output_dir=output)
    said = run_main(
        *(f"--{name}={value}" for name, value in flags.items()), "--limit_train=1", "--limit_val=1"
    )
    return folder, output / "run", said.stdout


def stored(path):
    return torch.load(path, weights_only=True)["hyper_parameters"]


def test_a_folder_trains_without_a_batch_and_a_length(trained):
    _, output, said = trained
    wanted = DERIVED
    lines = [line for line in said.splitlines() if "Chosen for" in line]
    batch = f"--batch_size={wanted['batch_size']}"
    assert len(lines) == 2 and all(batch in line and " 8000 " in line for line in lines)
    assert f"--max_epochs={wanted['max_epochs']};" in lines[0]
    assert f"--supervised_epochs={wanted['supervised_epochs']};" in lines[1]
    one, two = (stored(output / "checkpoints" / f"{p}best.ckpt") for p in ("", "supervised_"))
    assert wanted.items() <= one.items()
    assert two["batch_size"] == one["batch_size"]
    assert two["max_epochs"] == two["lr_speed"] == wanted["supervised_epochs"]
    with (output / "logs" / "contrastive" / "metrics.csv").open(newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)
                 if row["learning_rate"]]  # fmt: skip
    assert rates[-1] < max(rates) / 1000  # the schedule ends with the training
    assert json.loads((output / "test_supervised.json").read_text())["top1"] > 0.8


def test_what_is_given_stays_and_decides(trained):
    folder, output, _ = trained
    settings = Settings(**SMALL | dict(data_dir=folder))
    derived = complete_from_images(settings, set(SMALL))
    assert DERIVED.items() <= vars(derived).items()
    given = settings.replace(batch_size=8, max_epochs=3, lr_speed=3)
    found = complete_from_images(given, {*SMALL, "batch_size", "max_epochs"})
    assert found == given  # with --max_epochs stage two is as long as stage one
    assert complete_from_images(settings.replace(dataset="digits"), set()).batch_size == 1024
    free = settings.replace(batch_size=32, optimizer="muon")  # the rate follows from the batch
    found = complete_from_images(free, {*SMALL, "batch_size"} - {"learning_rate"})
    assert (found.batch_size, found.learning_rate) == (32, 0.006)


def test_resume_and_stage_two_keep_what_the_checkpoint_was_trained_with(trained, tmp_path, capsys):
    folder, output, _ = trained
    flags = dict(SMALL, data_dir=folder, output_dir=str(tmp_path), limit_train=1, limit_val=1)
    run_here(**flags, batch_size=20, max_epochs=2)
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    run_here(**flags, resume_training=True)
    said = capsys.readouterr().out
    assert "It is done" in said and "more than --max_epochs=2" in said
    run_here(**flags, supervise=True, load_checkpoint_dir=last, supervised_epochs=1)
    assert stored(last.replace("last", "supervised_last"))["batch_size"] == 20


def test_stage_two_fits_what_is_kept_of_stage_one(trained):
    """A batch and a share that stage one was given, and a length that it did not have."""
    folder, output, _ = trained
    start = read(output / "checkpoints" / "best.ckpt")
    told = start.settings | {"supervised_epochs": None, "batch_size": 4, "val_share": 0.5}
    settings = Settings(**SMALL | dict(data_dir=folder, supervise=True))
    given = set(SMALL) - {"learning_rate"}
    found = complete_from_images(settings, given, dataclasses.replace(start, settings=told))
    wanted = length_for(5000, batch=4)
    assert wanted["supervised_epochs"] != length_for(8000)["supervised_epochs"]
    for name in ("supervised_epochs", "batch_size", "learning_rate"):
        assert getattr(found, name) == wanted[name], name
    masked = settings.replace(supervise=False, pretraining="masked", head="mean")
    assert "--max_epochs=" in tell_length(masked, set(), 8000)


def test_a_folder_of_fewer_images_than_a_batch(tmp_path):
    """As shipped, but for the size: 6 images of 2 classes."""
    folder = write(tmp_path / "few", dict(list(SHADES.items())[:2]), n_train=3, n_test=2)
    flags = (
        "--flagfile=config/config_ImageFolder.cfg", f"--data_dir={folder}", "--image_size=32",
        f"--output_dir={tmp_path}", "--mode=all", "--limit_train=1", "--patch_dim=32",
        "--tokenizer_width=8", "--logger=none", "--max_epochs=2",
    )  # fmt: skip
    said = run_main(*flags).stdout
    assert "--batch_size=1" in said and "top-1" in said


def test_the_shipped_config_is_small_and_has_enough_columns():
    found = parse("--flagfile=config/config_ImageFolder.cfg")
    assert not set(LENGTH) & set(found["given"])
    model = Agglomerator(**found["settings"] | {"n_classes": 200})
    assert model.settings.grid_size >= 7
    assert sum(p.numel() for p in model.parameters()) < 2.5e6


@pytest.mark.parametrize("n_classes, width", [(3, 16), (8, 16), (40, 16), (2, 5)])
def test_a_classifier_of_class_means_is_the_nearest_class_mean(n_classes, width):
    generator = torch.Generator().manual_seed(n_classes)
    means = torch.randn(n_classes, width, generator=generator)
    means = torch.nn.functional.normalize(means, dim=1)
    embedding = torch.randn(50, width, generator=generator)
    embedding = torch.nn.functional.normalize(embedding, dim=1)
    means[1] = 0  # a class without images
    head = classifier(Settings(contr_dim=width, n_classes=n_classes))
    start_from_means(head, means, 10.0)
    with torch.no_grad():
        logits = head(embedding).double().numpy()
    pairs = min(n_classes, width // 2)
    u, s, v = np.linalg.svd(means.double().numpy(), full_matrices=False)
    expected = 10 * embedding.double().numpy() @ ((u[:, :pairs] * s[:pairs]) @ v[:pairs]).T
    if n_classes <= width // 2:
        assert np.allclose(expected, 10 * (embedding @ means.T).numpy(), atol=1e-5)
    assert np.allclose(expected[:, 1], 0, atol=1e-9)  # no more than rounding
    assert np.allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_stage_two_begins_from_the_class_means(trained, tmp_path, capsys):
    folder, output, said = trained
    assert "begins from the class means of 64 training images" in said
    start = str(output / "checkpoints" / "best.ckpt")
    flags = dict(SMALL, data_dir=folder, output_dir=str(tmp_path), load_checkpoint_dir=start)
    two = dict(supervise=True, supervised_epochs=1, supervised_learning_rate=0.0)
    last = tmp_path / "run" / "checkpoints" / "supervised_last.ckpt"
    run_here(**flags, mode="test")
    by_means = json.loads((tmp_path / "run" / "test_contrastive.json").read_text())
    run_here(**flags | two)
    run_here(**flags | dict(mode="test", load_checkpoint_dir=str(last)))
    by_classifier = json.loads((tmp_path / "run" / "test_supervised.json").read_text())
    assert by_classifier["confusion_matrix"] == by_means["confusion_matrix"]
    capsys.readouterr()
    run_here(**flags | two, classifier_start="weights")
    assert "class means" not in capsys.readouterr().out
    before, after = load_checkpoint(start).state_dict(), load_checkpoint(last).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_stage_two_begins_from_the_prototypes(tmp_path, capsys):
    flags = "--prototypes", "--exp_name=run", "--limit_train=20", "--limit_val=2", "--max_epochs=1"
    two = "--supervised_epochs=1", "--supervised_learning_rate=0.0", "--mode=all"
    said = small_run(tmp_path, *flags, *two).stdout
    assert "The classifier begins from the prototypes" in said
    start = tmp_path / "run" / "checkpoints" / "best.ckpt"
    small_run(tmp_path, "--exp_name=run", "--mode=freeze", f"--load_checkpoint_dir={start}")
    features, labels = (np.load(tmp_path / "run" / f"{name}_test.npy") for name in
                        ("features", "labels"))  # fmt: skip
    prototypes = load_checkpoint(start).prototypes.detach().numpy()
    towards = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels, (features @ towards.T).argmax(1)), 1)
    found = json.loads((tmp_path / "run" / "test_supervised.json").read_text())
    assert found["confusion_matrix"] == expected.tolist()

    # Other classes, of which there is no prototype yet.
    folder = write(tmp_path / "shades", SHADES)
    flags = dict(SMALL, data_dir=folder, output_dir=str(tmp_path), n_channels=1, supervise=True)
    flags |= dict(load_checkpoint_dir=str(start), supervised_epochs=1, image_size=16, contr_dim=32)
    capsys.readouterr()
    run_here(**flags)
    said = capsys.readouterr().out
    assert "A new classifier" in said and "begins from the class means" in said
