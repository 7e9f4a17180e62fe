"""Environments that this process steps one after the other: `--vectorization sync`."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class SequentialVectorEnv(SyncVectorEnv):
    """Environments with observations [R] that reset in the step that ends an episode (SAME_STEP).

    Steps as Gymnasium's class does, of which a small environment takes less time than what is around it: for all kinds
    of spaces and resets, it makes copies and puts observations together from a list.

    Observations are written where the last ones were: whoever keeps them copies them before the next step.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env]]) -> None:
        super().__init__(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> tuple:
        rewards = np.empty(self.num_envs)
        terminated, truncated = np.empty((2, self.num_envs), dtype=np.bool_)
        infos: dict[str, Any] = {}
        for index, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            obs, rewards[index], terminates, truncates, info = env.step(action)
            terminated[index], truncated[index] = terminates, truncates
            if terminates or truncates:
                infos = self._add_info(infos, {"final_obs": obs, "final_info": info}, index)
                obs, info = env.reset()
            self._observations[index] = obs
            if info:
                infos = self._add_info(infos, info, index)
        return self._observations, rewards, terminated, truncated, infos
