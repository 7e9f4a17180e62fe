"""Acrobot (Sutton 1996): Gymnasium's Acrobot-v1 in tensor code, by the equations of Sutton and Barto's book."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

GRAVITY, SECONDS = 9.8, 0.2  # m/s², and of a step
MASS, LENGTH, CENTER, INERTIA = 1.0, 1.0, 0.5, 1.0  # of each link: kg, m, m from its joint, kg m²
LARGEST_SPEEDS = (4 * math.pi, 9 * math.pi)  # rad/s

_HIGH = np.array([1.0, 1.0, 1.0, 1.0, *LARGEST_SPEEDS], np.float32)


class Acrobot(TorchEnv):
    """Two links that hang from a bar, with a motor between them: the tip is to be swung above a line. Each step costs 1
    until it is there. Actions 0, 1, 2 are the torques −1, 0, 1.

    State: the angle of the first link, 0 where it hangs down, that of the second relative to it, and their speeds.
    Observation: cosine and sine of either angle, and the speeds.
    """

    single_observation_space = Box(-_HIGH, _HIGH)
    single_action_space = Discrete(3)
    num_random = 4

    def first_state(self, random: Tensor) -> Tensor:
        return 0.2 * random - 0.1

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque, h = actions - 1, SECONDS
        k1 = _derivative(state, torque)  # the method of Runge and Kutta
        k2 = _derivative(state + h / 2 * k1, torque)
        k3 = _derivative(state + h / 2 * k2, torque)
        k4 = _derivative(state + h * k3, torque)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = (state[:, :2] + math.pi).remainder(2 * math.pi) - math.pi
        speeds = (state[:, i].clamp(-largest, largest) for i, largest in enumerate(LARGEST_SPEEDS, 2))
        state = torch.stack((*angles.unbind(-1), *speeds), -1)
        above = -state[:, 0].cos() - (state[:, 1] + state[:, 0]).cos() > 1.0
        return state, above.to(state.dtype) - 1.0, above

    def observe(self, state: Tensor) -> Tensor:
        first, second, *speeds = state.unbind(-1)
        return torch.stack((first.cos(), first.sin(), second.cos(), second.sin(), *speeds), -1)


def _derivative(state: Tensor, torque: Tensor) -> Tensor:
    """Of the state [N, 4] with respect to time."""
    theta1, theta2, speed1, speed2 = state.unbind(-1)
    cos2, sin2 = theta2.cos(), theta2.sin()
    d1 = MASS * CENTER**2 + MASS * (LENGTH**2 + CENTER**2 + 2 * LENGTH * CENTER * cos2) + 2 * INERTIA
    d2 = MASS * (CENTER**2 + LENGTH * CENTER * cos2) + INERTIA
    phi2 = MASS * CENTER * GRAVITY * (theta1 + theta2).sin()
    coupling = MASS * LENGTH * CENTER * sin2
    phi1 = -coupling * speed2.square() - 2 * coupling * speed2 * speed1
    phi1 = phi1 + (MASS * CENTER + MASS * LENGTH) * GRAVITY * theta1.sin() + phi2
    numerator = torque + d2 / d1 * phi1 - coupling * speed1.square() - phi2
    acceleration2 = numerator / (MASS * CENTER**2 + INERTIA - d2.square() / d1)
    acceleration1 = -(d2 * acceleration2 + phi1) / d1
    return torch.stack((speed1, speed2, acceleration1, acceleration2), -1)
