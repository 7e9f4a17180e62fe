"""Frame stacks: of a rollout, each frame stored once; and of observations that come one by one."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class StackedFrames:
    """Frame stacks of which each frame is stored once; indexing puts them together.

    Args:
        frames: [F, R]; places: [B, S], the frames of each stack.
    """

    def __init__(self, frames: Tensor, places: Tensor) -> None:
        self.frames, self.places = frames, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """[..., S, R]"""
        places = self.places[index]
        return self.frames.index_select(0, places.flatten()).view(*places.shape, -1)  # much faster than frames[places]

    def rows(self, index: Tensor | slice) -> "StackedFrames":
        """Some of the stacks, not put together yet."""
        return StackedFrames(self.frames, self.places[index])


pytree.register_pytree_node(
    StackedFrames, lambda stacks: ([stacks.frames, stacks.places], None), lambda parts, _: StackedFrames(*parts)
)


class FrameStack:
    """Stacks observations that come one by one: the last S of the episode, or the newest alone if S is 1.

    Agents that name no `frame_stack` and no `obs_dtype` take vectors, without a stack.
    """

    def __init__(self, agent: Any) -> None:
        self.depth, self.dtype = getattr(agent, "frame_stack", 1), getattr(agent, "obs_dtype", torch.float32)
        self.frames = torch.empty(0)

    def add(self, obs: np.ndarray, dones: np.ndarray) -> Tensor:
        """Observations [N, R] → [N, R], or [N, S, R]; `dones` [N]: which are the first of an episode."""
        newest = torch.as_tensor(obs, dtype=self.dtype)
        if self.depth == 1:
            return newest
        newest = newest[:, None]
        if len(self.frames) != len(newest):  # the first
            self.frames = newest.repeat(1, self.depth, 1)
        shifted = torch.cat((self.frames[:, 1:], newest), 1)
        self.frames = torch.where(torch.as_tensor(dones)[:, None, None], newest, shifted)
        return self.frames
