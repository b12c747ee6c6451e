import csv
import json
import shutil
from datetime import datetime

import numpy as np
import pytest
from conftest import run_main, small_run

from agglomerator.runs.metrics_file import MetricsWriter
from agglomerator.runs.table import over_seeds, runs_of


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Two runs of both stages that differ in their seed, and one of stage one with another rate."""
    folder = tmp_path_factory.mktemp("runs")
    few = "--max_epochs=2", "--limit_train=4", "--limit_val=1", "--limit_test=2"
    for seed in (1, 2):
        small_run(folder, "--mode=all", f"--seed={seed}", f"--exp_name=a/seed{seed}", *few)
    small_run(folder, "--seed=1", "--exp_name=fast", "--learning_rate=0.01", *few)
    return folder


def test_runs_side_by_side(output):
    said = run_main("--mode=runs", f"--output_dir={output}").stdout
    rows = {(row["run"], row["stage"]): row for row in read(output / "runs.csv")}
    assert list(rows) == [
        ("a/seed1", "contrastive"),
        ("a/seed1", "supervised"),
        ("a/seed2", "contrastive"),
        ("a/seed2", "supervised"),
        ("fast", "contrastive"),
    ]
    assert "Means over seeds" in said and "a/seed2" in said
    differing = {"learning_rate"}
    for (run, stage), row in rows.items():
        prefix = {"contrastive": "", "supervised": "supervised_"}[stage]
        (part,) = json.loads((output / run / f"{prefix}run.json").read_text())
        spent = datetime.fromisoformat(part["ended"]) - datetime.fromisoformat(part["started"])
        assert float(row["minutes"]) == pytest.approx(spent.total_seconds() / 60, abs=0.01)
        assert row["dataset"] == "digits" and row["seed"] == str(part["seed"])
        assert row["outcome"] == "finished" and row["epochs"] == "2"
        assert {name: row[name] for name in differing} == {"learning_rate": f"{rate(run)}"}
        epochs = read(output / run / "logs" / stage / "metrics.csv")
        best = max(float(epoch["val_acc"]) for epoch in epochs if epoch["val_acc"])
        assert float(row["val_acc"]) == best
        if stage == "supervised":
            test = json.loads((output / run / "test_supervised.json").read_text())
            assert float(row["test_error"]) == test["error"] and row["test_images"] == "64"
        else:
            assert row["test_error"] == ""

    means = read(output / "runs_over_seeds.csv")
    assert [(row["stage"], row["learning_rate"], row["seeds"]) for row in means] == [
        ("contrastive", "0.005", "1 2"),
        ("supervised", "0.005", "1 2"),
        ("contrastive", "0.01", "1"),
    ]
    errors = [float(rows[f"a/seed{seed}", "supervised"]["test_error"]) for seed in (1, 2)]
    assert float(means[1]["test_error"]) == pytest.approx(np.mean(errors))
    assert float(means[1]["test_error_std"]) == pytest.approx(np.std(errors, ddof=1))
    assert means[2]["n"] == "1" and means[2]["val_acc_std"] == ""


def test_a_test_of_another_kind_is_not_taken_for_that_of_the_training(output, tmp_path):
    folder = shutil.copytree(output, tmp_path / "copy")
    best = folder / "a" / "seed2" / "checkpoints" / "supervised_best.ckpt"
    flags = (
        "--mode=test",
        f"--load_checkpoint_dir={best}",
        f"--output_dir={folder}",
    )
    flags += "--exp_name=a/seed2", "--limit_test=2", "--logger=none", "--batch_size=32"
    run_main(*flags, "--test_time_flip", "--iters=6")
    rows, differing = runs_of(folder)
    told = {row["run"]: row.get("tested_with") for row in rows if row["stage"] == "supervised"}
    assert told == {"a/seed1": None, "a/seed2": "--iters=6 --test_time_flip=True"}
    assert [row["seeds"] for row in over_seeds(rows, differing)][1:3] == ["1", "2"]
    last = f"--load_checkpoint_dir={best.with_name('supervised_last.ckpt')}"
    run_main(*flags[:1], last, *flags[2:], "--precision=bf16-true")
    told = [row.get("tested_with") for row in runs_of(folder)[0] if row["run"] == "a/seed2"]
    assert told == [None, "supervised_last.ckpt --precision=bf16-true"]
    path = folder / "a" / "seed2" / "test_supervised.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "MNIST"}))
    rows, _ = runs_of(folder)
    mine = [row for row in rows if (row["run"], row["stage"]) == ("a/seed2", "supervised")]
    assert [(row["dataset"], "test_error" in row) for row in mine] == [
        ("digits", False), ("MNIST", True),
    ]  # fmt: skip


@pytest.mark.parametrize("monitor, val_loss", [("val_acc", 0.2), ("val_loss", 0.1)])
def test_validation_is_that_of_the_best_checkpoint(tmp_path, monitor, val_loss):
    place = tmp_path / "run"
    (place / "logs" / "contrastive").mkdir(parents=True)
    (place / "run.json").write_text(json.dumps([{"flags": {"monitor": monitor}}]))
    lines = "train_loss_epoch,val_acc,val_loss", "1,0.9,0.5", "1,0.9,0.2", "1,0.8,0.1"
    (place / "logs" / "contrastive" / "metrics.csv").write_text("\n".join(lines) + "\n")
    ((row,), _) = runs_of(tmp_path)
    assert row["val_loss"] == val_loss


def write_part(place, name, started, **flags):
    part = {"flags": {"dataset": "digits", **flags}, "started": started, "outcome": "finished"}
    (place / name).write_text(json.dumps([part]))


@pytest.mark.parametrize("test", [{"islands": None}, {"settings": None}, []])
def test_files_that_are_damaged_are_named_and_left_out(tmp_path, capfd, test):
    (tmp_path / "run" / "logs" / "contrastive").mkdir(parents=True)
    write_part(tmp_path / "run", "run.json", "2026-01-01T10:00:00")
    paths = [
        tmp_path / "run" / name
        for name in ("test_contrastive.json", "logs/contrastive/metrics.csv")
    ]
    paths[0].write_text(json.dumps(test))
    paths[1].write_bytes(bytes(range(256)))
    ((row,), _) = runs_of(tmp_path)
    assert row["run"] == "run" and "epochs" not in row and "test_error" not in row
    said = capfd.readouterr().out
    assert all(f"{path}: cannot be read; left out.\n" in said for path in paths)


def test_folders_of_runs_may_be_links(tmp_path):
    places = tmp_path / "disk" / "a", tmp_path / "output" / "b"
    for place in places:
        place.mkdir(parents=True)
        write_part(place, "run.json", "2026-01-01T10:00:00")
    (tmp_path / "output" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "output" / "b" / "back").symlink_to(tmp_path / "output")
    rows, _ = runs_of(tmp_path / "output")
    assert [row["run"] for row in rows] == ["b", "linked/a"]


def test_a_later_stage_one_has_not_led_to_an_earlier_stage_two(tmp_path):
    for run, one in (("a", "2026-01-01T10:00:00"), ("b", "2026-01-03T10:00:00")):
        (tmp_path / run).mkdir()
        write_part(tmp_path / run, "run.json", one, patch_dim={"a": 64, "b": 256}[run])
        write_part(tmp_path / run, "supervised_run.json", "2026-01-02T10:00:00")
    rows, differing = runs_of(tmp_path)
    assert differing == ["patch_dim"]
    found = {(row["run"], row["stage"]): row.get("patch_dim") for row in rows}
    assert found["a", "supervised"] == 64 and found["b", "supervised"] is None
    assert found["b", "contrastive"] == 256


def test_the_test_of_another_run_of_the_same_name_is_not_the_runs_own(tmp_path):
    places = [tmp_path / run / "CIFAR10" for run in "ab"]
    for place, seed in zip(places, (1, 2), strict=True):
        place.mkdir(parents=True)
        write_part(place, "supervised_run.json", "2026-01-01T10:00:00", seed=seed)
    test = {"dataset": "digits", "error": 0.5, "settings": {"limit_test": 0.5}}
    for of, errors in (("b", [None, 0.5]), ("a", [0.5])):
        test["checkpoint"] = f"output/{of}/CIFAR10/checkpoints/supervised_best.ckpt"
        (places[0] / "test_supervised.json").write_text(json.dumps(test))
        rows, _ = runs_of(tmp_path)
        mine = [row for row in rows if row["run"] == "a/CIFAR10"]
        assert [row.get("test_error") for row in mine] == errors
        assert mine[-1]["tested_with"] == "--limit_test=0.5"


def rate(run):
    return 0.01 if run == "fast" else 0.005


def test_a_row_for_every_epoch(output):
    for stage in ("contrastive", "supervised"):
        rows = read(output / "a" / "seed1" / "logs" / stage / "metrics.csv")
        of_epochs = [row for row in rows if row["train_loss_epoch"]]
        assert [row["epoch"] for row in of_epochs] == ["0", "1"]
        for row in rows:
            figures = row["train_loss_epoch"], row["val_loss"], row["val_acc"], row["wl"]
            assert all(figures) or not any(figures)


def test_rows_of_one_moment_become_one_and_others_stay(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    for metrics, step in (
        ({"epoch": 0, "a": 1.0}, 9), ({"epoch": 0, "v": 2.0}, 11), ({"epoch": 0, "t": 3.0}, 11),
        ({"epoch": 1, "a": 4.0}, 11), ({"epoch": 1, "a": 5.0}, 11), ({"epoch": 1, "ü": 6.0}, 11),
        ({"epoch": 1, "t": 7.0}, 11), ({"epoch": 2, "a": 8.0}, 12),
    ):  # fmt: skip
        writer.log_metrics(metrics, step)
        writer.save()
    found = [
        {name: value for name, value in row.items() if value}
        for row in read(tmp_path / "metrics.csv")
    ]
    assert found == [
        {"epoch": "0", "step": "9", "a": "1.0"},
        {"epoch": "0", "step": "11", "v": "2.0", "t": "3.0"},
        {"epoch": "1", "step": "11", "a": "4.0"},
        {"epoch": "1", "step": "11", "a": "5.0", "ü": "6.0", "t": "7.0"},
        {"epoch": "2", "step": "12", "a": "8.0"},
    ]


def test_what_is_broken_or_strange_is_told_and_left_out(tmp_path, capsys):
    place = tmp_path / "one"
    place.mkdir()
    (place / "run.json").write_text("{")
    (place / "test_supervised.json").write_text(
        json.dumps({"dataset": "digits", "checkpoint": "pretrained:X", "error": 0.1, "images": 9})
    )
    rows, differing = runs_of(tmp_path)
    assert f"{place / 'run.json'}: cannot be read; left out." in capsys.readouterr().out
    assert [(row["run"], row["from"], row["test_error"]) for row in rows] == [
        ("one", "pretrained:X", 0.1)
    ]
    assert over_seeds(rows, differing) == []
    said = run_main("--mode=runs", f"--output_dir={tmp_path / 'none'}", ok=False).stderr
    assert said.startswith(f"error: --output_dir={tmp_path / 'none'}: there is no run in it")


def part(seed, **flags):
    when = {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T10:30:00+00:00"}
    flags = {"dataset": "digits", "seed": seed, "load_checkpoint_dir": None} | flags
    return when | {"outcome": "finished", "flags": flags}


def test_runs_whose_first_stages_differ_are_not_taken_together(tmp_path):
    """Stage two of both has the same settings, but not the network that it begins from."""
    for seed, levels in ((1, 0.1), (2, 0.1), (3, 0.2)):
        place = tmp_path / str(seed)
        place.mkdir()
        (place / "run.json").write_text(json.dumps([part(seed, temperature=levels)]))
        two = [part(seed, learning_rate=0.3), part(seed, learning_rate=0.3)]
        two[0]["outcome"] = "stopped by SIGTERM"
        (place / "supervised_run.json").write_text(json.dumps(two))
    killed = tmp_path / "4"
    killed.mkdir()
    (killed / "run.json").write_text(json.dumps([part(4) | {"ended": None, "outcome": None}]))
    rows, differing = runs_of(tmp_path)
    assert differing == ["temperature"]
    assert [row["minutes"] for row in rows] == [30, 60, 30, 60, 30, 60, None]
    assert rows[-1]["outcome"].startswith("no end")
    seeds = {
        (row["stage"], row["temperature"]): row["seeds"] for row in over_seeds(rows, differing)
    }
    assert seeds == {
        ("contrastive", 0.1): "1 2",
        ("supervised", 0.1): "1 2",
        ("contrastive", 0.2): "3",
        ("supervised", 0.2): "3",
    }


@pytest.fixture
def table(tmp_path):
    """Write runs, of flags and of checkpoints that they began from; returns the rows of a stage."""

    def rows(runs, stage="contrastive", tested=None):
        prefix = {"contrastive": "", "finetuned": "finetuned_"}[stage]
        for name, flags in runs.items():
            place = tmp_path / name
            place.mkdir()
            part = {"flags": {"dataset": "ImageFolder"} | flags, "outcome": "finished"}
            (place / f"{prefix}run.json").write_text(json.dumps([part]))
            if tested is not None:
                checkpoint = f"{place}/checkpoints/best.ckpt"
                test = {"checkpoint": checkpoint, "settings": tested, "dataset": "ImageFolder"}
                (place / f"test_{stage}.json").write_text(json.dumps(test | {"error": 0.5}))
        return runs_of(tmp_path)

    return rows


@pytest.mark.parametrize(
    "one, other",
    [
        (dict(data_dir="a"), dict(data_dir="b")),
        (dict(num_gpus=1), dict(num_gpus=4)),
        (dict(load_checkpoint_dir="x/checkpoints/last.ckpt"), {}),
    ],
    ids=["data", "processes", "teacher"],
)
def test_runs_that_differ_in_more_than_their_seed_are_no_mean(table, one, other):
    means = over_seeds(*table({"one": one | dict(seed=1), "other": other | dict(seed=2)}))
    assert [row["n"] for row in means] == [1, 1]


def test_where_a_known_data_set_lies_does_not_matter(table):
    found = {seed: dict(dataset="MNIST", data_dir=seed, seed=seed) for seed in ("1", "2")}
    (row,) = over_seeds(*table(found))
    assert row["n"] == 2


def test_stage_two_after_its_own_masked_pretraining_is_averaged(table):
    def start(name):
        return dict(load_checkpoint_dir=f"out/{name}/checkpoints/masked_best.ckpt", seed=name)

    (row,) = over_seeds(*table({name: start(name) for name in "ab"}, "finetuned"))
    assert row["n"] == 2


def test_a_test_on_other_images_is_told(table):
    rows, _ = table({"run": dict(data_dir="a")}, tested=dict(data_dir="b", objects=2))
    assert rows[0]["tested_with"] == "--data_dir=b --objects=2"
