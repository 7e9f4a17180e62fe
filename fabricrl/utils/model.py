"""Helpers that act on the parameters of any module."""

import hashlib

import torch
from torch import Tensor, nn


def orthogonal_init(layer: nn.Linear, gain: float) -> nn.Linear:
    """Orthogonal weights (Saxe et al. 2014) scaled by `gain`, zero bias; in place."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def parameter_hash(module: nn.Module) -> Tensor:
    """Eight bytes of the SHA-256 of all parameters and buffers, as an int64 scalar: equal if and only if they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else
                      tensor.detach().cpu().numpy().tobytes())
    return torch.tensor(int.from_bytes(digest.digest()[:8], "big", signed=True))


def all_finite(module: nn.Module) -> bool:
    """Whether no parameter holds NaN or infinity. One host synchronisation: call it once an iteration."""
    # max |θ| is NaN or infinite as soon as one θ is
    largest = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()], float("inf")))
    return bool(largest.isfinite().all())
