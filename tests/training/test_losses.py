import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from agglomerator.training.losses import contrastive
from agglomerator.training.losses.contrastive import prototype_loss, supervised_contrastive_loss


def batch(labels, width=7, seed=0):
    """Embeddings of unit length that require a gradient, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    embedding = F.normalize(torch.randn(len(labels), width, generator=generator), dim=1)
    return embedding.requires_grad_(), torch.tensor(labels)


@pytest.mark.parametrize("tile", [contrastive.TILE, 20, 1])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(
    "labels", [[0, 1, 0, 1], [0, 0, 0, 0], [2, 0, 1, 2, 2, 0, 1, 1], [0, 1, 2, 0], [5, 5, 1, 9, 7]]
)
def test_loss_is_that_of_the_pairs(labels, temperature, tile, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE", tile)
    embedding, labels = batch(labels)
    again = embedding.detach().double().requires_grad_()
    expected = oracle.contrastive_loss(again, labels, temperature)
    loss = supervised_contrastive_loss(embedding, labels, temperature)
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(embedding.grad, again.grad.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tile, largest", [(contrastive.TILE, 64 * 64), (64, 64 * 7)])
def test_a_large_batch_keeps_no_similarities_for_the_backward_pass(tile, largest, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE", tile)
    embedding, labels = batch([0, 1] * 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        supervised_contrastive_loss(embedding, labels)
    assert max(x.numel() for x in kept) == largest


def test_loss_without_any_pair_is_finite():
    embedding, labels = batch([0, 1, 2, 3])
    loss = supervised_contrastive_loss(embedding, labels)
    loss.backward()
    assert loss == 0
    assert embedding.grad.isfinite().all()


def test_loss_is_finite_at_low_precision():
    embedding, labels = batch([0, 0, 1, 1])
    expected = supervised_contrastive_loss(embedding, labels)
    loss = supervised_contrastive_loss(embedding.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_loss_falls_as_classes_part():
    mixed, labels = batch([0, 0, 1, 1])
    apart = torch.eye(7)[labels]
    assert supervised_contrastive_loss(apart, labels) < supervised_contrastive_loss(mixed, labels)


LABELS = [0, 1, 2, 0, 1, 1, 2, 0, 1, 5, 2, 0]  # 5 is alone


def _one_of_two(rank, folder, tile):
    """The process `rank` of two: its half of the batch through one linear map."""
    contrastive.TILE = tile
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    half = slice(rank * 6, rank * 6 + 6)
    layer, images, labels = _case()
    layer = torch.nn.parallel.DistributedDataParallel(layer)
    loss = supervised_contrastive_loss(F.normalize(layer(images[half]), dim=1), labels[half])
    loss.backward()
    torch.save((loss.detach(), layer.module.weight.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _case():
    torch.manual_seed(3)
    layer = torch.nn.Linear(9, 5, bias=False)
    return layer, torch.randn(12, 9), torch.tensor(LABELS)


@pytest.mark.parametrize("tile", [contrastive.TILE, 24])
def test_two_processes_compute_the_loss_of_the_whole_batch(tmp_path, tile):
    mp.spawn(_one_of_two, (str(tmp_path), tile), nprocs=2)
    layer, images, labels = _case()
    loss = supervised_contrastive_loss(F.normalize(layer(images), dim=1), labels)
    loss.backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss.detach())
    for _, gradient in found:
        torch.testing.assert_close(gradient, layer.weight.grad)


def test_loss_is_as_exact_in_mixed_precision():
    embedding, labels = batch([2, 0, 1, 2, 2, 0, 1, 1])
    expected = supervised_contrastive_loss(embedding, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_contrastive_loss(embedding, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_prototype_loss_is_that_of_the_equation(temperature):
    embedding, labels = batch([2, 0, 1, 2, 2])
    prototypes = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z, w = embedding.detach().double().numpy(), prototypes.detach().double().numpy()
    expected = []
    for row, label in zip(z, labels.tolist(), strict=True):
        scores = np.array([row @ each / np.linalg.norm(each) for each in w]) / temperature
        expected.append(np.log(np.exp(scores).sum()) - scores[label])
    expected = temperature / 0.07 * np.mean(expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prototype_loss(embedding, labels, prototypes, temperature)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert prototypes.grad.abs().sum() > 0
    along = (prototypes.grad * prototypes).sum(1)
    assert along.abs().max() < 1e-5  # their length says nothing
