"""Stands for Isaac Lab's tasks: a batch of environments in one, with observations in groups and memory used again."""

from typing import Any

import gymnasium as gym
import torch
from gymnasium.spaces import Box, Dict

from tests.counting import ACTIONS, OBSERVATIONS, Counting


class Count(gym.Env):
    alive: list["Count"] = []  # noqa: RUF012

    def __init__(self, cfg: Any) -> None:
        assert not self.alive, "a SimulationContext already exists"
        self.alive.append(self)
        self.cfg, self.num_envs, self.extras = cfg, cfg.scene.num_envs, {}
        self.task = Counting(self.num_envs, cfg.sim.device)
        self.single_observation_space = Dict(policy=OBSERVATIONS, critic=OBSERVATIONS)
        self.single_action_space = Box(-float("inf"), float("inf"), ACTIONS.shape)
        self.obs_buf = {"policy": self.task.observe(), "critic": self.task.observe()}
        self.reset_terminated = torch.zeros(self.num_envs, dtype=torch.bool)
        self.reset_time_outs = torch.zeros_like(self.reset_terminated)

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.obs_buf["policy"].copy_(self.task.observe())
        return self.obs_buf, self.extras

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        rewards, self.reset_terminated[:], self.reset_time_outs[:] = self.task.step(action)
        ended = self.reset_terminated | self.reset_time_outs
        if ended.any():
            if self.cfg.compute_final_obs:
                self.extras["final_obs"] = {"policy": self.task.observe(), "critic": self.task.observe()}
            self.task.begin(ended)
        self.obs_buf["policy"].copy_(self.task.observe())
        return self.obs_buf, rewards, self.reset_terminated, self.reset_time_outs, self.extras

    def close(self) -> None:
        self.alive.remove(self)


gym.register("Isaac-Count", entry_point=Count, disable_env_checker=True)
