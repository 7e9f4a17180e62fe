"""A running task: a planar cheetah of six point masses in a chain of stiff rods, with motors in its four joints."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.envs.torch.env import TorchEnv

# Of back foot, back knee, hip, shoulder, front knee, front foot: kg; coordinates of the pose at rest, m; and friction
MASSES = (0.75, 1.0, 4.0, 4.0, 1.0, 0.75)
REST = ((-0.65, 0.0), (-0.35, 0.3), (-0.5, 0.6), (0.5, 0.6), (0.3, 0.35), (0.5, 0.0))
FRICTION = (1.0, 0.2, 0.1, 0.1, 0.2, 1.0)  # feet grip, and all else slides
SLOW = 0.05  # m/s, below which friction fades

ROD, ROD_DAMPING = 2e4, 60.0  # N/m, N s/m
JOINT, JOINT_DAMPING = 140.0, 4.0  # N m/rad, towards the pose at rest; N m s/rad
GROUND, GROUND_DAMPING = 2e4, 200.0  # N/m, N s/m
TORQUE, GRAVITY = 40.0, 9.81  # N m, m/s²
SECONDS, SUBSTEPS = 0.05, 20  # of a step, and in how many parts it is computed
CONTROL_COST = 0.05

_RODS = [(bx - ax, by - ay) for (ax, ay), (bx, by) in pairwise(REST)]
_ANGLES = [math.atan2(y, x) for x, y in _RODS]
LENGTHS = tuple(math.hypot(x, y) for x, y in _RODS)
BENDS = tuple(second - first for first, second in pairwise(_ANGLES))


class PlanarCheetah(TorchEnv):
    """The cheetah runs to the right: a step earns the mean speed of hip and shoulder in m/s, minus 0.05 actions².
    Episodes are truncated only.

    State and observation: coordinates [6, 2] and velocities [6, 2] of the masses, flat. Horizontal coordinates are
    counted from the middle of the torso, so that single precision does not suffer from a long way. Actions in [−1, 1]
    are shares of the largest torque, at back knee, hip, shoulder and front knee.
    """

    single_observation_space = Box(-np.inf, np.inf, (24,))
    single_action_space = Box(-1.0, 1.0, (4,))
    num_random = 24

    def first_state(self, random: Tensor) -> Tensor:
        rest = _row(random, [number for place in REST for number in place])
        places, speeds = (0.1 * (random - 0.5)).unflatten(-1, (2, 6, 2)).unbind(1)  # [N, 6, 2]
        places = places + rest.view(6, 2)
        return _state(places - torch.stack((_middle(places), places[..., 1].amin(-1)), -1)[:, None], speeds)

    def next_state(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        actions = actions.to(state.dtype).clamp(-1.0, 1.0)
        places, speeds = state.unflatten(-1, (2, 6, 2)).unbind(1)  # [N, 6, 2]
        masses, friction = _row(state, MASSES), _row(state, FRICTION)
        rest, seconds = (_row(state, LENGTHS), _row(state, BENDS)), SECONDS / SUBSTEPS
        for _ in range(SUBSTEPS):
            forces = inner_forces(places, speeds, TORQUE * actions, *rest)
            normal = normal_forces(places, speeds)
            x, y = (speeds + seconds * forces / masses[:, None]).unbind(-1)
            y = y + seconds * (normal / masses - GRAVITY)
            x = x / (1 + seconds * friction * normal / masses / (x.square() + SLOW**2).sqrt())  # implicit: only slows
            speeds = torch.stack((x, y), -1)
            places = places + seconds * speeds  # semi-implicit Euler
        way = _middle(places)
        rewards = way / SECONDS - CONTROL_COST * actions.square().sum(-1)
        places = places - torch.stack((way, torch.zeros_like(way)), -1)[:, None]
        return _state(places, speeds), rewards, torch.zeros_like(way, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        return state


def normal_forces(places: Tensor, speeds: Tensor) -> Tensor:
    """Forces of the ground [N, 6] on masses that are in it: of a spring and a damper, which never pull."""
    height, rising = places[..., 1], speeds[..., 1]
    return (-GROUND * height - GROUND_DAMPING * rising).clamp(min=0) * (height < 0)


def inner_forces(places: Tensor, speeds: Tensor, motors: Tensor, lengths: Tensor, bends: Tensor) -> Tensor:
    """Forces of rods and joints [N, 6, 2], whose sum is zero.

    Args:
        motors: torques of the motors, [N, 4].
        lengths, bends: of the rods [5] and joints [4] at rest.
    """
    rods, changes = places.diff(dim=1), speeds.diff(dim=1)  # [N, 5, 2], from each mass to the next
    length = rods.norm(dim=-1)
    along = rods / length[..., None]
    across = torch.stack((-along[..., 1], along[..., 0]), -1)
    tension = ROD * (length - lengths) + ROD_DAMPING * (changes * along).sum(-1)

    sin, cos = ((along[:, 1:] * side[:, :-1]).sum(-1) for side in (across, along))  # of the angles of joints, [N, 4]
    bent = torch.atan2(sin * bends.cos() - cos * bends.sin(), cos * bends.cos() + sin * bends.sin())  # away from rest
    turning = ((changes * across).sum(-1) / length).diff(dim=1)  # rad/s
    torques = motors - JOINT * bent - JOINT_DAMPING * turning
    torques = F.pad(torques, (1, 0)) - F.pad(torques, (0, 1))  # a joint turns the rods on both sides of it, [N, 5]

    forces = (torques / length)[..., None] * across - tension[..., None] * along  # on the end of each rod
    return F.pad(forces, (0, 0, 1, 0)) - F.pad(forces, (0, 0, 0, 1))  # and against them on its beginning


def _row(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """Numbers as a tensor that is filled on the device: a copy from the host could not be recorded."""
    return torch.stack([like.new_full((), number) for number in numbers])


def _middle(places: Tensor) -> Tensor:
    """Horizontal coordinate of the middle of the torso, [N]."""
    return places[:, 2:4, 0].mean(-1)


def _state(places: Tensor, speeds: Tensor) -> Tensor:
    return torch.stack((places, speeds), 1).flatten(1)
