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
    torch._foreach_lerp_(_parts(target), _parts(source), tau)


def _parts(module: nn.Module) -> list[Tensor]:
    """The parameters; on a GPU in small parts, as the kernel has one multiprocessor take 65 536 numbers of a tensor."""
    parameters = [parameter.detach() for parameter in module.parameters()]
    if is_recording() or not parameters[0].is_cuda:
        return parameters
    return [part for each in parameters for part in (each.view(-1).split(PART) if each.is_contiguous() else [each])]
