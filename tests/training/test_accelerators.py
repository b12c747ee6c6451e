"""Each command on each accelerator, as a user asks for it: a GPU does what the CPU does."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, rows, run_main, small_run, weights

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])
STEPS = "--max_epochs=1", "--limit_train=2", "--limit_val=1"


@pytest.fixture(params=["cpu", CUDA])
def accelerator(request):
    return request.param


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions of a GPU in all 32 bits, to compare them with the CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on(accelerator):
    """The flag, and the word for the device in what a training says."""
    return f"--accelerator={accelerator}", f"on {accelerator.upper()} x 1;"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_of_stage_one(accelerator, tmp_path, optimizer, precision):
    flag, said = on(accelerator)
    flags = *STEPS, "--exp_name=one", f"--optimizer={optimizer}", f"--precision={precision}"
    assert said in small_run(tmp_path, flag, *flags, "--agreement=1").stdout
    found = weights(tmp_path / "one" / "checkpoints" / "last.ckpt")
    assert all(x.isfinite().all() for x in found.values())
    assert found["model.wl"] != 0.25
    assert any(row["train_loss_epoch"] for row in rows(tmp_path / "one"))


@pytest.mark.parametrize("stage", ["supervise", "finetune"])
def test_steps_of_stage_two(accelerator, tmp_path, stage_one_checkpoint, stage):
    flag, said = on(accelerator)
    start = f"--load_checkpoint_dir={stage_one_checkpoint}"
    result = small_run(tmp_path, flag, *STEPS, "--exp_name=two", f"--{stage}", start)
    assert said in result.stdout
    name = {"supervise": "supervised", "finetune": "finetuned"}[stage]
    before = weights(stage_one_checkpoint)
    after = weights(tmp_path / "two" / "checkpoints" / f"{name}_last.ckpt")
    learned = {n for n in after if not torch.equal(after[n], before[n])}
    classifier = {n for n in after if "classification_head" in n}
    assert learned == (classifier if stage == "supervise" else set(after))
    assert all(x.isfinite().all() for x in after.values())


def test_a_training_goes_on(accelerator, tmp_path):
    flag, said = on(accelerator)
    flags = flag, "--exp_name=on", "--lr_speed=3", "--limit_train=4", "--limit_val=2"
    small_run(tmp_path / "whole", *flags, "--max_epochs=3")
    small_run(tmp_path, *flags, "--max_epochs=2")
    assert said in small_run(tmp_path, *flags, "--max_epochs=3", "--resume_training").stdout
    path = tmp_path / "on" / "checkpoints" / "last.ckpt"
    last = torch.load(path, map_location="cpu", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (2, 12)
    names = "train_loss_epoch", "val_loss", "learning_rate"
    found, expected = (
        [float(row[name]) for row in rows(folder / "on") for name in names if row[name]]
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert len(found) == len(expected)
    if accelerator == "cpu":
        assert found == expected
    else:  # sums of a GPU come in any order, and AdamW makes whole steps of what rounding leaves
        np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.fixture(scope="module")
def frozen_on_cpu(stage_one_checkpoint, tmp_path_factory):
    return freeze(tmp_path_factory.mktemp("frozen"), "cpu", stage_one_checkpoint)


def freeze(folder, accelerator, checkpoint):
    flags = "--mode=freeze", "--exp_name=f", f"--load_checkpoint_dir={checkpoint}"
    small_run(folder, on(accelerator)[0], *flags)
    return np.load(folder / "f" / "features_test.npy")


def test_freeze_finds_the_embedding_of_the_cpu(
    accelerator, frozen_on_cpu, stage_one_checkpoint, tmp_path
):
    found = freeze(tmp_path, accelerator, stage_one_checkpoint)
    np.testing.assert_allclose(found, frozen_on_cpu, atol=1e-4)


def test_test_and_islands_find_the_figures_of_the_cpu(accelerator, stage_one_checkpoint, tmp_path):
    load = f"--load_checkpoint_dir={stage_one_checkpoint}"
    records = []
    for device in ("cpu", accelerator):
        flags = on(device)[0], "--mode=test", f"--exp_name={device}", "--plot_islands", load
        small_run(tmp_path, *flags)
        records.append(json.loads((tmp_path / device / "test_contrastive.json").read_text()))
    expected, found = records
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["top1"] == pytest.approx(expected["top1"], abs=0.01)
    for row, other in zip(found["islands"]["rows"], expected["islands"]["rows"], strict=True):
        assert row["cosine"] == pytest.approx(other["cosine"], abs=1e-3)
        assert row["number"] == pytest.approx(other["number"], rel=0.01)

    small_run(tmp_path, on(accelerator)[0], "--mode=islands", "--exp_name=drawn", load)
    assert (tmp_path / "drawn" / "islands" / "test.png").is_file()


def test_a_learning_rate_too_high_is_told(accelerator, tmp_path):
    flags = *SMALL, on(accelerator)[0], "--learning_rate=1e35", f"--output_dir={tmp_path}"
    assert run_main(*flags, ok=False).stderr.startswith("error: step 2 (epoch 1, ")


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("stage", [{}, {"supervise": True}, {"finetune": True}, {"agreement": 1.0}])
def test_a_step_on_a_gpu_waits_for_nothing(stage):
    settings = Settings(
        dataset="digits", image_size=16, conv_image_size=4, patch_dim=16, contr_dim=8,
        n_channels=1, **stage,
    )  # fmt: skip
    data = ImageDataModule(settings)
    model = Agglomerator(**dataclasses.asdict(settings))
    module = LitAgglomerator(model, settings, data).cuda()
    images = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8, device="cuda")
    batch = images, torch.arange(6, device="cuda")
    module.training_step(batch, 0).backward()  # what is made once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(batch, 1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
