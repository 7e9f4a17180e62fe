"""Helpers that act on the parameters of any module."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fabricrl.utils.recording import is_recording

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
PART = 8192


def orthogonal_init(layer: Layer, gain: float) -> Layer:
    """Orthogonal weights (Saxe et al. 2014) scaled by `gain`, zero bias; in place."""
    nn.init.orthogonal_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def parameter_hash(module: nn.Module) -> Tensor:
    """Eight bytes of the SHA-256 of all parameters and buffers, as an int64 scalar: equal if and only if they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else tensor.detach().cpu().numpy().tobytes()
        )
    return torch.tensor(int.from_bytes(digest.digest()[:8], "big", signed=True))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freezes the parameters of a module: a backward pass goes through it to its inputs."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """θ̄ ← τ θ + (1 − τ) θ̄, for all parameters at once."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(target.parameters(), source.parameters(), strict=True)]
    if _go_in_parts(pairs[0][0]):
        pairs = [part for pair in pairs for part in _parts(*pair)]
    targets, sources = zip(*pairs, strict=True)
    torch._foreach_lerp_(targets, sources, tau)


def _go_in_parts(parameter: Tensor) -> bool:
    return parameter.is_cuda and not is_recording()


def _parts(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Small parts of both, as a GPU gives each multiprocessor 65 536 numbers of a tensor; or all, where they cannot be
    divided alike."""
    if target.is_contiguous() and source.is_contiguous():
        yield from zip(target.view(-1).split(PART), source.view(-1).split(PART), strict=True)
    else:
        yield target, source
