"""Batches: columns of tensors by name; and what a network makes of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fabricrl.utils.device import to_device


class Batch:
    """Tensors as attributes, all with the same rows: `batch.obs`, `batch.actions`. None stands for a column that is not
    there.

    Not a dict, since in half precision Fabric rounds every tensor that it finds in a module's inputs: old
    log-probabilities and targets, too.
    """

    def __init__(self, **columns: Any) -> None:
        self.__dict__.update(columns)

    def __getattr__(self, name: str) -> Any:  # for type checkers; only called for columns that do not exist
        raise AttributeError(f"a batch of {', '.join(self.__dict__)} has no {name}")

    @property
    def columns(self) -> dict[str, Any]:
        """Name → column."""
        return self.__dict__

    def with_columns(self, **columns: Any) -> "Batch":
        """The batch with some columns added or replaced."""
        return Batch(**(self.columns | columns))

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of the rows, of every column that is not None."""
        return Batch(**{name: None if c is None else c[rows] for name, c in self.columns.items()})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator["Batch"]:
        """Row by row: the batches [B, ...] of columns [K, B, ...]."""
        for parts in zip(*self.columns.values(), strict=True):
            yield Batch(**dict(zip(self.columns, parts, strict=True)))

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for it."""
        return Batch(**{name: None if c is None else to_device(c, device) for name, c in self.columns.items()})


pytree.register_pytree_node(
    Batch,
    lambda batch: ([batch.columns[name] for name in sorted(batch.columns)], sorted(batch.columns)),
    lambda values, names: Batch(**dict(zip(names, values, strict=True))),
)


class Outputs:
    """Outputs of a network, which unpack like a tuple: `logprobs, entropy, values = model(batch)`.

    To Fabric it is a thing of its own: in the backward pass it would stop at every tensor that it finds, which takes
    small networks as long as another layer. So it is here that half precision ends.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)
