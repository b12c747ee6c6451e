import csv
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main, run_program, small_run

SHORT = "--exp_name=logged", "--max_epochs=1", "--limit_train=10", "--limit_val=2"


def write_idx(path, array):
    """A file in the IDX format of MNIST and FashionMNIST."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    path.write_bytes(header + array.tobytes())


def check_metrics(folder):
    with (folder / "logs" / "contrastive" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss_epoch", "val_loss", "val_acc", "wl", "wBU", "wTD", "wA"):
        assert any(row[name] for row in rows), name
    assert any(row["learning_rate"] for row in rows)
    assert not (folder / "earlier").exists()


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    """A small made-up FashionMNIST in the layout that torchvision expects."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, n in (("train", 100), ("t10k", 30)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return root


def test_tensorboard_with_mixed_precision(tmp_path):
    small_run(tmp_path, *SHORT, "--logger=tensorboard", "--precision=bf16-mixed")
    assert list((tmp_path / "logged" / "logs").rglob("events.out.tfevents.*"))
    check_metrics(tmp_path / "logged")


def test_csv(tmp_path):
    small_run(tmp_path, *SHORT, "--logger=csv")
    check_metrics(tmp_path / "logged")


@pytest.mark.slow
def test_fashion_mnist_from_its_config_and_wandb_without_an_account(fashion_mnist, tmp_path):
    flags = (
        "--flagfile=config/config_FashionMNIST.cfg",
        f"--data_dir={fashion_mnist}",
        f"--output_dir={tmp_path}",
        "--exp_name=fashion",
        "--patch_dim=8",
        "--contr_dim=16",
        "--batch_size=8",
        "--max_epochs=1",
        "--logger=wandb",
    )
    quiet = {"WANDB_ERROR_REPORTING": "false"}
    result = run_program(*flags, environment=quiet)
    assert "96 images to train on, 4 to validate" in result.stdout
    assert list((tmp_path / "fashion").rglob("*.wandb"))
    hints = [line for line in result.stdout.splitlines() if "wandb sync" in line]
    assert len(hints) == 1
    assert list(Path(hints[0].split("wandb sync ")[1].strip()).glob("*.wandb"))
    check_metrics(tmp_path / "fashion")

    first = list((tmp_path / "fashion").rglob("*.wandb"))
    result = run_program(*flags, environment=quiet)
    (aside,) = (tmp_path / "fashion" / "earlier").iterdir()
    assert f"An earlier run of this name was moved to {aside}." in result.stdout
    assert [path.name for path in aside.rglob("*.wandb")] == [path.name for path in first]
    assert list((tmp_path / "fashion" / "logs").rglob("*.wandb"))


def test_data_file_that_is_cut_short(fashion_mnist, tmp_path):
    shutil.copytree(fashion_mnist, tmp_path / "data")
    path = tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    result = run_main(
        "--flagfile=config/config_FashionMNIST.cfg",
        f"--data_dir={tmp_path / 'data'}",
        f"--output_dir={tmp_path / 'output'}",
        "--patch_dim=8",
        "--logger=none",
        ok=False,
    )
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(path) in result.stderr
