"""Observations with images, alone or beside vectors, as one record of bytes.

    record [R] = vector, vector, ... as float32 | image, image, ... as uint8 | up to three bytes of padding

Buffers, messages and the shared memory of environments move records as they move vectors: as one row. What is in them
is known at both ends: to the wrapper that packs them, and to the encoder that looks at them, through views.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium.spaces import Box

if TYPE_CHECKING:  # processes that step environments start in a third of a second without torch
    from torch import Tensor


class Image(NamedTuple):
    """Place and layout of an image in a record.

    Attributes:
        start: its first byte.
        shape: (height, width, channels) or (channels, height, width), as it is stored.
        channels: which of these the channels are, 0 or 2.
    """

    start: int
    shape: tuple[int, int, int]
    channels: int

    def of(self, records: Tensor) -> Tensor:
        """The images of records [..., R], as views: [..., C, H, W]."""
        images = records[..., self.start : self.start + math.prod(self.shape)].unflatten(-1, self.shape)
        return images if self.channels == 0 else images.movedim(-1, -3)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        first, second, third = self.shape
        return self.shape if self.channels == 0 else (third, first, second)


class Records(Box):
    """The space of records, uint8 [R].

    Attributes:
        vectors: key → length of each vector, in order; those of discrete parts are one-hot.
        images: key → where it lies.
        num_floats: length of all vectors together.
        size: R.
    """

    def __init__(self, vectors: dict[str, int], images: dict[str, tuple[int, ...]]) -> None:
        self.vectors, self.images = dict(vectors), {}
        self.num_floats = sum(vectors.values())
        size = 4 * self.num_floats
        for key, shape in images.items():
            full = (*shape, 1) if len(shape) == 2 else shape
            self.images[key] = Image(size, (full[0], full[1], full[2]), 0 if full[0] < full[-1] else 2)
            size += math.prod(shape)
        self.size = math.ceil(size / 4) * 4
        super().__init__(0, 255, (self.size,), np.uint8)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Records) and (self.vectors, self.images) == (other.vectors, other.images)

    def __repr__(self) -> str:
        images = [f"{key}: uint8 {image.shape}" for key, image in self.images.items()]
        return f"Records({', '.join([*(f'{key}: float32 ({n},)' for key, n in self.vectors.items()), *images])})"


def floats_of(records: Tensor, count: int) -> Tensor:
    """The first `count` float32 numbers of records [..., R], as a view [..., count]."""
    import torch

    return records[..., : 4 * count].view(torch.float32)
