"""All that happens in a step happens on the device of the batch, and nothing waits for it.

PyTorch's meta device takes the place of an accelerator: it has shapes, but no numbers, so that
whatever reads one ends in an error.
"""

import contextlib
import dataclasses
import sys
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from operations import Operations
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loops import evaluation_loop, fit_loop
from pytorch_lightning.strategies import SingleDeviceStrategy
from steps import Trained
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator
from agglomerator.training.optim import Muon
from agglomerator.training.trainer import Pace

COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
SETTINGS = Settings(
    dataset="digits", image_size=16, conv_image_size=4, patch_dim=16, contr_dim=8, n_channels=1
)


class _NoLists(TorchFunctionMode):
    """Refuses tensors made of Python's numbers on the device: a copy that waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_it = str((kwargs or {}).get("device", "cpu")) != "cpu"
        assert not (on_it and function in (torch.tensor, torch.as_tensor)), "a copy that waits"
        return function(*args, **(kwargs or {}))


class _OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, and copies to the device that wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        if function in COPIES:
            devices = [x.device.type for x in (*tensors, result)]
            waits = not ((kwargs or {}).get("non_blocking") or args[-1] is True)
            assert devices[:1] != ["cpu"] or "meta" not in devices or not waits, "a copy that waits"
        else:
            found = {x.device.type for x in tensors if x.dim() > 0}  # a number may lie anywhere
            assert len(found) < 2, f"{function} of tensors on {found}"
        return result


@contextlib.contextmanager
def on_one_device():
    with _NoLists(), _OneDevice():
        yield


@pytest.fixture(params=["contrastive", "supervised", "finetuned"])
def module(request):
    settings = SETTINGS.replace(
        supervise=request.param == "supervised", finetune=request.param == "finetuned"
    )
    return stage(settings)


def stage(settings):
    data = ImageDataModule(settings)
    model = Agglomerator(**dataclasses.asdict(settings))
    return LitAgglomerator(model, settings, data).to("meta")


def batch(n_channels=1, side=16):
    images = torch.empty(6, n_channels, side, side, dtype=torch.uint8, device="meta")
    return images, torch.empty(6, dtype=torch.int64, device="meta")


def test_training_step(module):
    with on_one_device():
        loss = module.training_step(batch(), 0)
        loss.backward()
    assert loss.device.type == "meta"
    learning = [p for p in module.parameters() if p.requires_grad]
    assert learning and all(p.grad.device.type == "meta" for p in learning)


class OnMeta(CPUAccelerator):
    def setup_device(self, device):
        pass


class WatchSteps(Callback):
    """Allows no operation of a step to wait, from the batch to the optimizer; ends the training
    before its first epoch does, whose figures are read."""

    def __init__(self):
        self.guard = contextlib.ExitStack()

    def on_train_batch_start(self, *_):
        self.guard.enter_context(on_one_device())

    def on_train_batch_end(self, *_):
        self.guard.close()

    on_exception = on_train_batch_end

    def on_train_epoch_end(self, *_):
        raise Done


class Done(Exception):
    """The steps are made."""


def test_steps_of_a_trainer_with_all_that_they_log(module, monkeypatch):
    for loop in (fit_loop, evaluation_loop):  # Lightning would count the batches on the device
        monkeypatch.setattr(loop, "has_len_all_ranks", lambda *_, **__: True)
    monkeypatch.setattr(pl.Trainer, "_teardown", lambda self: None)  # takes the results back
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)  # fused AdamW knows no meta device
    monkeypatch.setattr(module, "configure_optimizers", lambda: optimizer)
    trainer = pl.Trainer(
        strategy=SingleDeviceStrategy(torch.device("meta"), accelerator=OnMeta()),
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Pace(6), WatchSteps()],
    )  # fmt: skip
    batches = [tuple(torch.zeros_like(x, device="cpu") for x in batch())] * 3
    with pytest.raises(Done):
        trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 3
    assert trainer.callback_metrics["train_loss"].device.type == "meta"
    assert trainer.callback_metrics["learning_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "flags",
    [
        dict(dataset="CIFAR100", image_size=32, conv_image_size=8, n_channels=3, n_classes=100),
        dict(dataset="smallNORB", image_size=32, conv_image_size=8, n_classes=5),
        dict(iters=3, denoise_iter=1, local_consensus_radius=2, patch_size=2),
        dict(consensus_self=True, levels=3),
        dict(agreement=1.0, consensus_temperature=0.2),
    ],
    ids=["colour and erasing", "crop", "radius and patches", "self and levels", "agreement"],
)
def test_training_step_of_other_networks_and_data(flags):
    module = stage(SETTINGS.replace(**flags))
    settings = module.settings
    side = round(settings.image_size * module.data.entry.margin)
    with on_one_device():
        module.training_step(batch(settings.n_channels, side), 0).backward()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_program_reads_numbers_every_tenth_step_alone(
    tmp_path, monkeypatch, terminal, optimizer
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    small = "--tokenizer_width=4", "--patch_dim=8", "--contr_dim=8", f"--optimizer={optimizer}"
    small += ("--agreement=0",)  # on a CPU, that loss looks whether its patches are complete
    trained = Trained("FashionMNIST", "cpu", tmp_path, "--limit_train=25", *small)
    with Operations() as trained.watching:
        trained.fit()
    reads = [seen["reads"] for seen in trained.seen]
    in_steps = [after - before for before, after in pairwise(reads)]
    assert trained.n_steps == 25
    assert max(in_steps) > 0  # so reading is seen
    assert [i for i, n in enumerate(in_steps, 1) if n] == [10, 20]


def test_step_of_muon():
    module = stage(SETTINGS)
    for parameter in module.parameters():
        parameter.requires_grad = parameter.dim() > 2  # AdamW knows no meta device
    optimizer = Muon(module.model, lr=0.01)
    optimizer.found_inf = torch.zeros((), device="meta")
    with on_one_device():
        module.training_step(batch(), 0).backward()
        optimizer.step()
    assert len(optimizer.state) == 7
    assert all(state["momentum"].device.type == "meta" for state in optimizer.state.values())


def test_validation_and_test_step(module):
    module.eval()
    with torch.no_grad(), on_one_device():
        loss, logits, levels = module._evaluate(batch(), 0)
    assert loss.device.type == logits.device.type == levels.device.type == "meta"
    assert logits.shape == (6, 10)


def test_prediction_leaves_the_device_at_its_end_alone(module):
    module.eval()
    with (
        torch.no_grad(),
        on_one_device(),
        pytest.raises(NotImplementedError, match="copy out of meta"),
    ):
        module.predict_step(batch(), 0)


def test_class_means(module):
    with on_one_device():
        means = module.metrics.class_means
        means.update(torch.empty(9, 8, device="meta"), batch()[1].new_empty(9))
        assert means.compute().device.type == "meta"


@pytest.mark.parametrize("fault", ["mixed", "waiting", "made of a list", "reading"])
def test_faults_are_seen(fault):
    x = torch.empty(3, device="meta")
    with on_one_device(), pytest.raises((AssertionError, RuntimeError)):
        if fault == "mixed":
            x.index_select(0, torch.arange(2))
        elif fault == "waiting":
            torch.arange(2).to("meta")
        elif fault == "made of a list":
            torch.tensor([1.0, 2.0], device="meta")
        else:
            x.sum().item()
