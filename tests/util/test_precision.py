"""Helpers of a step compute the same in every precision that training is offered in."""

import contextlib
import json

import pytest
import torch
from conftest import SMALL_SETTINGS, run_here
from pytorch_lightning.plugins import DoublePrecision, HalfPrecision, MixedPrecision

from agglomerator import load_checkpoint
from agglomerator.config import Settings
from agglomerator.data import augment, transforms
from agglomerator.data.module import ImageDataModule
from agglomerator.training.metrics import RunMetrics

PRECISIONS = {
    "32-true": contextlib.nullcontext,
    "16-mixed": lambda: torch.autocast("cpu", torch.float16),
    "bf16-mixed": MixedPrecision("bf16-mixed", "cpu").train_step_context,
    "bf16-true": HalfPrecision("bf16-true").train_step_context,
    "64-true": DoublePrecision().train_step_context,
}
FUNCTIONS = {
    "rand_augment": augment.rand_augment,
    "random_crop": lambda images, draw: augment.random_crop(images, 30, draw, padding=4),
    "random_horizontal_flip": augment.random_horizontal_flip,
    "random_erasing": augment.random_erasing,
    "normalize": lambda images, draw: transforms.normalize(images, (0.1, 0.5, 0.9), 0.3),
}


def forget():
    augment._pixel_map.cache_clear()
    augment.operation_values.cache_clear()


@pytest.mark.parametrize("first", ["plain", "in the step"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_augmentation(precision, name, first):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 3, 37, 37), dtype=torch.uint8, generator=draw)

    def run(context):
        with context():
            return FUNCTIONS[name](images, torch.Generator().manual_seed(1))

    contexts = [contextlib.nullcontext, PRECISIONS[precision]]
    forget()
    one, other = map(run, contexts if first == "plain" else contexts[::-1])
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


def test_a_warp_of_more_pixels_than_float32_counts():
    side = 4100  # 4100 * 4100 > 2^24
    image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    image[..., -64:, :] = torch.arange(side).remainder(251).to(torch.uint8)
    operation = torch.tensor([augment.OPERATIONS.index("TranslateX")])
    moved = augment.apply_operations(image, operation, torch.tensor([0]), magnitude=3)
    shift = int(augment.operation_values(3, side, side)["TranslateX"])
    assert shift > 0
    assert torch.equal(moved[..., shift:], image[..., :-shift])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_of_a_converted_network(dtype):
    metrics = RunMetrics(n_classes=3, width=4, levels=2).to(dtype)
    losses = torch.linspace(1.9, 2.1, 1000)
    for loss in losses:
        metrics.train_loss(loss)
    assert metrics.train_loss.compute().item() == pytest.approx(2.0, abs=1e-5)

    draw = torch.Generator().manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(3000, 4, generator=draw) + 1, dim=1)
    labels = torch.arange(3).repeat(1000)
    for some, of_some in zip(embedding.split(100), labels.split(100), strict=True):
        metrics.class_means.update(some, of_some)
    expected = torch.stack([embedding[labels == c].mean(0) for c in range(3)])
    expected = torch.nn.functional.normalize(expected, dim=1)
    torch.testing.assert_close(metrics.class_means.compute(), expected, atol=1e-5, rtol=0)

    states = torch.randn(500, 16, 2, 8, generator=draw)
    plain = RunMetrics(n_classes=3, width=4, levels=2)
    for each in (metrics, plain):
        for some in states.split(50):
            each.islands.update_states(some, 0.3)
    assert metrics.islands.compute() == plain.islands.compute()


def test_the_loss_of_a_test_is_the_mean_over_its_images(stage_two_checkpoint, tmp_path):
    run_here(
        mode="test",
        load_checkpoint_dir=str(stage_two_checkpoint),
        precision="bf16-true",
        output_dir=str(tmp_path),
        exp_name="b",
        batch_size=8,
    )
    record = json.loads((tmp_path / "b" / "test_supervised.json").read_text())
    data = ImageDataModule(Settings(**SMALL_SETTINGS))
    data.setup()
    images, labels = data.test[list(range(len(data.test)))]
    model = load_checkpoint(stage_two_checkpoint).bfloat16()
    with torch.no_grad():
        logits = torch.cat([model.classify(some) for some in data.view(images).split(8)])
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert record["loss"] == pytest.approx(loss, rel=1e-3)
