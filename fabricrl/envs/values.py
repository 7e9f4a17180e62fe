"""Checks that environments return what their spaces promise, and converts it where that loses nothing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple

from fabricrl.envs.spaces import is_text, text_of
from fabricrl.utils.errors import ConfigError, EnvError

NUMBERS = "biuf"  # kinds of NumPy types
INTEGERS, REALS, TRUTHS = (int, np.integer), (float, int, np.floating), (bool, np.bool_)
# How an environment of Gymnasium's answers, for those that were written for older ones
INTERFACE = (
    "Gymnasium asks for reset(seed=None, options=None) → (observation, info) and step(action) → (observation, reward, "
    "terminated, truncated, info)"
)


def as_array(value: Any) -> np.ndarray:
    """Converts lists, tuples, numbers and tensors to NumPy; anything else becomes an array of objects.

    Raises:
        EnvError: rows of different lengths, or a tensor of a type that NumPy lacks.
    """
    if hasattr(value, "detach"):  # a tensor: processes of environments need not import torch to know one
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise EnvError(f"a {type(value).__name__} that is no array ({error})") from error


def number(value: Any, what: str) -> float:
    """Returns the number that `value` holds, in whatever form.

    Raises:
        EnvError: it is none, or there are several.
    """
    if isinstance(value, REALS):
        return float(value)
    array = as_array(value)
    if array.dtype.kind not in NUMBERS:
        raise EnvError(f"{what} of type {type(value).__name__}, which is not a number")
    if array.size != 1:
        raise EnvError(f"{what} of shape {array.shape}, which must be one number")
    return float(array.item())


def flag(value: Any, what: str) -> bool:
    """Returns True if `value` is true; None is not.

    Raises:
        EnvError: there are several values, or it is text.
    """
    if isinstance(value, TRUTHS):
        return bool(value)
    array = as_array(value)
    if array.size != 1 or array.dtype.kind not in NUMBERS + "O":
        raise EnvError(f"{what} of type {type(value).__name__} and shape {array.shape}, which must be one truth value")
    return bool(array.item())


class Part:
    """Converts values of a space without parts.

    Args:
        name: the part's, in messages; empty if there is only one.

    Attributes:
        limited: True if every step needs a check beyond shape and type.
    """

    def __init__(self, space: Space, name: str = "") -> None:
        self.space, self.name = space, name
        self.known = isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete)
        self.shape, self.dtype = (space.shape, space.dtype) if self.known else (None, None)
        self.integers = self.known and self.dtype.kind in "biu"  # type: ignore[union-attr]
        self._limits = _limits(space) if self.known else None
        self.limited = self.integers and self._limits is not None
        self._choices = (space.start, space.start + space.n) if isinstance(space, Discrete) else (0, 0)

    def __call__(self, value: Any, everything: bool) -> Any:
        """Converts a value to the array that the space promises.

        Args:
            everything: also check the bounds of real numbers, which costs time.

        Raises:
            EnvError: it does not fit.
        """
        if value.__class__ is not np.ndarray or value.dtype is not self.dtype or value.shape != self.shape:
            if not self.known or (isinstance(value, INTEGERS) and self._choices[0] <= value < self._choices[1]):
                return value
            value = self._converted(value)
        if self._limits is not None and (everything or self.integers):
            low, high = self._limits
            if np.count_nonzero(value < low) or np.count_nonzero(value > high):  # four times as fast as `any`
                raise self._misfit(f"with {value[(value < low) | (value > high)].flat[0]}, which is out of range")
        return value

    def _converted(self, value: Any) -> np.ndarray:
        array = as_array(value)
        if array.dtype.kind not in NUMBERS:
            raise self._misfit(f"of type {type(value).__name__}, which is not an array of numbers")
        if array.shape != self.shape:
            if array.size != 1 or math.prod(self.shape) != 1:  # type: ignore[arg-type]
                raise self._misfit(f"of shape {array.shape} and type {array.dtype}")
            array = array.reshape(self.shape)  # type: ignore[arg-type]
        if self.integers and array.dtype != self.dtype:
            self._check_whole(array)
        return array.astype(self.dtype, copy=False)

    def _check_whole(self, array: np.ndarray) -> None:
        """Raises EnvError if the integers of the space cannot be these numbers."""
        low, high = _range_of(self.dtype)  # type: ignore[arg-type]
        if array.dtype.kind == "f" and not (whole := array == np.floor(array)).all():
            raise self._misfit(f"with {array[~whole].flat[0]}, which is not an integer")
        outside = (array < low) | (array > high)
        if outside.any():
            raise self._misfit(f"with {array[outside].flat[0]}, which is out of range")

    def _misfit(self, what: str) -> EnvError:
        place = f"part {self.name!r} of " if self.name else ""
        return EnvError(f"{place}an observation {what}; its space is {text_of(self.space)}")


class Observation:
    """Converts observations of any space: nested parts become one flat Dict, without text.

    Args:
        keys: names of parts, or of groups of parts, to keep; none: all.

    Attributes:
        space: of the results: the environment's, or a flat Dict of its parts.
        left_out: names of the parts that are text.

    Raises:
        ConfigError: keys that are not there.
    """

    def __init__(self, space: Space, keys: Sequence[str] = ()) -> None:
        self._given = space
        self._composite = isinstance(space, Dict | Tuple)
        parts = dict(_leaves(space)) if self._composite else {}
        self.left_out = [_name(path) for path, part in parts.items() if is_text(part)]
        if len(self.left_out) < len(parts):
            parts = {path: part for path, part in parts.items() if not is_text(part)}
        if keys:
            parts = _chosen(parts, keys)
        names = {path: _name(path) for path in parts}
        if len(set(map(str, names.values()))) < len(names):
            raise ConfigError(f"observation space {text_of(space)} has two parts of one name")
        self._parts = {path: Part(part, str(names[path])) for path, part in parts.items()}
        self._taken = {path[:end] for path in parts for end in range(len(path) + 1)}
        self._names = names
        self.single = None if self._composite else Part(space)
        one_level = isinstance(space, Dict) and len(space.spaces) == len(parts) and all(len(p) == 1 for p in parts)
        if not self._composite or (one_level and not keys):
            self.space = space
        else:
            sort = isinstance(space, Dict) and space.sort_keys
            self.space = Dict({names[path]: part for path, part in parts.items()}, sort_keys=sort)

    def __call__(self, value: Any, everything: bool) -> Any:
        """Converts an observation; see `Part`."""
        if self.single is not None:
            return self.single(value, everything)
        taken: dict[Any, Any] = {}
        self._take(self._given, value, (), everything, taken)
        return taken

    def _take(self, space: Space, value: Any, path: tuple, everything: bool, taken: dict[Any, Any]) -> None:
        if path not in self._taken:
            return
        if (part := self._parts.get(path)) is not None:
            taken[self._names[path]] = part(value, everything)
            return
        inner: Iterator[tuple[Any, Space]]
        if isinstance(space, Dict):
            if not isinstance(value, Mapping) or value.keys() != space.spaces.keys():
                what = f"of {', '.join(map(str, value)) or 'no parts'}" if isinstance(value, Mapping) else _kind(value)
                raise self._misfit(path, what, space)
            inner = iter(space.spaces.items())
        else:
            assert isinstance(space, Tuple)
            if not isinstance(value, tuple | list | np.ndarray) or len(value) != len(space.spaces):
                raise self._misfit(path, _kind(value), space)
            inner = enumerate(space.spaces)
        for key, one in inner:
            self._take(one, value[key], (*path, key), everything, taken)

    def _misfit(self, path: tuple, what: str, space: Space) -> EnvError:
        place = f"part {_name(path)!r} of " if path else ""
        return EnvError(f"{place}an observation {what}; its space is {text_of(space)}")


def _leaves(space: Space, path: tuple = ()) -> Iterator[tuple[tuple, Space]]:
    """Parts without parts, by the keys and indices that lead to them."""
    if isinstance(space, Dict | Tuple):
        for key, part in space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces):
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _name(path: tuple) -> Any:
    """Name of a part, such as `inner.speed`; the key alone if nothing is nested."""
    return path[0] if len(path) == 1 else ".".join(map(str, path))


def _names(path: tuple) -> set[str]:
    """Names of a part and of the groups that contain it."""
    return {str(_name(path[:end])) for end in range(1, len(path) + 1)}


def _chosen(parts: dict[tuple, Space], keys: Sequence[str]) -> dict[tuple, Space]:
    """Parts that are named, or lie in a group that is named, in the order of the names."""
    chosen: dict[tuple, Space] = {}
    for key in keys:
        found = {path: part for path, part in parts.items() if key in _names(path)}
        if not found:
            names = ", ".join(str(_name(path)) for path in parts)
            allowed = f"one or more of {names}" if names else "for Dict observations, which these are not"
            raise ConfigError(f"--obs-keys is {' '.join(keys)}: it must be {allowed}")
        chosen |= found
    return chosen


def _kind(value: Any) -> str:
    return f"of {len(value)} parts" if isinstance(value, tuple | list) else f"of type {type(value).__name__}"


def _range_of(dtype: np.dtype) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _limits(space: Space) -> tuple[Any, Any] | None:
    """Smallest and largest values; None if the type allows no others.

    Bounds of real numbers are widened by half of their digits, so that rounding in the environment ends no run.
    """
    if isinstance(space, Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, MultiBinary):
        return 0, 1
    assert isinstance(space, Box)
    low, high = space.low, space.high
    if space.dtype.kind in "biu":
        least, largest = _range_of(space.dtype)
        return (low, high) if (low > least).any() or (high < largest).any() else None
    if not (np.isfinite(low).any() or np.isfinite(high).any()):
        return None
    room = math.sqrt(np.finfo(space.dtype).eps)
    with np.errstate(over="ignore"):  # an infinite bound is no bound
        return low - room * np.maximum(1, abs(low)), high + room * np.maximum(1, abs(high))
