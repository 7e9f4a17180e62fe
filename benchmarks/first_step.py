"""An environment whose first step ends the process, so that the process lasts from the command to that step."""

import os
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class FirstStep(CartPoleEnv):
    def step(self, action: Any) -> Any:
        os._exit(0)


gym.register("FirstStep-v0", entry_point="first_step:FirstStep", max_episode_steps=500)
