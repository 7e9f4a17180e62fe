"""A reaching task: an arm of two links in a plane, with a motor in either joint, moves its tip to a target."""

import math

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

MASS, LENGTH = 1.0, 0.5  # of each link, a thin rod: kg, m
TORQUES, FRICTION = (2.0, 1.0), 0.3  # N m of shoulder and elbow; N m s
SECONDS, SUBSTEPS = 0.05, 5  # of a step, and in how many parts it is computed
LARGEST_SPEED = 20.0  # rad/s
NEAR, FAR = 0.2, 0.95  # m from the shoulder, between which targets lie
CLOSE = 0.05  # m from the target: a success

_HIGH = np.array([1.0, 1.0, 1.0, 1.0, LARGEST_SPEED, LARGEST_SPEED, 1.0, 1.0, 2.0, 2.0], np.float32)


class Reach(TorchEnv):
    """The arm lies in a horizontal plane, so that no gravity acts. A step costs the distance in metres between tip and
    target, and 0.01 actions²; `infos["is_success"]` is 1 where the tip is within 5 cm. Episodes are truncated only.

    State: angle of the first link, that of the second relative to it, their speeds; the target's coordinates.
    Observation: cosines and sines of both angles, speeds, the target, and the way from the tip to it. Actions in
    [−1, 1] are shares of the largest torques.
    """

    single_observation_space = Box(-_HIGH, _HIGH)
    single_action_space = Box(-1.0, 1.0, (2,))
    num_random = 4

    def first_state(self, random: Tensor) -> Tensor:
        first, second, direction = (2 * math.pi * (random[:, :3] - 0.5)).unbind(-1)
        distance = (NEAR**2 + random[:, 3] * (FAR**2 - NEAR**2)).sqrt()  # evenly over the ring
        still = torch.zeros_like(first)
        target = (distance * direction.cos(), distance * direction.sin())
        return torch.stack((first, second, still, still, *target), -1)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        actions = actions.to(state.dtype).clamp(-1.0, 1.0)
        angle1, angle2, speed1, speed2, *target = state.unbind(-1)
        for _ in range(SUBSTEPS):
            torque1, torque2 = (TORQUES[i] * actions[:, i] for i in range(2))
            acceleration1, acceleration2 = accelerations(
                angle2, speed1, speed2, torque1 - FRICTION * speed1, torque2 - FRICTION * speed2
            )
            seconds = SECONDS / SUBSTEPS
            speed1 = (speed1 + seconds * acceleration1).clamp(-LARGEST_SPEED, LARGEST_SPEED)
            speed2 = (speed2 + seconds * acceleration2).clamp(-LARGEST_SPEED, LARGEST_SPEED)
            angle1, angle2 = angle1 + seconds * speed1, angle2 + seconds * speed2  # semi-implicit Euler
        state = torch.stack((angle1, angle2, speed1, speed2, *target), -1)
        distance = _to_target(state).norm(dim=-1)
        rewards = -distance - 0.01 * actions.square().sum(-1)
        return state, rewards, torch.zeros_like(distance, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        first, second = state[:, 0], state[:, 1]
        angles = torch.stack((first.cos(), first.sin(), second.cos(), second.sin()), -1)
        return torch.cat((angles, state[:, 2:], _to_target(state)), -1)

    def told(self, state: Tensor) -> dict[str, Tensor]:
        return {"is_success": (_to_target(state).norm(dim=-1) < CLOSE).float()}


def accelerations(
    angle2: Tensor, speed1: Tensor, speed2: Tensor, torque1: Tensor, torque2: Tensor
) -> tuple[Tensor, Tensor]:
    """Accelerations [N] of both joints: M(θ) θ'' = τ − C(θ, θ'), for two rods (Spong et al., Robot Modeling, 6.4)."""
    a = MASS * LENGTH**2 * (1 / 3 + 1 + 1 / 3)
    b, d = MASS * LENGTH**2 / 2, MASS * LENGTH**2 / 3
    cos, sin = angle2.cos(), angle2.sin()
    m11, m12 = a + 2 * b * cos, d + b * cos  # and m22 = d
    right1 = torque1 + b * sin * (2 * speed1 * speed2 + speed2.square())
    right2 = torque2 - b * sin * speed1.square()
    determinant = m11 * d - m12.square()
    return (d * right1 - m12 * right2) / determinant, (m11 * right2 - m12 * right1) / determinant


def tip(state: Tensor) -> Tensor:
    """Coordinates of the tip, [N, 2]."""
    first, both = state[:, 0], state[:, 0] + state[:, 1]
    return LENGTH * torch.stack((first.cos() + both.cos(), first.sin() + both.sin()), -1)


def _to_target(state: Tensor) -> Tensor:
    """The way from the tip to the target, [N, 2]."""
    return state[:, 4:6] - tip(state)
