import dataclasses

import pytest
import pytorch_lightning as pl
import torch
from conftest import SMALL_SETTINGS

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.optim import OneCycle
from agglomerator.training.trainer import build_trainer


@pytest.fixture
def module():
    settings = Settings(**SMALL_SETTINGS, dropout=0.0)
    data = ImageDataModule(settings)
    data.setup()
    torch.manual_seed(0)
    module = LitAgglomerator(Agglomerator(**dataclasses.asdict(settings)), settings, data)
    module.trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    return module


def loss_of(module, epoch):
    module.trainer.fit_loop.epoch_progress.current.completed = epoch
    assert module.current_epoch == epoch
    batch = module.data.train[list(range(32))]
    with torch.no_grad():
        return module._evaluate(batch, 0)[0].item()


def test_validation_draws_the_same_views_in_every_epoch(module):
    module.eval()
    assert loss_of(module, 0) == loss_of(module, 3)


def test_training_draws_others(module):
    assert loss_of(module, 0) != loss_of(module, 3)


def test_a_class_without_images_is_never_the_nearest(module):
    means = module.metrics.class_means
    means.update(-torch.eye(32)[:9], torch.arange(9))
    logits = module.logits(torch.eye(32)[:9])
    assert logits[:, :9].max() <= 0 and not logits.argmax(1).eq(9).any()


def test_the_classifier_computes_in_float32(module):
    module.by_class_means = False
    embedding = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    expected = module.model.classification_head_from_contr(embedding)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.logits(embedding), expected)
    module.bfloat16()
    assert module.logits(embedding.bfloat16()).dtype == torch.bfloat16


def test_prototypes_of_other_classes_have_no_part_in_the_loss():
    settings = Settings(**SMALL_SETTINGS, prototypes=True)
    data = ImageDataModule(settings)
    data.setup()
    model = Agglomerator(**dataclasses.asdict(settings.replace(n_classes=4))).eval()
    images, labels = data.train[list(range(32))]
    losses = []
    for own in (True, False):
        contrast = LitAgglomerator(model, settings, data, own).contrast
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses.append(contrast(images, labels.clamp(max=3), generator)[0])
    assert losses[0] > losses[1]
    generator = torch.Generator().manual_seed(0)
    assert contrast(images, labels, generator)[0].isfinite()  # more classes than prototypes


@pytest.mark.parametrize("steps", [50, 200, 100])
def test_the_schedule_of_a_resumed_training_ends_with_it(steps):
    """It stopped after 30 of 100 steps, and goes on on another number of processes."""

    def schedule(total):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return OneCycle(optimizer, max_lr=1.0, total_steps=total)

    whole, before, after = schedule(steps), schedule(100), schedule(steps)
    for one, number in ((whole, 0.3 * steps), (before, 30)):
        for _ in range(round(number)):
            one.step()
    after.load_state_dict(before.state_dict())
    for _ in range(round(0.7 * steps) - 1):
        whole.step()
        after.step()
        assert after.get_last_lr() == pytest.approx(whole.get_last_lr())
    assert after.get_last_lr()[0] < 1e-4


def test_the_last_step_of_an_epoch_takes_the_mean_gradient_too(tmp_path):
    found = {}
    for accumulate in 1, 2:
        settings = Settings(
            dataset="digits", image_size=16, conv_image_size=4, n_channels=1, patch_dim=8,
            contr_dim=8, dropout=0, batch_size=32, learning_rate=0, weight_decay=0, max_epochs=1,
            lr_speed=1, limit_train=3, limit_val=1, logger="none", output_dir=str(tmp_path),
            accumulate=accumulate, accelerator="cpu",
        )  # fmt: skip
        data = ImageDataModule(settings)
        torch.manual_seed(0)
        module = LitAgglomerator(Agglomerator(**dataclasses.asdict(settings)), settings, data)
        gradients = found[accumulate] = []

        class Gradients(pl.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer, kept=gradients):
                grads = (p.grad for p in module.parameters() if p.grad is not None)
                kept.append(torch.cat([grad.flatten() for grad in grads]))

        build_trainer(settings, True, [Gradients()]).fit(module, datamodule=data)
    one, two, three = found[1]
    torch.testing.assert_close(found[2][0], (one + two) / 2)
    torch.testing.assert_close(found[2][1], three)
