"""Small collectives over all ranks; no-ops with one rank."""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional_collectives
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.recording import is_recording

FEW = 4  # ranks
# The names that they have from PyTorch 2.13 on, and those before
gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_gather = getattr(functional_collectives, "all_gather_single", None) or functional_collectives.all_gather_tensor


def all_gather(fabric: Fabric, tensor: Tensor) -> Tensor:
    """[*shape] of every rank, stacked in rank order on the tensor's own device: [W, *shape].

    Without the barrier that Fabric has before its collectives.
    """
    if fabric.world_size == 1:
        return tensor[None]
    own = tensor.to(fabric.device).reshape(-1)
    rows = own.new_empty(fabric.world_size * own.numel())
    gather(rows, own, group_of(fabric))
    return rows.view(fabric.world_size, *tensor.shape).to(tensor.device)


def group_of(fabric: Fabric) -> Any:
    """The process group of all ranks, or of those of a `Group`."""
    return getattr(fabric, "process_group", None) or torch.distributed.group.WORLD


def all_sum(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The sum over ranks; the same bits on all of them."""
    return tensor if fabric.world_size == 1 else all_gather(fabric, tensor).sum(0)


def all_mean(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The mean over ranks; the same bits on all of them."""
    return tensor if fabric.world_size == 1 else all_gather(fabric, tensor).mean(0)


def all_max(fabric: Fabric, value: int) -> int:
    """The largest of the ranks' integers."""
    return value if fabric.world_size == 1 else int(all_gather(fabric, torch.tensor(value)).max())


def gather_rows(fabric: Fabric, rows: Tensor) -> Tensor:
    """Concatenates [E, C] over ranks, in rank order, where E differs from rank to rank."""
    if fabric.world_size == 1:
        return rows
    counts = all_gather(fabric, torch.tensor(len(rows))).tolist()
    if not any(counts):
        return rows
    padded = rows.new_zeros((max(counts), rows.shape[1]))
    padded[: len(rows)] = rows
    blocks = all_gather(fabric, padded)  # [W, max E, C]
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def mean_over_ranks(fabric: Fabric, vector: Tensor) -> Tensor:
    """The mean of a vector over all ranks, or over those of a `Group`, by one collective; the same bits on all.

    A compiler takes collectives that return their result, which cost twice what those into a given tensor do.
    """
    group = group_of(fabric)
    if fabric.world_size > FEW or vector.device.type != "cpu":
        total = functional_collectives.all_reduce(vector, "sum", group)
        return functional_collectives.wait_tensor(total) / fabric.world_size
    # One message each way; a sum takes two rounds of them
    if is_recording():
        rows = functional_collectives.wait_tensor(_gather(vector, 0, group)).view(fabric.world_size, -1)
    else:
        rows = all_gather(fabric, vector)
    return rows.mean(0)
