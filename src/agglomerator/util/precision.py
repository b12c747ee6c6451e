"""Arithmetic that stays in float32 whatever the precision of the training step around it."""

import functools
from contextlib import nullcontext

import torch


def upcast(x):
    """x as float32 if its type is narrower. Sums of many numbers need that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.compiler.assume_constant_result  # PyTorch 2.11 cannot trace the question
def has_autocast(kind):
    """Whether there is autocast for a kind of device."""
    return torch.amp.is_autocast_available(kind)


def as_products(x):
    """x in the type that autocast would give it in a matrix product, once for many of them."""
    kind = x.device.type
    if has_autocast(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(device):
    """A context in which operations on a device keep the types of their tensors."""
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_float32(function):
    """Make a function of images compute in float32 in every precision of training.

    Mixed precision casts matrix products to 16 bits. With bf16-true and 64-true, tensors that are
    made without a type (`torch.arange`, `torch.rand`, torchvision's grids) have that type.

    Args:
        function: takes a tensor first, and computes on that tensor's device.
    """

    @functools.wraps(function)
    def exact(images, *args, **kwargs):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with without_autocast(torch.device("cpu")), without_autocast(images.device):
                return function(images, *args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return exact
