"""CartPole (Barto, Sutton and Anderson 1983): Gymnasium's CartPole-v1 in tensor code."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s², kg, kg, m
FORCE, SECONDS = 10.0, 0.02  # N, and of a step
LARGEST_POSITION, LARGEST_ANGLE = 2.4, 12 * 2 * math.pi / 360  # m, rad
TOTAL_MASS, POLE_MOMENT = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH

_HIGH = np.array([2 * LARGEST_POSITION, np.inf, 2 * LARGEST_ANGLE, np.inf], np.float32)


class CartPole(TorchEnv):
    """A pole on a cart that is pushed to the left or right, by 0 or 1; each step in which the pole stays up earns 1.

    State and observation: position and speed of the cart, angle and angular speed of the pole.
    """

    single_observation_space = Box(-_HIGH, _HIGH)
    single_action_space = Discrete(2)
    num_random = 4

    def first_state(self, random: Tensor) -> Tensor:
        return 0.1 * random - 0.05

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, x_dot, theta, theta_dot = state.unbind(-1)
        force = FORCE * (2 * actions - 1)
        cos, sin = theta.cos(), theta.sin()
        push = (force + POLE_MOMENT * theta_dot.square() * sin) / TOTAL_MASS
        theta_acc = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cos.square() / TOTAL_MASS))
        x_acc = push - POLE_MOMENT * theta_acc * cos / TOTAL_MASS
        moved = (x + SECONDS * x_dot, x_dot + SECONDS * x_acc, theta + SECONDS * theta_dot)
        state = torch.stack((*moved, theta_dot + SECONDS * theta_acc), -1)  # Euler's method
        fallen = (state[:, 0].abs() > LARGEST_POSITION) | (state[:, 2].abs() > LARGEST_ANGLE)
        return state, torch.ones_like(x), fallen

    def observe(self, state: Tensor) -> Tensor:
        return state
