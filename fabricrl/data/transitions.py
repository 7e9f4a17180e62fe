"""Layout of a transition in the memory of a replay buffer: one record, its fields side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

TORCH_TYPES = {"f4": torch.float32, "i4": torch.int32, "u1": torch.uint8, "b1": torch.bool}
Place = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


def record_type(obs_space: Box, num_actions: int, implicit_next: bool) -> np.dtype:
    """Layout of one transition in a ReplayBuffer."""
    obs = ("u1" if obs_space.dtype == np.uint8 else "f4", obs_space.shape)
    fields: list[tuple] = [("obs", *obs), ("actions", "f4", (num_actions,)), ("rewards", "f4")]
    fields += [("terminated", "?"), ("ended", "?")]
    fields += [("final", "i4")] if implicit_next else [("next_obs", *obs)]
    return np.dtype(fields, align=True)


def places(record: np.dtype) -> dict[str, Place]:
    """Finds the fields in a record that is read as a row of a field's type: that type, where, shape and strides."""
    found = {}
    for name in record.names or ():
        kind, offset = record.fields[name][:2]  # type: ignore[index]
        strides = tuple(math.prod(kind.shape[i + 1 :]) for i in range(len(kind.shape)))
        found[name] = TORCH_TYPES[kind.base.str[1:]], offset // kind.base.itemsize, kind.shape, strides
    return found


def columns_of(words: Tensor, where: Mapping[str, Place]) -> dict[str, Tensor]:
    """The fields, at their `places`, of records that are rows of 4-byte words [I, L]; [I, ...] each, views."""
    views = {dtype: words.view(dtype) for dtype in {place[0] for place in where.values()}}
    return {
        name: views[dtype].as_strided((len(words), *shape), (views[dtype].stride(0), *strides), offset)
        for name, (dtype, offset, shape, strides) in where.items()
    }


def layout(capacity: int, num_envs: int, record: np.dtype, frame_stack: int = 1) -> str:
    """Names what has to be equal where a stored replay buffer is loaded."""
    stacks = f" in stacks of {frame_stack}" if frame_stack > 1 else ""
    return f"{capacity} × {num_envs} of {record.descr}{stacks}"


def why_it_differs(stored: str, own: str, num_envs: int) -> str:
    """Explains how a stored layout differs from `own`, and what a buffer of so many environments can do."""
    (there, columns), (here, own_columns) = (text.split(" of ", 1) for text in (stored, own))
    if columns != own_columns:
        return f"the checkpoint's replay buffer has records of {columns}, this run's {own_columns}: keep its arguments"
    rows, envs = (int(number) for number in there.split(" × "))
    same = envs == int(here.split(" × ")[1])
    advice = f"--buffer-size {rows * num_envs} (of a rank) fits" if same else "keep --num-envs"
    return f"the checkpoint's replay buffer holds {there} transitions, this run's {here}: {advice}"


def merge_shards(shards: Sequence[Mapping[str, Any]], record: np.dtype, envs: slice, width: int) -> dict[str, Any]:
    """The state of a buffer with some of the environments of several, which hold `width` each, but for its layout."""
    parts, offset, implicit = [], 0, "final" in (record.names or ())
    for shard in shards:
        part = shard["records"].numpy().view(record).reshape(-1, width).copy()
        if implicit:
            part["final"] += offset * (part["final"] >= 0)
            offset += len(shard["finals"])
        parts.append(part)
    records = np.ascontiguousarray(np.concatenate(parts, 1)[:, envs])
    state = dict(shards[0]) | {"records": torch.from_numpy(records.reshape(-1).view(np.uint8))}
    if "steps" in state:
        state["steps"] = torch.cat([shard["steps"] for shard in shards])[envs]
    if implicit:
        state["finals"] = torch.cat([shard["finals"] for shard in shards])
        state["free"] = sorted(set(range(offset)) - set(records["final"].ravel().tolist()), reverse=True)
    return state
