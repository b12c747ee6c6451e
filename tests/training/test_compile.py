"""Compiled training steps: one graph of the network and its loss, and the same numbers."""

import dataclasses

import pytest
import torch

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.data.module import ImageDataModule
from agglomerator.training.losses import contrastive
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


@pytest.mark.parametrize(
    ("precision", "tile"), [("float32", 2**26), ("bfloat16", 40)], ids=["one tile", "four tiles"]
)
def test_a_compiled_step_has_the_gradients_of_an_eager_one(precision, tile, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE", tile)
    module, views, labels = parts()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with autocast:
        loss = module.contrast.compare(views, labels)[0]
    loss.backward()
    learning = {n: p for n, p in module.named_parameters() if p.grad is not None}
    expected = {name: p.grad.clone() for name, p in learning.items()}
    module.zero_grad()
    module.compile_steps(torch.device("cpu"))
    compiled = torch.compile(
        module.contrast.compare, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with autocast:
        loss = compiled(views, labels)[0]
    loss.backward()
    for name, parameter in learning.items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.slow
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
        torch.testing.assert_close(loss, module.contrast.compare(views, labels, True, iters)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["with_levels", "reconstruct"])
def test_what_a_step_compiles_runs_any_number_of_iterations(method):
    masked = dict(pretraining="masked", head="mean") if method == "reconstruct" else {}
    module, views, _ = parts(iters=3, iters_spread=2, **masked)
    module.compile_steps(torch.device("cpu"))
    model, given = module.model.eval(), [views]
    if masked:
        given.append(model.masked.draw(len(views), torch.Generator(), views.device))
    eager = getattr(Agglomerator, method)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for iters in range(1, 6):
            expected = eager(model, *given, iters)
            for one, other in zip(compiled(model, *given, iters), expected, strict=True):
                torch.testing.assert_close(one, other)
