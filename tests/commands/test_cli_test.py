import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, run_main, run_program, run_words, save_published, slow, small_run
from scipy.special import softmax
from sklearn.datasets import load_digits

from agglomerator import load_checkpoint
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.hierarchy.probes import probe
from agglomerator.runs.record import git_state

PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = dict(dataset="digits", image_size=16, conv_image_size=4, n_channels=1, patch_dim=16)


@pytest.fixture(scope="module")
def digits():
    data = ImageDataModule(Settings(**SETTINGS))
    data.setup()
    return data


def embed(checkpoint, data, subset):
    """Embeddings of a subset in its order, and its labels, without the program."""
    model = load_checkpoint(checkpoint)
    images, labels = subset.dataset[torch.as_tensor(list(subset.indices))]
    with torch.no_grad():
        return model(data.view(images)).numpy(), labels.numpy()


def predictions_of(folder, stage):
    """Rows of the per-image table of a test, as dictionaries."""
    with (folder / f"predictions_{stage}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_predictions(folder, stage, subset, probabilities):
    """The table has each tested image once, in data-set order, with what `probabilities` of all
    images of the data set (N, n_classes) say."""
    table = predictions_of(folder, stage)
    index = np.array([int(row["index"]) for row in table])
    assert index.tolist() == sorted(subset.indices)
    labels, classes = subset.dataset.labels.numpy()[index], np.array(subset.dataset.classes)
    assert [int(row["label"]) for row in table] == labels.tolist()
    assert [row["class"] for row in table] == classes[labels].tolist()
    found = np.array([int(row["prediction"]) for row in table])
    assert found.tolist() == probabilities[index].argmax(1).tolist()
    assert [row["predicted_class"] for row in table] == classes[found].tolist()
    found = [float(row["probability"]) for row in table]
    np.testing.assert_allclose(found, probabilities[index].max(1), atol=1e-3)


def check_record(folder, stage, n_images):
    """What every test's JSON, CSV and picture must hold; returns the JSON."""
    record = json.loads((folder / f"test_{stage}.json").read_text())
    matrix = np.array(record["confusion_matrix"])
    assert record["images"] == matrix.sum() == n_images
    assert record["top1"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert record["error"] == pytest.approx(1 - record["top1"])
    assert record["top1"] <= record["top5"] <= 1
    assert record["stage"] == stage
    shares = matrix.diagonal() / matrix.sum(1)
    assert list(record["per_class"].values()) == pytest.approx(shares.tolist())
    with (folder / f"confusion_{stage}.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert [[int(count) for count in row[1:]] for row in rows] == matrix.tolist()
    assert header[1:] == [row[0] for row in rows] == list(record["per_class"])
    assert (folder / f"confusion_{stage}.png").read_bytes().startswith(PNG)
    return record


@pytest.mark.parametrize("flip", [slow(False), True])
def test_test_of_the_classifier(stage_two_checkpoint, digits, tmp_path, flip):
    result = small_run(
        tmp_path,
        "--exp_name=tested",
        "--mode=test",
        "--supervise",
        "--plot_islands",
        f"--test_time_flip={flip}",
        f"--load_checkpoint_dir={stage_two_checkpoint}",
        program=run_main if flip else run_program,
    )
    record = check_record(tmp_path / "tested", "supervised", len(digits.test))
    assert f"{record['top1']:.2%}" in result.stdout
    assert record["test_time_flip"] == flip == ("with mirror images" in result.stdout)
    pictures = list((tmp_path / "tested" / "islands").glob("*test*.png"))
    assert pictures and all(path.read_bytes().startswith(PNG) for path in pictures)

    model = load_checkpoint(stage_two_checkpoint)
    images, labels = digits.test.dataset[:]
    with torch.no_grad():
        views = digits.view(images)
        logits = model.classify(views)
        if flip:
            logits = (logits + model.classify(views.flip(-1))) / 2
    check_predictions(tmp_path / "tested", "supervised", digits.test, softmax(logits.numpy(), 1))
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (labels.numpy(), logits.argmax(1).numpy()), 1)
    assert record["confusion_matrix"] == matrix.tolist()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert record["loss"] == pytest.approx(loss, rel=1e-3)


def test_test_of_a_stage_one_checkpoint(stage_one_checkpoint, digits, tmp_path):
    small_run(
        tmp_path,
        "--exp_name=tested",
        "--mode=test",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
    )
    record = check_record(tmp_path / "tested", "contrastive", len(digits.test))

    embedding, labels = embed(stage_one_checkpoint, digits, digits.train)
    means = np.stack([embedding[labels == c].mean(0) for c in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    embedding, labels = embed(stage_one_checkpoint, digits, digits.test)
    cosines = embedding @ means.T
    check_predictions(tmp_path / "tested", "contrastive", digits.test, softmax(cosines / 0.07, 1))
    accuracy = (cosines.argmax(1) == labels).mean()
    assert record["top1"] == pytest.approx(accuracy, abs=0.005)
    assert record["loss"] > 0


def test_freeze_writes_every_image_in_the_order_of_the_data_set(
    stage_one_checkpoint, digits, tmp_path
):
    result = run_program(
        *SMALL,
        "--exp_name=f",
        f"--output_dir={tmp_path}",
        "--mode=freeze",
        f"--load_checkpoint_dir={stage_one_checkpoint}",
        "--logger=wandb",
        environment={"WANDB_ERROR_REPORTING": "false"},
    )
    for name in ("train", "val", "test"):
        features = np.load(tmp_path / "f" / f"features_{name}.npy")
        labels = np.load(tmp_path / "f" / f"labels_{name}.npy")
        embedding, expected = embed(stage_one_checkpoint, digits, getattr(digits, name))
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, embedding, atol=1e-5)
        np.testing.assert_array_equal(labels, expected)
    n_images = len(digits.train) + len(digits.val) + len(digits.test)
    assert n_images == len(load_digits().target)

    # Digits have no known hierarchy: the silhouette is all that is scored.
    record = json.loads((tmp_path / "f" / "embedding.json").read_text())
    assert record["hierarchy"] is None and list(record["scores"]) == ["silhouette_by_class"]
    assert record["classified_by"] == "nearest class mean"
    arrays = (
        [np.load(tmp_path / "f" / f"{name}_{split}.npy") for name in ("features", "labels")]
        for split in ("train", "test")
    )
    assert record["probes"] == probe(*arrays) and record["probes"]["images"] == len(digits.train)
    assert f"{record['probes']['knn']:.2%} by 20 nearest neighbours" in result.stdout
    (table,) = (tmp_path / "f" / "logs" / "freeze").rglob("points*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"][:3] == ["image", "class", "predicted"]
    wrong = np.mean([row[1] != row[2] for row in table["data"]])
    assert len(table["data"]) == len(digits.test) and record["error"] == pytest.approx(wrong)
    assert result.stdout.count("wandb sync") == 1


def test_results_of_other_settings_are_kept(stage_two_checkpoint, tmp_path):
    words = [*SMALL, "--mode=test", "--exp_name=t", f"--output_dir={tmp_path}", "--limit_test=2"]
    words += ["--iters=4", f"--load_checkpoint_dir={stage_two_checkpoint}"]
    folder, path = tmp_path / "t", tmp_path / "t" / "test_supervised.json"
    run_words(*words)
    first = path.read_bytes()
    record = json.loads(first)
    assert record["git"] == git_state()
    assert record["settings"].items() >= dict(iters=4, seed=42, limit_test=2).items()
    run_words(*words, "--num_workers=0", "--iters=None")  # says the same
    assert json.loads(path.read_bytes()) == record and not (folder / "earlier").exists()

    said = run_words(*words, "--iters=2", "--limit_test=2.0")
    (aside,) = (folder / "earlier").iterdir()
    assert f"Earlier results (of --iters=4) were moved to {aside}." in said
    assert (aside / path.name).read_bytes() == first
    assert {each.name for each in aside.iterdir()} == {
        each.name for each in folder.glob("[cpt]*_supervised.*")
    }
    assert json.loads(path.read_bytes())["settings"]["iters"] == 2

    other = shutil.copy(stage_two_checkpoint, tmp_path / "other.ckpt")
    content = torch.load(other, weights_only=True)
    content["state_dict"]["model.wl"] += 1
    torch.save(content, other)
    said = run_words(*words, "--iters=2", f"--load_checkpoint_dir={other}")
    assert f"Earlier results (of other weights, {stage_two_checkpoint}) were moved to" in said
    path.write_text("{}")
    said = run_words(*words, "--iters=2", f"--load_checkpoint_dir={other}")
    assert "Earlier results (of other weights, not known which) were moved to" in said
    assert len(list((folder / "earlier").iterdir())) == 3


def test_features_of_another_network_are_kept(stage_one_checkpoint, stage_two_checkpoint, tmp_path):
    folder = tmp_path / "f"
    words = [*SMALL, "--mode=freeze", "--exp_name=f", f"--output_dir={tmp_path}"]
    run_words(*words, f"--load_checkpoint_dir={stage_one_checkpoint}")
    names = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del names[".freeze.lock"]
    assert len(names) == 14
    said = run_words(*words, f"--load_checkpoint_dir={stage_two_checkpoint}")
    assert f"Earlier results (of other weights, {stage_one_checkpoint}) were moved to" in said
    (aside,) = (folder / "earlier").iterdir()
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == names
    assert names.keys() <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "embedding.json").read_text())["settings"]["seed"] == 42


def test_published_checkpoint_works_like_our_own(stage_two_checkpoint, tmp_path):
    # The flags of the checkpoint are left to its shapes; 16 = 4 times the grid of 4.
    model = load_checkpoint(stage_two_checkpoint)
    path = save_published(tmp_path / "published.ckpt", model.state_dict())
    flags = "--mode=test", "--supervise", "--exp_name=tested"
    for checkpoint in (stage_two_checkpoint, path):
        folder = tmp_path / checkpoint.stem
        small_run(folder, *flags, "--limit_test=4", f"--load_checkpoint_dir={checkpoint}")
    records = [
        json.loads((tmp_path / stem / "tested" / "test_supervised.json").read_text())
        for stem in (stage_two_checkpoint.stem, "published")
    ]
    assert records[0] | {"checkpoint": str(path)} == records[1]


def test_stage_two_from_a_published_checkpoint(stage_one_checkpoint, tmp_path):
    # With the published code the classifier was trained on one by --resume_training.
    path = save_published(tmp_path / "p.ckpt", load_checkpoint(stage_one_checkpoint).state_dict())
    small_run(
        tmp_path,
        "--exp_name=p",
        "--max_epochs=1",
        "--limit_train=2",
        "--resume_training",
        "--supervise",
        f"--load_checkpoint_dir={path}",
    )
    assert (tmp_path / "p" / "checkpoints" / "supervised_best.ckpt").is_file()
