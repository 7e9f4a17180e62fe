"""Pendulum: Gymnasium's Pendulum-v1 in tensor code."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

GRAVITY, MASS, LENGTH, SECONDS = 10.0, 1.0, 1.0, 0.05  # m/s², kg, m, and of a step
LARGEST_SPEED, LARGEST_TORQUE = 8.0, 2.0  # rad/s, N m

_HIGH = np.array([1.0, 1.0, LARGEST_SPEED], np.float32)


class Pendulum(TorchEnv):
    """A pendulum that is to be swung up and held there, by a torque that is too small to lift it at once.

    State: angle, 0 where it stands up, and angular speed. Observation: cosine and sine of the angle, and the speed. A
    step costs angle² + 0.1 speed² + 0.001 torque², of the state that it begins in.
    """

    single_observation_space = Box(-_HIGH, _HIGH)
    single_action_space = Box(-LARGEST_TORQUE, LARGEST_TORQUE, (1,))
    num_random = 2

    def first_state(self, random: Tensor) -> Tensor:
        angle, speed = (2 * random - 1).unbind(-1)
        return torch.stack((math.pi * angle, speed), -1)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, speed = state.unbind(-1)
        torque = actions[:, 0].to(state.dtype).clamp(-LARGEST_TORQUE, LARGEST_TORQUE)
        wrapped = (angle + math.pi).remainder(2 * math.pi) - math.pi
        costs = wrapped.square() + 0.1 * speed.square() + 0.001 * torque.square()
        acceleration = 3 * GRAVITY / (2 * LENGTH) * angle.sin() + 3 / (MASS * LENGTH**2) * torque
        speed = (speed + SECONDS * acceleration).clamp(-LARGEST_SPEED, LARGEST_SPEED)
        state = torch.stack((angle + SECONDS * speed, speed), -1)
        return state, -costs, torch.zeros_like(costs, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack((angle.cos(), angle.sin(), speed), -1)
