"""Isaac Lab 3 (Mittal et al. 2025, arXiv:2511.04831): robots on the GPU. `isaaclab/Isaac-Cartpole`.

Its environments take and return tensors, of all copies at once, and reset in the step that ends an episode. They are
run without Isaac Sim's Kit, whose processes end in their own way: by Newton, which most tasks choose by themselves.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import isaaclab_tasks  # noqa: F401  (which registers its tasks)
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from isaaclab.app import launch_simulation
from isaaclab.app.sim_launcher import validate_launch
from isaaclab_tasks.utils.parse_cfg import parse_env_cfg
from torch import Tensor

from fabricrl.envs.simulators import unknown
from fabricrl.utils.errors import ConfigError


class IsaacLabEnvs(VectorEnv):
    """An environment of Isaac Lab, with the observations of its group "policy".

    An episode that ran out of time is bootstrapped from its last observation where the environment computes it
    (`compute_final_obs`, which `make` sets), else from the one before, as rsl_rl does. Where the task says that its
    horizon is finite (`is_finite_horizon`), the end of time is an end like others.
    """

    metadata: dict[str, Any] = {"tensors": True, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, env: Any, runtime: ExitStack | None = None) -> None:
        self.env, self._runtime, inner = env, runtime, env.unwrapped
        self.num_envs, self._is_finite = inner.num_envs, inner.cfg.is_finite_horizon
        self.single_observation_space = inner.single_observation_space["policy"]
        self.single_action_space = inner.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._obs = torch.empty(0)  # the last that was returned

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        obs, _ = self.env.reset(seed=None if seed is None else seed % 2**31, options=options)
        self._obs = obs["policy"].clone()  # Isaac Lab may write the next ones into the same memory
        return self._obs, {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        obs, rewards, terminated, truncated, extras = self.env.step(actions)
        ended, seen = (terminated | truncated)[:, None], obs["policy"].clone()
        last = extras["final_obs"]["policy"] if "final_obs" in extras else self._obs  # theirs stays until the next end
        infos = {"final_obs": torch.where(ended, last, seen)}
        if self._is_finite:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        self._obs = seen
        return seen, rewards, terminated.clone(), truncated.clone(), infos

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()
        if self._runtime is not None:
            self._runtime.close()


def make(task: str, num_envs: int, device: str = "cpu", overrides: Sequence[str] = ()) -> IsaacLabEnvs:
    """Makes a task.

    Args:
        overrides: of its configuration, as on Isaac Lab's command line: "physics=newton_mjwarp", "env.sim.dt=0.005".

    Raises:
        ConfigError: there is no such task, or it needs Isaac Sim's Kit.
    """
    if task not in gym.registry:
        raise unknown(f"isaaclab/{task}", gym.registry)
    cfg = parse_env_cfg(task, device=device, num_envs=num_envs, overrides=list(overrides))
    cfg.compute_final_obs = True
    launcher = {"headless": True, "visualizer": ["none"]}
    _, needing_kit = validate_launch(cfg, dict(launcher))
    if needing_kit:
        raise ConfigError(
            f"--env-id isaaclab/{task} needs Isaac Sim's Kit for {', '.join(needing_kit)}, which is not supported: "
            """give --env-kwargs '{"overrides": ["physics=newton_mjwarp"]}'"""
        )
    with ExitStack() as runtime:
        runtime.enter_context(launch_simulation(cfg, launcher))
        return IsaacLabEnvs(gym.make(task, cfg=cfg), runtime.pop_all())
