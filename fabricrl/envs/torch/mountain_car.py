"""The mountain car (Moore 1990) with continuous actions: Gymnasium's MountainCarContinuous-v0 in tensor code."""

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

LEFT_END, RIGHT_END, GOAL = -1.2, 0.6, 0.45
LARGEST_SPEED, POWER, SLOPE = 0.07, 0.0015, 0.0025


class MountainCarContinuous(TorchEnv):
    """A car in a valley whose engine is too weak for the hill on the right: it has to swing up. The top earns 100, and
    each step costs 0.1 action².

    State and observation: position and speed.
    """

    single_observation_space = Box(
        np.array([LEFT_END, -LARGEST_SPEED], np.float32), np.array([RIGHT_END, LARGEST_SPEED], np.float32)
    )
    single_action_space = Box(-1.0, 1.0, (1,))
    num_random = 1

    def first_state(self, random: Tensor) -> Tensor:
        return torch.cat((0.2 * random - 0.6, torch.zeros_like(random)), -1)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, speed = state.unbind(-1)
        action = actions[:, 0].to(state.dtype)
        speed = speed + action.clamp(-1.0, 1.0) * POWER - SLOPE * (3 * position).cos()
        speed = speed.clamp(-LARGEST_SPEED, LARGEST_SPEED)
        position = (position + speed).clamp(LEFT_END, RIGHT_END)
        speed = torch.where((position == LEFT_END) & (speed < 0), 0.0, speed)  # the wall on the left stops it
        arrived = (position >= GOAL) & (speed >= 0)
        return torch.stack((position, speed), -1), 100.0 * arrived - 0.1 * action.square(), arrived

    def observe(self, state: Tensor) -> Tensor:
        return state
