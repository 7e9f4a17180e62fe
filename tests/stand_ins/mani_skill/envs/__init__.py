"""Stands for ManiSkill 3.0: an environment is a batch, and is reset by the numbers of its environments."""

from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector.utils import batch_space

from tests.counting import ACTIONS, OBSERVATIONS, Counting


class Count(gym.Env):
    def __init__(self, num_envs: int = 1, obs_mode: str = "none", sim_backend: str = "auto") -> None:
        assert (obs_mode, sim_backend) in (("state", "physx_cpu"), ("state", "physx_cuda:0"))
        self.task, self.num_envs, self.device = Counting(num_envs), num_envs, torch.device("cpu")
        self.single_observation_space, self.single_action_space = OBSERVATIONS, ACTIONS
        self.observation_space, self.action_space = batch_space(OBSERVATIONS, num_envs), batch_space(ACTIONS, num_envs)

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        chosen = (options or {}).get("env_idx")
        if chosen is not None:
            self.task.begin(chosen)
        return self.task.observe(), {"reconfigure": False}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        rewards, terminated, truncated = self.task.step(action)
        infos = {"elapsed_steps": self.task.counts.clone(), "success": terminated.clone()}
        return self.task.observe(), rewards, terminated, truncated, infos


gym.register("Count-v1", entry_point=Count, disable_env_checker=True)
