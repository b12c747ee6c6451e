"""Compiled training steps: one graph of the network and its loss, and the same numbers."""

import dataclasses

import pytest
import torch

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.module import LitAgglomerator

SETTINGS = Settings(
    dataset="digits", image_size=16, conv_image_size=4, patch_dim=8, contr_dim=8, n_channels=1,
    dropout=0.0, iters=3,
)  # fmt: skip


def parts(**flags):
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = SETTINGS.replace(**flags)
    model = Agglomerator(**dataclasses.asdict(settings))
    module = LitAgglomerator(model, settings, ImageDataModule(settings))
    return module, torch.randn(12, 1, 16, 16), torch.arange(6).repeat(2) % 3


@pytest.mark.parametrize(
    "flags",
    [{}, dict(agreement=1.0), dict(levels=3, iters=4, local_consensus_radius=1),
     dict(consensus_temperature=0.2, tokenizer="vgg", head="grid")],
    ids=["plain", "agreement", "levels and radius", "temperature"],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_network_and_loss_are_one_graph(flags, precision):
    module, views, labels = parts(**flags)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = torch._dynamo.explain(module.contrast.compare)(views, labels)
    assert found.graph_break_count == 0
    assert found.graph_count == 1


def test_a_compiled_step_has_the_gradients_of_an_eager_one():
    module, views, labels = parts()
    module.contrast.compare(views, labels)[0].backward()
    learning = {n: p for n, p in module.named_parameters() if p.grad is not None}
    expected = {name: p.grad.clone() for name, p in learning.items()}
    module.zero_grad()
    compiled = torch.compile(
        module.contrast.compare, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    compiled(views, labels)[0].backward()
    for name, parameter in learning.items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_compiled_network_runs_any_number_of_iterations():
    module, views, labels = parts(iters=3)
    backend = dict(fullgraph=True, backend="aot_eager")
    network = torch.compile(module.model.eval(), **backend)
    compare = torch.compile(module.contrast.compare, dynamic=False, **backend)
    for iters in (2, 3, 4, 2):
        expected = module.model(views, iters)
        torch.testing.assert_close(network(views, iters), expected)
        loss, embedding, _ = compare(views, labels, True, iters)
        torch.testing.assert_close(embedding, expected)
        assert loss.isfinite()
