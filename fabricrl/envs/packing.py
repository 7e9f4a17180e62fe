"""Observations with images, packed into records; and the places of velocities in others."""

from typing import Any

import numpy as np
from gymnasium.spaces import Dict, Space, flatdim, flatten

from fabricrl.envs.spaces import SMALLEST_IMAGE, is_image
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
    name = env_id.rpartition(":")[2].removeprefix("torch/").rpartition("-v")[0]
    if name not in VELOCITIES:
        raise ConfigError(f"--mask-velocities is set: it works with {', '.join(VELOCITIES)}, not with {env_id}")
    return list(VELOCITIES[name])


class Packer:
    """Packs observations with images, alone or in a flat Dict, into records of bytes (see `utils/records.py`).

    Args:
        grayscale: images of three colours, transparent or not, become one channel, by the weights of ITU-R 601.
        resize: height and width of images, by area; None: as they are.

    Attributes:
        space: of the records.

    Raises:
        ConfigError: an image is too small for the encoder, or OpenCV is needed and not installed.
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
