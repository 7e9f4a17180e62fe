"""Small tasks whose observations are images, registered when this is imported: `tests.pixel_envs:Catch-v0`.

Steps take microseconds, and what the best policy earns is known, so that they tell whether an algorithm learns from
images (Catch) and remembers what it has seen in one (MaskedCatch).
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

CELLS, PIXELS = 9, 4  # a side of the image, in cells; a side of a cell
SIDE = CELLS * PIXELS


class Catch(gym.Env):
    """A ball falls, and a paddle is to be below it at the end: +1 if it is, −1 if not, and nothing before.

    Both are blocks of 4 × 4 pixels, 255 on 0, in an image [36, 36, 1]. The ball starts in any of 9 columns of the top
    row and falls by a row in each of 8 steps, after which the episode is terminated; the paddle starts in one of the
    three columns in the middle and is moved by action 0 to the left, by 2 to the right, by 1 not at all. It never has
    to go more than 5 columns, so that the best return is 1. Whoever stands still earns 1/9 − 8/9 = −7/9.

    Args:
        masked: the ball is seen in the first image alone, and the paddle does not move in the step that follows it.
            The best return is still 1, for who remembers the column. Whoever acts on the present image alone earns
            −7/9 in expectation, however it was trained: what it does at the first image has no effect, and from then
            on it sees nothing but the paddle, whose way is therefore drawn independently of the ball's column. Where
            it ends, the ball is with probability 1/9. Seeing a few images at once helps no more, unless one of them
            is the first.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012

    def __init__(self, masked: bool = False, render_mode: str | None = None) -> None:
        self.masked, self.render_mode = masked, render_mode
        self.observation_space = Box(0, 255, (SIDE, SIDE, 1), np.uint8)
        self.action_space = Discrete(3)
        self.row, self.column, self.paddle = 0, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(CELLS))
        self.paddle = CELLS // 2 - 1 + int(self.np_random.integers(3))
        return self._draw(ball=True), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not (self.masked and self.row == 0):
            self.paddle = min(max(self.paddle + int(action) - 1, 0), CELLS - 1)
        self.row += 1
        done = self.row == CELLS - 1
        reward = (1.0 if self.paddle == self.column else -1.0) if done else 0.0
        return self._draw(ball=not self.masked), reward, done, False, {}

    def render(self) -> np.ndarray:
        return self._draw(ball=True).repeat(3, 2)

    def _draw(self, ball: bool) -> np.ndarray:
        image = np.zeros((SIDE, SIDE, 1), np.uint8)
        x = PIXELS * self.paddle
        image[-PIXELS:, x : x + PIXELS] = 255
        if ball:
            y, x = PIXELS * self.row, PIXELS * self.column
            image[y : y + PIXELS, x : x + PIXELS] = 255
        return image


gym.register("Catch-v0", entry_point=Catch)
gym.register("MaskedCatch-v0", entry_point=Catch, kwargs={"masked": True})
