"""Checks of what a checkpoint holds, before anything is built from it: a file may be whole and yet make no sense."""

import ast
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fabricrl.utils.errors import CheckpointError
from fabricrl.utils.text import is_json_object


def check_contents(state: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError unless the parts that every algorithm's checkpoint has are there and make sense."""
    kinds = {"algo": str, "args": dict, "spaces": dict, "agent": dict, "global_step": int, "world_size": int}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path} has no valid {key!r}")
    for key, valid in _VALID.items():
        if key in state and not valid(state[key]):
            raise CheckpointError(f"{path} has no valid {key!r}")
    args, step = state["args"], state["global_step"]
    for name in ("env_id", "env_kwargs", "num_envs", "total_timesteps", "seed"):
        if name not in args:
            raise CheckpointError(f"{path} has no argument {name!r}")
    for name, valid in _VALID_ARGS.items():
        if name in args and not valid(args[name]):
            raise CheckpointError(f"{path} has no valid argument {name!r}: {args[name]!r}")
    if step > args["total_timesteps"]:
        raise CheckpointError(f"{path} is of step {step} of a run of {args['total_timesteps']}")


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_table(value: Any, kind: Any) -> bool:
    """Tells if it is a dict from text to this kind."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value) and _all(value.values(), kind)


def _all(values: Any, kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _are_episodes(value: Any) -> bool:
    if not (_is_table(value, object) and isinstance(value.get("returns"), list) and _is_count(value.get("count"))):
        return False
    return all(map(_is_number, value["returns"])) and len(value["returns"]) <= value["count"]


def _are_generators(value: Any) -> bool:
    """Tells if it is [W, G, bytes]."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 3 and len(value) > 0


def _is_schedule(value: Any) -> bool:
    names = ("starts", "before", "done", "least")
    if not (_is_table(value, object) and all(_is_count(value.get(name)) for name in names)):
        return False
    ratio = value.get("ratio")
    return _is_number(ratio) and 0 < ratio < math.inf and value["before"] <= value["done"]


def is_shard(value: Any) -> bool:
    """Tells if a replay buffer's state is consistent: its records, and those in use, are as many as it says."""
    if not _is_table(value, object) or "layout" not in value:
        return isinstance(value, dict)  # of another kind; whoever reads it misses what is not there
    pattern = r"(\d+) × (\d+) of (\[.*\])( by environment)?(?: in stacks of (\d+))?"
    layout = re.fullmatch(pattern, str(value["layout"]))
    records, position, size = (value.get(name) for name in ("records", "position", "size"))
    if layout is None or not (_is_bytes(records) and _is_count(position) and _is_count(size)):
        return False
    try:
        capacity, num_envs, record = int(layout[1]), int(layout[2]), np.dtype(ast.literal_eval(layout[3]))
        rows = capacity + int(layout[5] or 1)  # of the ring: see `ReplayBuffer`
    except (ValueError, TypeError, SyntaxError):
        return False
    if layout[4] and not _are_steps(value.get("steps"), num_envs):
        return False
    used = rows if size == capacity else size + 1
    if size > capacity or position >= rows or (size < capacity and position != size):
        return False
    return len(records) == used * num_envs * record.itemsize and _is_kept_apart(value, records, record)


def _are_steps(value: Any, num_envs: int) -> bool:
    """Tells if it is how many steps each environment has stored."""
    counts = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.shape == (num_envs,)
    return counts and bool((value >= 0).all())


def _is_bytes(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1


def _is_kept_apart(shard: Mapping[str, Any], records: torch.Tensor, record: np.dtype) -> bool:
    """Tells if next observations outside the ring are there, each either free or used by a record."""
    finals, free = shard.get("finals"), shard.get("free")
    if not (isinstance(finals, torch.Tensor) and isinstance(free, list) and all(map(_is_count, free))):
        return False
    if "final" not in (record.names or ()):
        return not free
    final = records.numpy().view(record)["final"]
    taken = [*final[final >= 0].tolist(), *free]
    return (
        finals.shape[1:] == record["obs"].shape
        and len(set(taken)) == len(taken)
        and max(taken, default=-1) < len(finals)
    )


_VALID: dict[str, Callable[[Any], bool]] = {
    "global_step": lambda value: _is_count(value, 1),
    "world_size": lambda value: _is_count(value, 1),
    "args": lambda value: _is_table(value, object),
    "spaces": lambda value: _is_table(value, str | dict),  # earlier versions wrote them as text
    "mask_size": _is_count,
    "agent": lambda value: _is_table(value, torch.Tensor),
    "best_return": _is_number,
    "episodes": _are_episodes,
    "generators": _are_generators,
    "schedule": _is_schedule,
    "optimizer": lambda value: isinstance(value, dict) and bool(value.get("state")),
    "learner": lambda value: isinstance(value, dict),
    "shards": _is_count,
    "scaler": lambda value: _is_table(value, int | float) and all(map(_is_number, value.values())),
    "player_device": lambda value: value in ("cpu", "cuda"),
    "asked": lambda value: _is_table(value, int) and all(map(_is_count, value.values())),
    "shard": lambda value: value is None or is_shard(value),
}
# Those that build an environment or count, which evaluation and resuming read before anything else looks at them
_VALID_ARGS: dict[str, Callable[[Any], bool]] = {
    "env_id": lambda value: isinstance(value, str),
    "env_kwargs": lambda value: isinstance(value, str) and is_json_object(value),
    **dict.fromkeys(
        ("num_envs", "num_steps", "total_timesteps", "action_repeat", "frame_stack"), lambda value: _is_count(value, 1)
    ),
    **dict.fromkeys(("mask_velocities", "life_loss", "grayscale", "norm_obs"), lambda value: isinstance(value, bool)),
    "noop_max": _is_count,
    "resize": lambda value: value is None or _is_count(value, 1),
    "obs_keys": lambda value: isinstance(value, tuple) and _all(value, str),
}
