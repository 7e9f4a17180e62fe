"""ManiSkill 3 (Tao et al. 2024, arXiv:2410.00425): manipulation on the GPU, in SAPIEN. `maniskill/PickCube-v1`.

Its vector environments reset in the step that ends an episode, and tell the last observation in "final_observation", of
Gymnasium 0.29, and only in steps in which an episode ends.
"""

from typing import Any

import gymnasium as gym
import mani_skill.envs  # noqa: F401  (which registers its tasks)
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv
from torch import Tensor

from fabricrl.envs.simulators import unknown
from fabricrl.utils.errors import ConfigError


class ManiSkillEnvs(VectorEnv):
    """A `ManiSkillVectorEnv` by the names that Gymnasium has now; whether a task succeeded is `is_success`."""

    metadata: dict[str, Any] = {"tensors": True, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, envs: Any) -> None:
        self.envs, self.num_envs = envs, envs.num_envs
        self.single_observation_space, self.observation_space = envs.single_observation_space, envs.observation_space
        self.single_action_space, self.action_space = envs.single_action_space, envs.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        obs, _ = self.envs.reset(seed=None if seed is None else seed % 2**31, options=options)
        return obs, {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        obs, rewards, terminated, truncated, infos = self.envs.step(actions)
        told = infos.get("final_info", infos)
        given = {"final_obs": infos.get("final_observation", obs)}
        given |= {name: told[name] for name in told if isinstance(told[name], Tensor)}
        if "success" in told:
            given["is_success"] = told["success"]
        return obs, rewards, terminated, truncated, given

    def close_extras(self, **kwargs: Any) -> None:
        self.envs.close()


def make(
    task: str, num_envs: int, device: str = "cpu", ignore_terminations: bool = False, **kwargs: Any
) -> ManiSkillEnvs:
    """Makes a task with observations of its state; `kwargs` are those of `gym.make`, such as `control_mode`.

    Args:
        ignore_terminations: whether an episode goes on after success or failure, until its time is up.

    Raises:
        ConfigError: there is no such task, or several environments without a GPU.
    """
    if task not in gym.registry:
        raise unknown(f"maniskill/{task}", gym.registry)
    place = torch.device(device)
    if place.type == "cpu" and num_envs > 1:
        raise ConfigError(
            f"--num-envs is {num_envs}: ManiSkill steps several environments on a GPU alone; give --accelerator cuda, "
            "or --num-envs 1"
        )
    backend = "physx_cpu" if place.type == "cpu" else f"physx_cuda:{place.index or 0}"
    env = gym.make(task, num_envs=num_envs, **{"obs_mode": "state", "sim_backend": backend} | kwargs)
    return ManiSkillEnvs(ManiSkillVectorEnv(env, ignore_terminations=ignore_terminations))
