from copy import deepcopy

import pytest
import torch
from torch import nn

from agglomerator.model.columns import LevelLinear
from agglomerator.training.optim import Muon, orthogonal


@pytest.mark.parametrize("shape", [(1, 20, 60), (3, 60, 20), (2, 32, 32)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    found = orthogonal(matrices).float()
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    within = u.mT @ found @ v.mT
    near_one = within.diagonal(dim1=1, dim2=2)[values > 0.1 * values[:, :1]]
    assert near_one.min() > 0.6 and near_one.max() < 1.3
    rest = within - torch.diag_embed(within.diagonal(dim1=1, dim2=2))
    assert rest.abs().max() < 0.05


def nets():
    """Two equal nets with a linear map of two levels, and a convolution."""
    torch.manual_seed(0)
    net = nn.ModuleList([LevelLinear(2, 6, 5), nn.Conv2d(3, 4, 3), nn.LayerNorm(4)])
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    other = nn.ModuleList([LevelLinear(2, 6, 5), nn.Conv2d(3, 4, 3), nn.LayerNorm(4)])
    other.load_state_dict(net.state_dict())
    for parameter, equal in zip(net.parameters(), other.parameters(), strict=True):
        equal.grad = parameter.grad.clone()
    return net, other


def same(net, other):
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return [torch.equal(weight, equal) for weight, equal in pairs]


def test_a_step_of_matrices_is_that_of_their_directions_and_of_others_that_of_adamw():
    net, other = nets()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    linear, conv = net[0].weight.grad.clone(), net[1].weight.grad.clone()
    Muon(net, lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)).step()
    for weight, grad, at, k in ((net[0].weight, linear, 0, 2), (net[1].weight, conv, 2, 1)):
        ahead = grad.lerp(0.1 * grad, 0.9).reshape(k, len(grad) // k, -1)
        size = 0.2 * max(ahead.shape[1:]) ** 0.5
        step = size * orthogonal(ahead).float().reshape(grad.shape)
        torch.testing.assert_close(weight, before[at] * (1 - 0.1 * 0.5) - 0.1 * step)
    torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)).step()
    is_matrix = [parameter.dim() > 1 for parameter in net.parameters()]
    assert same(net, other) == [not each for each in is_matrix]


def test_every_level_is_a_matrix_of_its_own():
    net, other = nets()
    other[0].weight.grad[5:] *= 128
    for each in (net, other):
        Muon(each, lr=0.1).step()
    torch.testing.assert_close(net[0].weight, other[0].weight)


def test_a_step_that_loss_scaling_passes_over_leaves_everything():
    net, other = nets()
    optimizer = Muon(net, lr=0.1, fused=True)
    net[0].weight.grad[0, 0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(same(net, other))
    assert not any(
        state["momentum"].any() for state in optimizer.state.values() if "momentum" in state
    )


def test_scaled_gradients_make_the_same_momentum():
    net, other = nets()
    optimizer, other_optimizer = (Muon(each, lr=0.1, fused=True) for each in (net, other))
    for parameter in other.parameters():
        parameter.grad *= 1024
    other_optimizer.grad_scale, other_optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
    optimizer.step()
    other_optimizer.step()
    for (weight, state), (scaled, other_state) in zip(
        optimizer.state.items(), other_optimizer.state.items(), strict=True
    ):
        torch.testing.assert_close(weight, scaled)
        torch.testing.assert_close(state, other_state)


def test_a_step_after_state_is_loaded_is_the_same():
    net, other = nets()
    optimizer, other_optimizer = Muon(net, lr=0.1), Muon(other, lr=0.1)
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    optimizer.step()
    other.load_state_dict(net.state_dict())
    other_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((net, optimizer), (other, other_optimizer)):
        for parameter, grad in zip(each.parameters(), grads, strict=True):
            parameter.grad = 2 * grad
        its_optimizer.step()
    assert all(same(net, other))


def test_parameters_that_do_not_learn_are_left_out():
    net, _ = nets()
    net[1].requires_grad_(False)
    groups = Muon(net, lr=0.1).param_groups
    assert [group["matrices"] for group in groups] == [0, 2]
    assert sum(len(group["params"]) for group in groups) == 4
