"""Observations as rows, which agents take: vectors, or records of bytes where there are images among them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.spaces import Dict, Space, Tuple, flatdim, flatten, flatten_space

from fabricrl.envs.backends import option
from fabricrl.envs.spaces import SMALLEST_IMAGE, image_keys, is_flat, is_image
from fabricrl.envs.values import Observation
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.extras import require_opencv
from fabricrl.utils.records import Records

# Where observations hold velocities, by id without version: the places that rl-baselines3-zoo masks
VELOCITIES = {
    "CartPole": (1, 3),
    "MountainCar": (1,),
    "MountainCarContinuous": (1,),
    "Pendulum": (2,),
    "LunarLander": (2, 3, 5),
}


def velocities(env_id: str) -> list[int]:
    """Places of velocities in the observations of an environment.

    Raises:
        ConfigError: they are not known.
    """
    name = env_id.rpartition(":")[2].rpartition("-v")[0]
    if name not in VELOCITIES:
        raise ConfigError(f"--mask-velocities is set: it can be for {', '.join(VELOCITIES)}, not for {env_id}")
    return list(VELOCITIES[name])


class Packer:
    """Packs observations with images, alone or in a flat Dict, into records of bytes (see `utils/records.py`).

    Args:
        grayscale: images of three colours, transparent or not, become one channel, by the weights of ITU-R 601.
        resize: height and width of images, by area; None: as they are.

    Attributes:
        space: of the records.

    Raises:
        ConfigError: an image is too small for the encoder, or OpenCV is needed and not here.
    """

    def __init__(self, space: Space, grayscale: bool = False, resize: int | None = None) -> None:
        parts = space.spaces if isinstance(space, Dict) else {"image": space}
        self.vectors = {key: part for key, part in parts.items() if not is_image(part)}
        self.images = {key: part for key, part in parts.items() if is_image(part)}
        self._single = not isinstance(space, Dict)
        self._grayscale, self._resize = grayscale, resize
        if grayscale or resize is not None:
            require_opencv("--grayscale" if grayscale else "--resize")
        shapes = {key: self.process(np.zeros(part.shape or (), np.uint8)).shape for key, part in self.images.items()}
        for key, shape in shapes.items():
            sides = shape if len(shape) == 2 else shape[1:] if shape[0] < shape[-1] else shape[:-1]
            if min(sides) < SMALLEST_IMAGE:
                raise ConfigError(
                    f"observation {key!r} is an image of {sides[0]} × {sides[1]}: the encoder takes "
                    f"{SMALLEST_IMAGE} × {SMALLEST_IMAGE} and more; --resize 84 enlarges it"
                )
        self.space = Records({key: flatdim(part) for key, part in self.vectors.items()}, shapes)

    def __call__(self, observation: Any) -> np.ndarray:
        """One observation → its record, uint8 [R]."""
        record = np.empty(self.space.size, np.uint8)
        parts = {"image": observation} if self._single else observation
        floats = record[: 4 * self.space.num_floats].view(np.float32)
        at = 0
        for key, part in self.vectors.items():
            size = self.space.vectors[key]
            floats[at : at + size] = np.asarray(flatten(part, parts[key]))
            at += size
        end = 4 * at
        for key, image in self.space.images.items():
            pixels = self.process(parts[key])
            end = image.start + pixels.size
            record[image.start : end] = pixels.reshape(-1)
        record[end:] = 0
        return record

    def process(self, image: np.ndarray) -> np.ndarray:
        """An image in grey and resized, as far as that is asked for."""
        if not self._grayscale and self._resize is None:
            return image
        import cv2  # here, as it takes a moment and few runs need it

        if image.ndim == 3 and image.shape[0] < image.shape[-1]:
            image = np.ascontiguousarray(image.transpose(1, 2, 0))
        if self._grayscale and image.ndim == 3 and image.shape[-1] in (3, 4):
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if image.shape[-1] == 3 else cv2.COLOR_RGBA2GRAY)
        if self._resize is not None and image.shape[:2] != (self._resize, self._resize):
            planes = [image] if image.ndim == 2 else np.split(image, range(4, image.shape[-1], 4), -1)
            size = (self._resize, self._resize)  # OpenCV takes up to four channels at once
            image = np.dstack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
            image = image[..., 0] if image.shape[-1] == 1 else image
        return image


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
