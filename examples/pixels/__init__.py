"""Pendulum-v1 from pixels: the same task, of which an agent sees drawings alone.

    python fabricrl/algos/sac/sac.py --env-id examples.pixels:PixelPendulum-v0 --frame-stack 3 --action-repeat 4 ...

docs/algorithms/sac.md has a whole command. A drawing is a few lines of NumPy, 84 × 84 in grey, and takes 80 µs.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box

SIDE = 84  # pixels
LENGTH, WIDTH = 36.0, 3.0  # of the rod, in pixels; half of its width
ACROSS, DOWN = np.meshgrid(np.arange(SIDE, dtype=np.float32) - SIDE / 2 + 0.5, np.arange(SIDE) - SIDE / 2 + 0.5)


class PixelPendulum(PendulumEnv):
    """A rod that swings about the middle of the image, [84, 84, 1], white on black; up is up.

    One image tells the angle, not the speed: that takes two, see `--frame-stack`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode
        self.observation_space = Box(0, 255, (SIDE, SIDE, 1), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        return draw(self.state[0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, reward, terminated, truncated, infos = super().step(action)
        return draw(self.state[0]), float(reward), terminated, truncated, infos

    def render(self) -> np.ndarray:
        return draw(self.state[0]).repeat(3, 2)


def draw(theta: float) -> np.ndarray:
    """The rod at an angle in radians, 0 upright, counter-clockwise: uint8 [84, 84, 1]."""
    x, y = -np.float32(np.sin(theta)), -np.float32(np.cos(theta))  # of its end, in its lengths
    along = np.clip(ACROSS * x + DOWN * y, 0, LENGTH)
    distance = np.hypot(ACROSS - along * x, DOWN - along * y)  # of each pixel from the rod
    return (255 * np.clip(WIDTH + 0.5 - distance, 0, 1)).astype(np.uint8)[..., None]  # smooth at its edge


gym.register("PixelPendulum-v0", entry_point=PixelPendulum, max_episode_steps=200)
