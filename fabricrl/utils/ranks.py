"""Small collectives over all ranks; no-ops with one rank."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as functional_collectives
from lightning.fabric import Fabric
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fabricrl.utils.recording import is_recording

FEW = 4  # ranks
AWAKE = 0.01  # seconds for which a rank that waits stays awake
# The names that they have from PyTorch 2.13 on, and those before
gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


def all_gather(fabric: Fabric, tensor: Tensor) -> Tensor:
    """[*shape] of every rank, stacked in rank order on the tensor's own device: [W, *shape].

    Without the barrier that Fabric has before its collectives.
    """
    if fabric.world_size == 1:
        return tensor[None]
    own = tensor.to(fabric.device).reshape(-1)
    rows = own.new_empty(fabric.world_size * own.numel())
    finish(gather, rows, own, group=group_of(fabric))
    return rows.view(fabric.world_size, *tensor.shape).to(tensor.device)


def group_of(fabric: Fabric) -> Any:
    """The process group of all ranks, or of those of a `Group`."""
    return getattr(fabric, "process_group", None) or torch.distributed.group.WORLD


def finish(collective: Callable[..., Any], *tensors: Tensor, **options: Any) -> None:
    """Runs a collective of `torch.distributed`; on a CPU it looks again and again whether that is done.

    A thread that sleeps takes a millisecond to wake where cores are virtual, three times as long as a small message;
    one that yields leaves its core to Gloo's threads and goes on at once. Who waits for longer sleeps.
    """
    if tensors[0].device.type != "cpu":
        collective(*tensors, **options)
        return
    work = collective(*tensors, async_op=True, **options)
    deadline = time.perf_counter() + AWAKE
    while not work.is_completed() and time.perf_counter() < deadline:
        _give_way()
    work.wait()  # raises what has failed


_give_way: Callable[[], Any] = getattr(os, "sched_yield", lambda: time.sleep(0))


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
    """The mean of a vector over all ranks, or over those of a `Group`, by one collective; the same bits on all."""
    group, ranks = group_of(fabric), fabric.world_size
    if vector.device.type != "cpu":
        return functional_collectives.wait_tensor(functional_collectives.all_reduce(vector, "sum", group)) / ranks
    total = torch.ops.fabricrl.sum_over_ranks if is_recording() else _sum_over_ranks
    return total(vector, group.group_name, ranks) / ranks


def _sum_over_ranks(vector: Tensor, group_name: str, world_size: int) -> Tensor:
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]  # a str with a name of its own
    if world_size > FEW:
        total = vector.clone()
        finish(torch.distributed.all_reduce, total, group=group)
        return total
    rows = vector.new_empty(world_size * len(vector))  # one message each way; a sum takes two rounds of them
    finish(gather, rows, vector, group=group)
    return rows.view(world_size, -1).sum(0)


# An operation that a compiler takes as it is
torch.library.custom_op("fabricrl::sum_over_ranks", _sum_over_ranks, mutates_args=()).register_fake(
    lambda vector, group_name, world_size: torch.empty_like(vector)
)
