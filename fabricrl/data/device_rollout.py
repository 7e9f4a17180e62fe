"""Rollouts that stay on the device where environments are stepped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.rollout import RolloutBuffer
from fabricrl.utils.errors import EnvError, NonFiniteError


@contextmanager
def nan_before_failure(rb: Any) -> Iterator[None]:
    """Raises NonFiniteError if an environment fails inside, and NaN or infinity has come from one before: that is why.

    Args:
        rb: what environments return, with `is_finite` and `find_nonfinite`.
    """
    try:
        yield
    except EnvError:
        if not rb.is_finite():
            raise NonFiniteError(rb.find_nonfinite()) from None
        raise


class DeviceRolloutBuffer(RolloutBuffer):
    """T steps of N environments that take and return tensors, on their device.

    Nothing in it asks a tensor for its value while steps are taken: so a rollout is one program, or one graph. Which
    step it is comes as a tensor, too, one of `steps`.

    Args:
        skips: environments may have steps that only reset; the final observation of an episode is the next one, then.
        num_keys: K, numbers that environments tell at the ends of episodes.

    Attributes:
        steps: T tensors [1], the numbers of the steps.
        final_obs: [T, N, D], the last observation of each episode that ended with a step; others are not looked at.
        episode_infos: [T, N, K], what was told at the ends of episodes; NaN: nothing.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        obs_space: Box,
        num_actions: int,
        action_dtype: torch.dtype,
        skips: bool,
        num_keys: int,
        device: torch.device,
    ) -> None:
        shape = num_steps, num_envs, obs_space, num_actions, action_dtype
        super().__init__(*shape, skips=skips, place=device)
        self.steps = torch.arange(num_steps, device=device).split(1)
        self.final_obs = self.obs[1:] if skips else torch.zeros_like(self.obs[1:])
        self.episode_infos = torch.full((num_steps, num_envs, num_keys), torch.nan, device=device)
        self._untold = self.episode_infos[0].clone()
        rows, columns = torch.arange(num_steps, device=device), torch.arange(num_envs, device=device)
        self._pairs = rows.repeat_interleave(num_envs), columns.repeat(num_steps)

    def start(self, obs: Tensor | None = None, masks: None = None) -> None:  # type: ignore[override]
        """Starts a rollout at `obs` [N, D], or where the last one ended."""
        self.obs[0] = self.obs[-1] if obs is None else obs

    def running(self) -> dict[str, Tensor]:
        """Returns what a run goes on from: the last observations [N, D]."""
        return {"obs": self.obs[-1]}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Ends where another rollout did, which the next begins with: `running` has told."""
        for name, row in self.running().items():
            row.copy_(state[name])

    def stacked_obs(self, t: Tensor, device: torch.device | None = None) -> Tensor:  # type: ignore[override]
        """The observations of step t, [N, D], where they are."""
        return self.obs.index_select(0, t)[0]

    def add(  # type: ignore[override]
        self,
        t: Tensor,
        actions: Tensor,
        next_obs: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        infos: dict[str, Any],
    ) -> None:
        """Stores step t: `actions` [N, A] as they were drawn, and what `envs.step` returned."""
        self.obs.index_copy_(0, t + 1, next_obs[None])
        columns = [(self.actions, actions), (self.rewards, rewards), (self.ends, terminated | truncated)]
        columns += [(self.terminated, terminated), (self.truncated, truncated)]
        if "skipped" in infos:
            columns.append((self.skipped, infos["skipped"]))
        else:
            columns.append((self.final_obs, infos["final_obs"]))
        columns.append((self.episode_infos, infos.get("episode_info", self._untold)))
        for column, values in columns:
            column.index_copy_(0, t, values[None])

    @property
    def has_truncated(self) -> bool:
        """True: there may be some, and to find out would wait for the device."""
        return True

    @property
    def bootstraps(self) -> Tensor:  # type: ignore[override]
        """[T N], 1 where an episode was truncated and not terminated."""
        return (self.truncated & ~self.terminated).flatten().float()

    def truncated_episodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """All steps, of which `bootstraps` tells those that count: t [T N], env [T N], final observations [T N, D].

        These are 0 where they do not count: NaN would stay NaN whatever its weight.
        """
        return *self._pairs, torch.where((self.bootstraps > 0)[:, None], self.final_obs.flatten(0, 1), 0.0)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Checks nothing, since `Run.record_rollout` does, unless an environment fails inside."""
        with nan_before_failure(self):
            yield

    def is_finite(self) -> Tensor:
        """True if environments have brought no NaN and no infinity in this rollout, as a tensor."""
        *_, final_obs = self.truncated_episodes()
        return (self.obs.sum(dtype=torch.float64) + self.rewards.sum() + final_obs.sum(dtype=torch.float64)).isfinite()

    def find_nonfinite(self) -> str:
        """Finds the first NaN or infinity from an environment, in words, once `is_finite` has denied that all is."""
        parts = {"reward": self.rewards[..., None], "observation": self.obs[1:]}
        bad = [(values.isfinite().all(-1).logical_not().nonzero(), name) for name, values in parts.items()]
        first = sorted((rows[0].tolist(), name) for rows, name in bad if len(rows))
        if not first:
            return "a final observation is not finite"
        (step, env), name = first[0]
        return f"{name} of environment {env} is not finite after step {step} of the rollout"


class DeviceRecurrentRolloutBuffer(DeviceRolloutBuffer):
    """A `DeviceRolloutBuffer` of a recurrent policy: with each observation it stores the memory *before* it.

    Args:
        memory_size: M; everything else is as in a `DeviceRolloutBuffer`.

    Attributes:
        memory: [T + 1, N, M], zero at the first observation of an episode.
    """

    def __init__(self, *shape: Any, memory_size: int, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        self.memory = self.obs.new_zeros(*self.obs.shape[:2], memory_size)
        self._after = torch.zeros_like(self.memory[1:])  # each step, whether an episode has ended or not

    def start(self, obs: Tensor | None = None, masks: None = None) -> None:  # type: ignore[override]
        """Starts a rollout; clears memory if `obs` are first observations, keeps it where the last rollout ended."""
        super().start(obs, masks)
        self.memory[0] = self.memory[-1] if obs is None else 0.0

    def running(self) -> dict[str, Tensor]:
        """Returns what a run goes on from: the last observations [N, D] and the memory there [N, M]."""
        return super().running() | {"memory": self.memory[-1]}

    def memory_at(self, t: Tensor) -> Tensor:
        """The memory before step t, [N, M]."""
        return self.memory.index_select(0, t)[0]

    def rewards_at(self, t: Tensor) -> Tensor:
        """The rewards of step t, [N]."""
        return self.rewards.index_select(0, t)[0]

    def remember(self, t: Tensor, memory: Tensor) -> None:
        """Stores the memory [N, M] after step t, cleared where an episode ended; call `add` before."""
        ended = self.ends.index_select(0, t) | self.skipped.index_select(0, t)  # [1, N]
        self._after.index_copy_(0, t, memory[None])
        self.memory.index_copy_(0, t + 1, memory[None].masked_fill(ended[..., None], 0.0))

    def final_memory(self) -> Tensor:
        """Memory at the final observations of `truncated_episodes`, [T N, M]."""
        return self._after.flatten(0, 1)
