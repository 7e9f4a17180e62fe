"""Spaces as plain values, which checkpoints store: who loads a policy needs neither the environment nor its package."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Text, Tuple

from fabricrl.envs.rows import Rows
from fabricrl.envs.spaces import Spaces, is_text, text_of
from fabricrl.utils.errors import CheckpointError

Structure = dict[str, Any]  # of text, numbers, and lists and dicts of these


class Unsupported(Space):
    """Stands for a part of a kind that no policy reads, such as a Sequence that `--obs-keys` leaves out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def sample(self, *_: Any, **__: Any) -> None:
        """Nothing, which nobody reads."""

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Unsupported) and self.kind == other.kind

    def __repr__(self) -> str:
        return self.kind


def structure_of(space: Space) -> Structure:
    """Writes a space as plain values, which `torch.load(weights_only=True)` reads and JSON holds, but for infinity."""
    if isinstance(space, Dict):
        parts = [[key, structure_of(part)] for key, part in space.spaces.items()]
        return {"type": "Dict", "spaces": parts, "sort_keys": bool(space.sort_keys)}
    if isinstance(space, Tuple):
        return {"type": "Tuple", "spaces": [structure_of(part) for part in space.spaces]}
    if isinstance(space, Box):
        bounds = {"low": _numbers(space.low), "high": _numbers(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype)} | bounds
    if isinstance(space, Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, MultiDiscrete):
        counts = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete", "dtype": str(space.dtype)} | counts
    if isinstance(space, MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    return {"type": "Text" if is_text(space) else getattr(space, "kind", type(space).__name__)}


def space_of(structure: Mapping[str, Any]) -> Space:
    """Makes a space of what `structure_of` wrote.

    Raises:
        ValueError, LookupError, TypeError: it did not write this.
    """
    kind = structure["type"]
    if kind == "Dict":
        parts = [(key, space_of(part)) for key, part in structure["spaces"]]
        return Dict(parts, sort_keys=structure["sort_keys"])
    if kind == "Tuple":
        return Tuple([space_of(part) for part in structure["spaces"]])
    if kind == "Box":
        shape, dtype = tuple(structure["shape"]), np.dtype(structure["dtype"])
        low, high = (_array(structure[bound], shape, dtype) for bound in ("low", "high"))
        return Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return Discrete(structure["n"], start=structure["start"], dtype=np.dtype(structure["dtype"]).type)
    if kind == "MultiDiscrete":
        dtype = np.dtype(structure["dtype"])
        nvec, start = (np.array(structure[name], dtype) for name in ("nvec", "start"))
        return MultiDiscrete(nvec, dtype=dtype.type, start=start)
    if kind == "MultiBinary":
        return MultiBinary(structure["n"])
    return Text(1) if kind == "Text" else Unsupported(kind)


def _numbers(values: np.ndarray) -> Any:
    """One number if all are the same, as in images, else a list of them."""
    flat = values.reshape(-1).tolist()
    return flat[0] if flat and values.min() == values.max() else flat


def _array(numbers: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(numbers, list):
        return np.full(shape, numbers, dtype)
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{len(numbers)} bounds for a Box of shape {shape}")
    return np.array(numbers, dtype).reshape(shape)


def stored_spaces(state: Mapping[str, Any]) -> Spaces | None:
    """Returns the spaces that a checkpoint holds; None of an earlier version's, which has them as text.

    Raises:
        ValueError, LookupError, TypeError, ConfigError: they make no sense.
    """
    given, actions = state["spaces"]["obs"], state["spaces"]["actions"]
    if isinstance(given, str) or isinstance(actions, str):
        return None
    rows = Rows(space_of(given), SimpleNamespace(**state["args"]))
    return Spaces(rows.space, space_of(actions), state.get("mask_size", 0), rows.given)


def check_spaces(state: Mapping[str, Any], own: Spaces) -> None:
    """Raises CheckpointError, which prints both, if the checkpoint's environment had other spaces than this one."""
    stored = stored_spaces(state)
    for name, space in (("obs", own.obs), ("actions", own.actions)):
        there = state["spaces"][name] if stored is None else getattr(stored, name)
        same = there == text_of(space) if stored is None else there == space and there.dtype == space.dtype
        if not same:
            raise CheckpointError(
                f"the checkpoint's {name} space is {text_of(there)}, this environment's is {text_of(space)}"
            )
