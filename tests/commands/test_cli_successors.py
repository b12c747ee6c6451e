"""What was added to the published network and its losses, as a user runs it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, run_main, same_weights, small_run, weights
from PIL import Image
from sklearn.datasets import load_digits

from agglomerator import load_checkpoint

FEW = "--limit_train=3", "--limit_val=2", "--limit_test=2", "--iters=2"
MASKED = "--pretraining=masked", "--level_cosine=0.1"
OPTIONS = {
    "masked": (MASKED, "masked", dict(pretraining="masked", head="mean")),
    "agreement": (
        ("--consensus=agreement", "--head=dissimilarity"), "contrastive",
        dict(consensus="agreement", head="dissimilarity"),
    ),
    "agreement, repelled": (
        ("--consensus=agreement_repel", "--head=mean"), "contrastive",
        dict(consensus="agreement_repel", head="mean"),
    ),
    "prototypes": (("--prototypes",), "contrastive", dict(prototypes=True)),
}  # fmt: skip


def checkpoint_of(folder, stage, name="last"):
    prefix = "" if stage == "contrastive" else f"{stage}_"
    return folder / "run" / "checkpoints" / f"{prefix}{name}.ckpt"


@pytest.mark.parametrize("flags, stage, settings", OPTIONS.values(), ids=OPTIONS)
def test_option_learns_goes_on_as_if_never_stopped_and_needs_no_flags_later(
    tmp_path, flags, stage, settings
):
    flags = "--exp_name=run", "--lr_speed=2", *FEW, *flags
    small_run(tmp_path / "whole", *flags, "--max_epochs=2")
    small_run(tmp_path / "parts", *flags, "--max_epochs=1")
    before = weights(checkpoint_of(tmp_path / "parts", stage))
    small_run(tmp_path / "parts", *flags, "--max_epochs=2", "--resume_training")
    path, parts = (checkpoint_of(tmp_path / name, stage) for name in ("whole", "parts"))
    assert same_weights(path, parts)
    assert rows(tmp_path / "whole" / "run", stage) == rows(tmp_path / "parts" / "run", stage)
    after = weights(path)
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    idle = {"classification_head_from_contr"}
    idle |= {"contrastive_head"} if stage == "masked" else set()
    still = {"attention", "agreement_attention"}  # they have no weights
    assert moved == {name.split(".")[1] for name in after} - idle - still

    model = load_checkpoint(path)
    assert {name: getattr(model.settings, name) for name in settings} == settings
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    common = dict(iters=2, image_size=16, conv_image_size=4)
    plain = load_checkpoint(tmp_path / "plain.pt", **common)
    images = torch.randn(3, 1, 16, 16).clamp(-1, 1)
    assert torch.equal(plain(images), model(images))

    run_main("--mode=test", f"--load_checkpoint_dir={path}", f"--output_dir={tmp_path / 'test'}",
             "--limit_test=1", "--limit_train=1", "--accelerator=cpu", "--logger=none")  # fmt: skip
    record = json.loads((tmp_path / "test" / "digits" / f"test_{stage}.json").read_text())
    assert all(0 <= row["total_variation"] <= 2 for row in record["islands"]["rows"])
    assert {name: record["settings"][name] for name in settings} == settings
    assert np.isfinite(record["loss"]) and 0 <= record["top1"] <= 1


@pytest.mark.slow
def test_masked_network_learns_classes_in_stage_two(tmp_path):
    flags = *MASKED, "--exp_name=run", *FEW, "--max_epochs=1"
    said = small_run(tmp_path, *flags, "--mode=all", "--finetune", "--plot_islands").stdout
    assert "Stage one: masked pre-training" in said and "by classifier" in said
    one, two = (weights(checkpoint_of(tmp_path, stage)) for stage in ("masked", "finetuned"))
    still = {name for name in one if torch.equal(one[name], two[name])}
    assert {"model.masked.patch", "model.masked.to_pixels.weight"} <= still
    assert not still & {"model.init_levels", "model.bottom_up.net.2.weight"}
    for name in "masked_reconstructions", "masked", "finetuned_test":
        with Image.open(tmp_path / "run" / "islands" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10

    path = checkpoint_of(tmp_path, "masked")
    small_run(tmp_path, "--supervise", "--exp_name=run", *FEW, "--max_epochs=1",
              f"--load_checkpoint_dir={path}")  # fmt: skip
    frozen = weights(checkpoint_of(tmp_path, "supervised"))
    moved = {name for name in one if not torch.equal(one[name], frozen[name])}
    assert {name.split(".")[1] for name in moved} == {"classification_head_from_contr"}


@pytest.fixture
def unlabelled(tmp_path):
    """40 digits as images in train/, in no folders of classes, and nothing else."""
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((digit * 15).astype(np.uint8)).resize((16, 16)).save(
            folder / "train" / f"{i}.png"
        )
    return folder


def test_images_without_classes(tmp_path, unlabelled):
    flags = [*SMALL, "--dataset=ImageFolder", f"--data_dir={unlabelled}", "--exp_name=run"]
    flags += [f"--output_dir={tmp_path}", "--batch_size=16", "--iters=2"]
    said = run_main(*flags, *MASKED, "--max_epochs=1", "--plot_islands").stdout
    assert "32 images to train on, 8 to validate" in said and "--mode=freeze" in said
    path = checkpoint_of(tmp_path, "masked", "best")
    assert path.is_file() and (tmp_path / "run/islands/masked_reconstructions.png").is_file()
    of_test = "--mode=test", f"--load_checkpoint_dir={path}"
    refused = run_main(*flags, *of_test, ok=False)
    assert refused.stderr.startswith("error: --data_dir=") and "test/" in refused.stderr
    refused = run_main(*flags, "--mode=explore", f"--load_checkpoint_dir={path}", ok=False,
                       environment={"MPLBACKEND": "webagg"})  # fmt: skip
    assert "test/" in refused.stderr and "--images" in refused.stderr
    said = run_main(*flags, "--mode=freeze", f"--load_checkpoint_dir={path}").stdout
    assert "Without classes" in said
    again = run_main(*flags, "--mode=freeze", f"--load_checkpoint_dir={path}").stdout
    assert "were moved to" not in again
    refused = run_main(*flags, "--supervise", f"--load_checkpoint_dir={path}", ok=False)
    assert "no folders of classes" in refused.stderr and refused.stderr.count("\n") == 1
    refused = run_main(*flags, *MASKED, "--mode=all", ok=False)
    assert "no folders of classes" in refused.stderr and "Stage one" not in refused.stdout

    shutil.copytree(unlabelled / "train", unlabelled / "test" / "deeper")
    said = run_main(*flags, *of_test).stdout
    assert "top-1" not in said and "loss" in said
    record = json.loads((tmp_path / "run" / "test_masked.json").read_text())
    assert record["images"] == 40 and not record.keys() & {"top1", "error", "confusion_matrix"}
    tree = tmp_path / "tree.txt"
    tree.write_text("animals: cat, dog\n")
    run_main(*flags, "--mode=freeze", f"--load_checkpoint_dir={path}", f"--hierarchy={tree}")
    assert np.load(tmp_path / "run" / "features_test.npy").shape == (40, 16)

    # Classes, but no images to test a classifier.
    for name in "ab":
        shutil.copytree(unlabelled / "train", tmp_path / "classes" / "train" / name)
    flags[1 + len(SMALL)] = f"--data_dir={tmp_path / 'classes'}"
    refused = run_main(*flags, *MASKED, "--mode=all", ok=False)
    assert "no test/ folder" in refused.stderr and "Stage one" not in refused.stdout

    # From there to data with classes.
    run_main(*SMALL, "--supervise", "--finetune", f"--load_checkpoint_dir={path}", *FEW,
             "--max_epochs=1", f"--output_dir={tmp_path}", "--exp_name=digits")  # fmt: skip
    assert (tmp_path / "digits" / "checkpoints" / "finetuned_last.ckpt").is_file()
