"""Steps of training that draw their number of iterations (--iters_spread)."""

import dataclasses

import pytest
import torch
from conftest import run_program

from agglomerator import Agglomerator, load_checkpoint
from agglomerator.config import Settings
from agglomerator.config.checks import check_spread
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator
from agglomerator.util.errors import UserError

SETTINGS = Settings(
    dataset="digits", image_size=16, conv_image_size=4, n_channels=1, n_classes=3, patch_dim=8,
    contr_dim=8, head="grid", head_side=2, iters=3,
)  # fmt: skip
STAGES = {
    "contrastive": {},
    "islands": dict(agreement=1.0),
    "composites": dict(agreement=1.0, agreement_cue="composites", augmentation="views"),
    "masked": dict(pretraining="masked", head="mean"),
    "supervised": dict(supervise=True),
    "finetuned": dict(supervise=True, finetune=True),
}


def losses(**flags):
    """Losses of the first steps of a training."""
    settings = SETTINGS.replace(**flags)
    torch.manual_seed(0)
    model = Agglomerator(**dataclasses.asdict(settings))
    module = LitAgglomerator(model, settings, ImageDataModule(settings))
    images = torch.randint(256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    batch = images.to(torch.uint8), torch.arange(6) % 3
    return [module.training_step(batch, step).item() for step in range(12)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_one_of_a_training_with_that_number_of_iterations(stage):
    flags = STAGES[stage]
    found = losses(iters_spread=1, **flags)
    drawn = set()
    fixed = {iters: losses(iters=iters, **flags) for iters in (2, 3, 4)}
    for step, loss in enumerate(found):
        (iters,) = [t for t, of_steps in fixed.items() if loss == of_steps[step]]
        drawn.add(iters)
    assert drawn == ({3} if stage == "supervised" else {2, 3, 4})


def test_validation_and_test_have_the_number_of_the_settings():
    settings = SETTINGS.replace(iters_spread=1)
    model = Agglomerator(**dataclasses.asdict(settings)).eval()
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(model(images), model(images, iters=3), rtol=0, atol=0)
    assert (model(images) - model(images, iters=2)).abs().max() > 1e-4
    embedding, state = model.with_levels(images, iters=2)
    torch.testing.assert_close(embedding, model(images, iters=2))
    torch.testing.assert_close(state, model.states(images)[2])


REFUSED = {
    "too few": (dict(iters_spread=2), "--iters_spread=2", "--iters_spread=1"),
    "below the last": (dict(iters_spread=1, denoise_iter=-2), "--iters_spread=1", "spread=0"),
    "one state": (dict(iters_spread=1, denoise_iter=3), "--denoise_iter=3", "--denoise_iter=-1"),
    "masked": (
        dict(iters_spread=3, pretraining="masked", head="mean"), "--iters_spread=3", "spread=2",
    ),
    "negative": (dict(iters_spread=-1), "--iters_spread=-1", "at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("values, flag, way_out", REFUSED.values(), ids=REFUSED)
def test_a_spread_that_leaves_too_few_iterations_is_refused(values, flag, way_out):
    with pytest.raises(UserError) as error:
        check_spread(SETTINGS.replace(**values))
    message = str(error.value)
    assert message.startswith(f"{flag}: ") and way_out in message and "\n" not in message


def test_a_trained_network_may_have_fewer_iterations(tmp_path):
    common = "--dataset=digits", "--image_size=8", "--conv_image_size=2", "--n_channels=1"
    run = *common, "--output_dir", tmp_path, "--exp_name=x", "--logger=none", "--limit_test=1"
    train = "--iters=3", "--max_epochs=1", "--limit_train=2", "--limit_val=1", "--patch_dim=8"
    run_program(*run, *train, "--iters_spread=1", "--contr_dim=8", "--head=grid")
    path = tmp_path / "x" / "checkpoints" / "last.ckpt"
    assert load_checkpoint(path, iters=1, denoise_iter=1).settings.n_iters == 1
    begin = "--load_checkpoint_dir", path, "--iters=2"
    for more in (("--mode=test",), ("--supervise", "--max_epochs=1"), ("--max_epochs=1",)):
        run_program(*run, *begin, *more)
    done = run_program(*run, *begin, "--iters_spread=1", ok=False)
    assert done.stderr.startswith("error: --iters_spread=1: from --iters=2 ")
