"""A replay buffer of environments that take and return tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.device_replay import MANY, DeviceReplayBuffer
from fabricrl.data.device_rollout import nan_before_failure
from fabricrl.data.transitions import columns_of

ENDED = 256  # of the word that holds two flags: `terminated` is its first byte, `ended` its second


class TensorReplayBuffer(DeviceReplayBuffer):
    """A `DeviceReplayBuffer` whose steps are tensors on its device: nothing in `add` asks one for its value.

    Each environment has a ring of its own, and steps that only reset take no room in it. As long as there are none, the
    records stand where a `ReplayBuffer` has them, and so does the state in a checkpoint.

    Args:
        as of a `DeviceReplayBuffer`.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_space: Box,
        num_actions: int,
        gamma: float,
        n_step: int,
        device: torch.device,
    ) -> None:
        super().__init__(capacity, num_envs, obs_space, num_actions, gamma, n_step, device)
        self._envs = torch.arange(num_envs, device=device)
        self._steps = torch.zeros_like(self._envs)  # that each environment has stored so far
        self._obs = torch.zeros(num_envs, *obs_space.shape, device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)  # 0, or NaN for good
        self._skips = False

    def start(self, obs: Tensor | None) -> None:  # type: ignore[override]
        """Goes on from `obs` [N, D], which a reset returned; None: from where the newest step has led to."""
        if obs is not None:
            self._columns["ended"][self._places_of(self._steps - 1)] = self._steps > 0
            self._obs.copy_(obs)

    def running(self) -> dict[str, Tensor]:
        """Returns what a run goes on from: observations [N, D], to which the newest step has led."""
        return {"obs": self._obs}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where another buffer was, as its `running` has told."""
        self._obs.copy_(state["obs"])

    def add(  # type: ignore[override]
        self,
        actions: Tensor,
        next_obs: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        infos: dict[str, Any],
    ) -> None:
        """Stores a step: `actions` [N, A] as the policy gave them, and what `envs.step` returned."""
        ended = terminated | truncated
        final_obs = torch.where(ended[:, None], infos["final_obs"], next_obs)
        flags = (terminated + ENDED * ended).int()[:, None]
        floats = self._obs, actions, rewards[:, None], flags, final_obs
        record = torch.cat([column.view(torch.int32) for column in floats], 1)  # as `record_type` lays them out
        self._words.index_copy_(0, self._places_of(self._steps), record)
        self._skips |= "skipped" in infos
        self._steps += ~infos["skipped"] if "skipped" in infos else 1
        self._obs.copy_(next_obs)
        for values in (next_obs, rewards, final_obs):
            self._total += 0.0 * values.sum(dtype=torch.float64)

    def _places_of(self, steps: Tensor) -> Tensor:
        """Places [N] of the records of step number `steps` [N] in each environment, from 0."""
        return steps % self._rows * self.num_envs + self._envs

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Places of transitions that are drawn, [count], from environments that may have different numbers of them."""
        sizes = self._steps.clamp(max=self.capacity)  # [N]
        lasts = sizes.cumsum(0)
        number = torch.randint(MANY, (count,), generator=rng, device=self.device) % lasts[-1].clamp(min=1)
        env = torch.searchsorted(lasts, number, right=True).clamp(max=self.num_envs - 1)
        step = self._steps[env] - (lasts[env] - number)  # the newest of an environment is the last
        return step % self._rows * self.num_envs + env

    def _newest_row(self, index: Tensor) -> Tensor:
        return ((self._steps - 1) % self._rows)[index % self.num_envs]

    def newest_obs(self) -> Tensor:
        """Observations that the next step starts from, [N, D]."""
        return self._obs

    def tensors(self) -> list[Tensor]:
        """All that a step changes, but for the records: those that do not count are never looked at."""
        return [self._steps, self._obs, self._total]

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Checks nothing, since `Run.record_step` does, unless an environment fails inside."""
        with nan_before_failure(self):
            yield

    def is_finite(self) -> Tensor:
        """True if environments have brought no NaN and no infinity, as a tensor."""
        return self._total.isfinite()

    def find_nonfinite(self) -> str:
        """Finds the oldest NaN or infinity from an environment, in words, once `is_finite` has denied that all is."""
        found = []
        for field, name in (("rewards", "reward"), ("next_obs", "observation")):
            values = self._columns[field].reshape(self._rows * self.num_envs, -1)
            (places,) = values.isfinite().all(1).logical_not().nonzero(as_tuple=True)
            envs = places % self.num_envs
            ages = (self._steps[envs] - 1 - places // self.num_envs) % self._rows
            found += [(-age, name, env) for age, env in zip(ages.tolist(), envs.tolist(), strict=True)]
        if not found:
            return "an observation after a reset is not finite"
        _, name, env = min(found)
        return f"{name} of environment {env} is not finite"

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: a copy. Where steps have been left out, each environment tells how many it has."""
        most = int(self._steps.max())
        self.position, self.size = most % self._rows, min(most, self.capacity)
        if not self._skips:
            return super().state_dict()
        words = self._words.to("cpu", copy=True)
        columns_of(words, self._places)["obs"][self._places_of(self._steps).cpu()] = self._obs.cpu()
        state = {"records": words.view(torch.uint8).view(-1), "position": 0, "size": self.capacity}
        return state | {"layout": self._layout(self.num_envs), "steps": self._steps.cpu()} | self._newest.kept_apart()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError unless the buffer was of this capacity, for as many environments, of this layout."""
        self._skips = "steps" in state
        super().load_state_dict(state)
        if self._skips:
            self._steps.copy_(state["steps"])
        self._obs.copy_(self._columns["obs"][self._places_of(self._steps)])

    def load_shards(self, shards: Sequence[Mapping[str, Any]], first: int, total: int) -> None:
        """Takes its environments out of the buffers of others, as `ReplayBuffer.load_shards` does.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        self._skips = "steps" in shards[0]
        super().load_shards(shards, first, total)

    def _layout(self, num_envs: int) -> str:
        return super()._layout(num_envs) + " by environment" * self._skips
