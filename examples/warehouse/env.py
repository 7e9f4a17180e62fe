"""A warehouse: the robot fetches a parcel and brings it to the gate before its battery is empty."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

CELLS, PIXELS = 5, 8  # a side of the floor, in cells; a side of a cell in the camera's image
GATE = (CELLS - 1, CELLS // 2)  # row and column
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
FLOOR, PARCEL, GATEWAY, ROBOT = (30, 30, 30), (255, 160, 0), (0, 120, 255), (255, 255, 255)


class Warehouse(gym.Env):
    """A floor of 5 × 5 cells. The robot takes the parcel by driving onto it, and delivers it by driving to the gate.

    Observation, a Dict:
        camera: the floor from above, an image [40, 40, 3]. The orange parcel is somewhere, the blue gate always in the
            middle of the lowest row, the robot is white, with an orange core once it has the parcel.
        status: two numbers in [0, 1], whether the robot has the parcel, and how full its battery is.

    Action: 0 drives up, 1 right, 2 down, 3 left; against a wall it stays where it is.

    Reward: 1 for the delivery, 0 for all else.

    The episode is terminated by the delivery, or when the battery is empty, after `battery` moves: both are part of the
    task, and the robot sees them coming. That somebody stops watching after so many steps would not be part of it:
    such a limit belongs into the registration, as `max_episode_steps`, which truncates.

    Args:
        battery: moves until it is empty.
        render_mode: "rgb_array", what `render` returns and videos show, or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012

    def __init__(self, battery: int = 50, render_mode: str | None = None) -> None:
        self.battery, self.render_mode = battery, render_mode
        self.observation_space = Dict(
            {
                # uint8 with channels last: an image, which goes through a convolutional network as bytes
                "camera": Box(0, 255, (CELLS * PIXELS, CELLS * PIXELS, 3), np.uint8),
                "status": Box(0.0, 1.0, (2,), np.float32),
            }
        )
        self.action_space = Discrete(len(MOVES))
        self.robot, self.parcel = (0, 0), (0, 0)
        self.carrying, self.moves = False, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)  # makes self.np_random, from which all chance must come: runs are repeatable then
        free = [(row, column) for row in range(CELLS) for column in range(CELLS) if (row, column) != GATE]
        robot, parcel = self.np_random.choice(len(free), 2, replace=False)
        self.robot, self.parcel = free[robot], free[parcel]
        self.carrying, self.moves = False, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        down, right = MOVES[int(action)]
        row, column = self.robot
        self.robot = (min(max(row + down, 0), CELLS - 1), min(max(column + right, 0), CELLS - 1))
        self.moves += 1
        self.carrying = self.carrying or self.robot == self.parcel
        delivered = self.carrying and self.robot == GATE
        terminated = delivered or self.moves >= self.battery
        truncated = False  # the TimeLimit that `max_episode_steps` brings says when
        return self._observe(), float(delivered), terminated, truncated, {"delivered": delivered}

    def render(self) -> np.ndarray:
        """The camera's image, eight times as large."""
        return self._photograph().repeat(8, 0).repeat(8, 1)

    @property
    def distance(self) -> int:
        """Moves that are left for a robot that does not err."""
        if self.carrying:
            return _between(self.robot, GATE)
        return _between(self.robot, self.parcel) + _between(self.parcel, GATE)

    def _observe(self) -> dict[str, np.ndarray]:
        status = np.array([self.carrying, 1.0 - self.moves / self.battery], np.float32)
        return {"camera": self._photograph(), "status": status}

    def _photograph(self) -> np.ndarray:
        image = np.empty((CELLS * PIXELS, CELLS * PIXELS, 3), np.uint8)
        image[:] = FLOOR
        image[_block(GATE)] = GATEWAY
        image[_block(self.robot)] = ROBOT
        if self.carrying:
            image[_block(self.robot, margin=2)] = PARCEL
        else:
            image[_block(self.parcel)] = PARCEL
        return image


def _between(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _block(cell: tuple[int, int], margin: int = 0) -> tuple[slice, slice]:
    """The pixels of a cell, without a frame of `margin` pixels."""
    row, column = (PIXELS * place for place in cell)
    return slice(row + margin, row + PIXELS - margin), slice(column + margin, column + PIXELS - margin)
