"""Stands for ManiSkill's vector environments: infos have last observations only where some episode ends."""

from typing import Any

import gymnasium as gym
import torch


class ManiSkillVectorEnv(gym.vector.VectorEnv):
    def __init__(self, env: gym.Env, ignore_terminations: bool = False) -> None:
        self._env, self.ignores, self.num_envs = env, ignore_terminations, env.unwrapped.num_envs
        for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
            setattr(self, name, getattr(env.unwrapped, name))

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self._env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, rewards, terminated, truncated, infos = self._env.step(actions)
        if self.ignores:
            terminated[:] = False
        ended = terminated | truncated
        if ended.any():
            last = {"final_observation": obs, "final_info": infos, "_final_info": ended, "_final_observation": ended}
            obs, infos = self.reset(options={"env_idx": torch.arange(self.num_envs)[ended]})
            infos |= last
        return obs, rewards, terminated, truncated, infos
