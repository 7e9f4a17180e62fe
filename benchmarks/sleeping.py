"""CartPole whose steps take longer: as in a simulator of its own, the time passes without a core of ours."""

import time
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class Sleeping(CartPoleEnv):
    """CartPole that sleeps for `milliseconds` in each step."""

    def __init__(self, milliseconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = milliseconds / 1000

    def step(self, action: Any) -> Any:
        time.sleep(self.seconds)
        return super().step(action)


gym.register("Sleeping-v0", entry_point="sleeping:Sleeping", max_episode_steps=500)
