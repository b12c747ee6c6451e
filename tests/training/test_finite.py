import dataclasses
import re

import pytest
import torch
from conftest import SMALL, run_main, run_program, slow
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.finite import StopUnlessFinite
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.trainer import allow_tf32, build_trainer, quiet_libraries
from agglomerator.util.errors import UserError

SETTINGS = Settings(
    dataset="digits",
    image_size=16,
    conv_image_size=4,
    n_channels=1,
    patch_dim=8,
    contr_dim=8,
    batch_size=32,
    learning_rate=0.002,
    limit_train=14,
    limit_val=1,
    max_epochs=3,
    lr_speed=3,
    accelerator="cpu",
    logger="none",
)


class Poison(Callback):
    """Makes one number of a step not finite: of the loss's gradients, or of the weights."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_after_backward(self, trainer, module):
        if trainer.global_step + 1 == self.step:
            self.before = {name: p.clone() for name, p in module.named_parameters()}
            if self.where == "gradient":
                module.model.bottom_up.net[2].weight.grad[3] = torch.nan
            else:
                trainer.optimizers[0].param_groups[0]["lr"] = 1e38


@pytest.fixture
def module(request):
    quiet_libraries()
    torch.manual_seed(0)
    settings = SETTINGS.replace(optimizer=getattr(request, "param", "adamw"))
    data = ImageDataModule(settings)
    data.setup()
    return LitAgglomerator(Agglomerator(**dataclasses.asdict(settings)), settings, data)


of_both_optimizers = pytest.mark.parametrize("module", ["adamw", "muon"], indirect=True)


def stop(module, folder, poison):
    """Train until it stops: the message, and what the last checkpoint holds."""
    keeper = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    settings = SETTINGS.replace(output_dir=str(folder))
    trainer = build_trainer(settings, True, [poison, keeper])
    with pytest.raises(UserError) as error:
        trainer.fit(module, datamodule=module.data)
    assert str(folder / "last.ckpt") in str(error.value)
    return str(error.value), torch.load(folder / "last.ckpt", weights_only=True)


@of_both_optimizers
def test_step_with_a_gradient_that_is_not_finite_is_not_made(module, tmp_path):
    poison = Poison(step=17, where="gradient")
    message, last = stop(module, tmp_path, poison)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.zeros(1)]), max_lr=0.002, total_steps=3 * 14
    )
    for _ in range(16):
        schedule.step()
    rate = schedule.get_last_lr()[0]
    assert f"step 17 (epoch 2, learning rate {rate:.3g})" in message
    assert last["global_step"] == 14
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, poison.before[name]), name


def test_weights_that_are_not_finite_are_not_kept(module, tmp_path):
    # The last step of an epoch: its gradients are finite, only the weights it leads to are not.
    message, last = stop(module, tmp_path, Poison(step=28, where="weights"))
    assert "step 28 (epoch 2, learning rate 1e+38)" in message
    assert last["global_step"] == 14
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def quiet(folder):
    """What the Trainers that scale the loss have in common."""
    return {
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }


@pytest.mark.slow
@of_both_optimizers
def test_overflow_of_scaled_gradients_is_no_fault(module, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=28,
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
        callbacks=[StopUnlessFinite()],
        **quiet(tmp_path),
    )
    before = {name: p.clone() for name, p in module.named_parameters() if p.requires_grad}
    trainer.fit(module, datamodule=module.data)
    assert scaler.get_scale() < 2.0**40
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_scale_that_comes_to_an_end_is_a_fault(module, tmp_path):
    class AlwaysPoison(Poison):
        def on_after_backward(self, trainer, module):
            module.model.wl.grad.fill_(torch.inf)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=9,
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),
        callbacks=[AlwaysPoison(0, ""), StopUnlessFinite()],
        **quiet(tmp_path),
    )
    with pytest.raises(UserError, match="no longer finite"):
        trainer.fit(module, datamodule=module.data)


@pytest.mark.parametrize(
    "processes, program",
    [(1, run_main), slow(2, run_program)],
    ids=["one process", "two"],
)
def test_program_ends_with_one_line(tmp_path, processes, program):
    flags = "--learning_rate=1e35", "--exp_name=high", f"--devices={processes}"
    result = program(*SMALL, *flags, f"--output_dir={tmp_path}", ok=False)
    assert result.status == 2
    assert re.fullmatch(r"error: step 2 \(epoch 1, learning rate \S+\): .*\n", result.stderr)
    assert not list(tmp_path.rglob("*.ckpt"))


@of_both_optimizers
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", "16-mixed", *map(slow, ("32-true", "tf32", "bf16-true"))]
)
def test_every_precision_learns(module, tmp_path, precision):
    settings = SETTINGS.replace(precision=precision, output_dir=str(tmp_path), limit_train=1.0)
    losses = []

    class Losses(Callback):
        def on_train_epoch_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["train_loss"]))

    build_trainer(settings, True, [Losses()]).fit(module, datamodule=module.data)
    assert len(losses) == 3
    assert losses[2] < 0.95 * losses[0]


def test_precision_in_which_nothing_learns_is_refused(tmp_path):
    with pytest.raises(UserError, match="--precision=16-true"):
        build_trainer(SETTINGS.replace(precision="16-true"), True, [Callback()])


def test_tf32_is_a_choice(capsys):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert allow_tf32("tf32", torch.device("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    for precision, device in ("32-true", "cuda"), ("tf32", "cpu"):
        assert not allow_tf32(precision, torch.device(device))
        assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    build_trainer(SETTINGS.replace(precision="tf32"), True, [Callback()])
    assert "--precision=tf32: this device computes in 32-true." in capsys.readouterr().out
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
