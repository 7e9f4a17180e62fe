"""Preallocated storage for what environments return."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class RolloutBuffer:
    """T steps of N environments, on the CPU, for on-policy algorithms.

    Row t holds the observation of step t, the action drawn for it, and what the environment answered. Row T of `obs`
    is the observation that the next rollout starts from. Everything is written through NumPy views of the tensors: a
    step makes no tensor.

    Attributes:
        obs: [T + 1, N, *obs_shape]; actions: [T, N, A]; rewards: [T, N], as the environment gave them;
        terminated, truncated, dones: [T, N], bool.
    """

    def __init__(
        self, num_steps: int, num_envs: int, obs_shape: tuple[int, ...], num_actions: int, action_dtype: torch.dtype
    ) -> None:
        self.obs = torch.zeros(num_steps + 1, num_envs, *obs_shape)
        self.actions = torch.zeros(num_steps, num_envs, num_actions, dtype=action_dtype)
        self.rewards = torch.zeros(num_steps, num_envs)
        self.terminated = torch.zeros(num_steps, num_envs, dtype=torch.bool)
        self.truncated = torch.zeros(num_steps, num_envs, dtype=torch.bool)
        self.obs_rows = self.obs.unbind()  # T + 1 views [N, *obs_shape], made once
        self._obs, self._actions = self.obs.numpy(), self.actions.numpy()
        self._rewards = self.rewards.numpy()
        self._terminated, self._truncated = self.terminated.numpy(), self.truncated.numpy()
        self._final: list[tuple[int, int, np.ndarray]] = []

    def start(self, obs: np.ndarray | None = None) -> None:
        """Begins a rollout at `obs` [N, *obs_shape], or where the last one ended."""
        self._obs[0] = self._obs[-1] if obs is None else obs
        self._final.clear()

    def add(
        self,
        t: int,
        actions: np.ndarray,
        next_obs: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> None:
        """Stores step t: `actions` [N, A] as they were drawn, and what `envs.step` returned under SAME_STEP."""
        self._actions[t] = actions
        self._obs[t + 1] = next_obs  # crucial: the first observation of the next episode, not the final one
        self._rewards[t] = rewards
        self._terminated[t] = terminated
        self._truncated[t] = truncated
        if truncated.any():
            for env in np.flatnonzero(truncated & ~terminated):
                self._final.append((t, int(env), np.array(infos["final_obs"][env], dtype=np.float32)))

    @property
    def dones(self) -> Tensor:
        return self.terminated | self.truncated

    def time_limits(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Truncated and not terminated episodes: t [E], env [E] and final observations [E, *obs_shape]; None: none."""
        if not self._final:
            return None
        steps, envs, obs = zip(*self._final, strict=True)
        return torch.tensor(steps), torch.tensor(envs), torch.from_numpy(np.stack(obs))

    def first_bad(self) -> str | None:
        """Where NaN or infinity came from the environment first, in words; None if nowhere."""
        if self.obs.sum().isfinite() and self.rewards.sum().isfinite() and not self._final:
            return None  # a finite sum has finite terms: one cheap test instead of the masks below
        for name, values in (("reward", self.rewards[..., None]), ("observation", self.obs[1:].flatten(2))):
            bad = (~values.isfinite().all(-1)).nonzero()
            if len(bad):
                step, env = bad[0].tolist()
                return f"{name} of environment {env} is not finite after step {step} of the rollout"
        for step, env, final_obs in self._final:
            if not np.isfinite(final_obs).all():
                return f"final observation of environment {env} is not finite after step {step} of the rollout"
        return None if self.obs[0].isfinite().all() else "first observation is not finite"
