"""Matrix products of compiled updates by oneDNN, on processors of which MKL uses half.

PyTorch multiplies float32 matrices by MKL, which on AMD's processors keeps to vectors of 256 bits, also where they have
512 (AVX-512). oneDNN, which PyTorch also contains, takes all 512: on Zen 5, the only one measured, in half the time.
"""

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 2**21  # multiplications in a product; below that oneDNN's calls cost more than they save
Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]


def faster_products() -> Decompositions:
    """The products that oneDNN takes over from MKL where that is faster, as `make_fx` takes decompositions."""
    return BY_ONEDNN if _mkl_is_slow() else {}


@functools.cache
def _mkl_is_slow() -> bool:
    info = Path("/proc/cpuinfo")
    processor = info.read_text() if info.exists() else platform.processor()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and "AuthenticAMD" in processor and torch.backends.mkl.is_available() and _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """A B + bias of [M, K], [K, N] and [N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _products(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The products of C pairs: [C, M, K], [C, K, N] and [C, 1, N] → [C, M, N]."""
    results = a.new_empty(len(a), a.shape[1], b.shape[2])
    for index, result in enumerate(results):
        result.copy_(_product(a[index], b[index], None if bias is None else bias[index, 0]))
    return results


# Operations that a compiler takes as they are; `torch.library.custom_op` would take three times as long to call them
_library = torch.library.Library("fabricrl", "FRAGMENT")
for _name, _function in (("product", _product), ("products", _products)):
    _library.define(f"{_name}(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, lambda a, b, bias: a.new_empty(*a.shape[:-1], b.shape[-1]), "Meta")


def _is_large(a: Tensor, b: Tensor) -> bool:
    is_plain = a.dtype == torch.float32 and a.device.type == "cpu"
    return is_plain and a.shape[-2] * a.shape[-1] * b.shape[-1] >= LEAST


def _mm(a: Tensor, b: Tensor) -> Any:
    return torch.ops.fabricrl.product(a, b, None) if _is_large(a, b) else NotImplemented


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **scales: float) -> Any:
    is_linear = not scales and bias.shape == b.shape[-1:]
    return torch.ops.fabricrl.product(a, b, bias) if is_linear and _is_large(a, b) else NotImplemented


def _bmm(a: Tensor, b: Tensor) -> Any:
    return torch.ops.fabricrl.products(a, b, None) if _is_large(a, b) else NotImplemented


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, **scales: float) -> Any:
    is_linear = not scales and bias.shape == (len(a), 1, b.shape[-1])
    return torch.ops.fabricrl.products(a, b, bias) if is_linear and _is_large(a, b) else NotImplemented


_aten = torch.ops.aten
BY_ONEDNN: Decompositions = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
}
