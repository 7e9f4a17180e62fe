"""Observations as rows, which agents take: vectors, or records of bytes where there are images among them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.spaces import Dict, Space, Tuple, flatten, flatten_space

from fabricrl.envs.options import option
from fabricrl.envs.packing import Packer, velocities
from fabricrl.envs.spaces import image_keys, is_flat
from fabricrl.envs.values import Observation
from fabricrl.utils.records import Records


class Rows:
    """Makes rows of observations as an environment gives them, without the environment.

    Does what the wrappers of `make_env` do, by the same functions.

    Args:
        given: the space of an environment's observations, as `check_env` returns it.
        args: those of the run.

    Attributes:
        space: of a row.
        flat: of observations without parts in parts and text, of which rows are made; masked: places of velocities.

    Raises:
        ConfigError: as `Packer`, or keys that are not there.
    """

    def __init__(self, given: Space, args: Any) -> None:
        self.given = given
        self._read = Observation(given, option(args, "obs_keys"))
        self.flat = self._read.space
        self.masked = velocities(args.env_id) if option(args, "mask_velocities") else []
        self.packer: Packer | None = None
        single = self._read.single
        if image_keys(self.flat):
            self.packer = Packer(self.flat, option(args, "grayscale"), option(args, "resize"))
            self.space: Any = self.packer.space
        else:
            self.space = self.flat if is_flat(self.flat) else flatten_space(self.flat)
        self._plain = self.flat is self.space and single is not None and not single.limited  # rows already

    def read(self, observation: Any) -> Any:
        """One observation → what `flat` promises, checked. Raises EnvError if it does not fit its space."""
        return self._read(observation, False)

    def one(self, observation: Any) -> np.ndarray:
        """One observation → its row.

        Raises:
            EnvError: it does not fit its space.
        """
        read = self._without_velocities(self.read(observation))
        if self.packer is not None:
            return self.packer(read)
        return read if self.flat is self.space else np.asarray(flatten(self.flat, read)).astype(self.space.dtype)

    def __call__(self, observations: Any) -> tuple[np.ndarray, bool]:
        """An observation, or a batch as vector environments give it → rows [N, ...], and true if it was a batch.

        Raises:
            EnvError: an observation does not fit its space.
        """
        if self._plain and _are_vectors(observations, self.space):
            return self._without_velocities(observations), True
        count = _count(self.given, observations)
        if count is None:
            return self.one(observations)[None], False
        rows = np.empty((count, *self.space.shape), self.space.dtype)
        for index in range(count):
            rows[index] = self.one(_row_of(self.given, observations, index))
        return rows, True

    def _without_velocities(self, observations: Any) -> Any:
        """Vectors [..., D] with zeros in place of velocities, if they are masked."""
        if not self.masked:
            return observations
        observations = observations.copy()  # they are the caller's
        observations[..., self.masked] = 0.0
        return observations


def _are_vectors(value: Any, space: Space) -> bool:
    """Tells if it is an array [N, D] of a space [D]."""
    is_array = isinstance(value, np.ndarray) and value.dtype == space.dtype
    return is_array and value.ndim == 2 and value.shape[1:] == space.shape


def _count(space: Space, value: Any) -> int | None:
    """The number of observations in a batch; None of what is not one."""
    if isinstance(space, Dict | Tuple):
        inner = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
        known = value.keys() if isinstance(value, Mapping) else range(len(value) if _is_listed(value) else 0)
        parts = [(part, value[key]) for key, part in inner if key in known]
        return next((count for part, one in parts if (count := _count(part, one)) is not None), None)
    if space.shape is None or not (_is_listed(value) or hasattr(value, "shape")):
        return None
    return len(value) if np.ndim(value) == len(space.shape) + 1 else None


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _row_of(space: Space, values: Any, index: int) -> Any:
    """Observation `index` of a batch."""
    if isinstance(space, Dict) and isinstance(values, Mapping):
        return {
            key: _row_of(space.spaces[key], part, index) if key in space.spaces else part
            for key, part in values.items()
        }
    if isinstance(space, Tuple) and _is_listed(values) and len(values) == len(space.spaces):
        return tuple(_row_of(part, one, index) for part, one in zip(space.spaces, values, strict=True))
    return values[index]


def floats_in(rows: np.ndarray, space: Space) -> np.ndarray:
    """The real numbers in rows [N, ...], without images."""
    return rows[:, : 4 * space.num_floats].view(np.float32) if isinstance(space, Records) else rows
