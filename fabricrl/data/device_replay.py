"""A replay buffer on the device that learns from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.replay import ReplayBuffer, look_ahead
from fabricrl.data.transitions import columns_of, layout, merge_shards, places, record_type, why_it_differs
from fabricrl.utils.batch import Batch
from fabricrl.utils.device import Passed, pinned
from fabricrl.utils.errors import CheckpointError, require

MANY = 2**62  # a draw below that, modulo a size, is uniform but for one part in 10^12 of a buffer of a million


class DeviceReplayBuffer:
    """A `ReplayBuffer` whose records lie on a device, and are sampled there.

    It stores the same records in the same places, and its state in a checkpoint is the same. The CPU has the newest
    step alone, whose record goes to the device in one copy. How many steps have been stored is a tensor, too: a CUDA
    graph that samples keeps up with a ring that fills.

    Args:
        device: where the records lie; everything else is as in a `ReplayBuffer`.

    Attributes:
        size: transitions of each environment that can be sampled.

    Raises:
        ConfigError: the capacity holds less than a row.
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
        self.capacity, self.num_envs = capacity // num_envs, num_envs
        self.gamma, self.n_step, self.device = gamma, n_step, device
        require(self.capacity > 0, "buffer_size", capacity, f"at least num-envs = {num_envs}")
        self._record = record_type(obs_space, num_actions, False)
        self._rows = self.capacity + 1
        self.num_bytes = self._rows * num_envs * self._record.itemsize
        self._words = torch.zeros(self._rows * num_envs, self._record.itemsize // 4, dtype=torch.int32, device=device)
        self._places = places(self._record)
        self._columns = columns_of(self._words, self._places)  # [rows N, ...] views
        self._newest = ReplayBuffer(
            num_envs, num_envs, obs_space, num_actions
        )  # one row, and what the next begins with
        self._leaving = None  # a step on its way to the device
        if pinned(device):
            self._leaving = torch.empty(num_envs, self._words.shape[1], dtype=self._words.dtype, pin_memory=True)
            self._has_left = Passed(device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)  # stored so far; says what is filled
        self.position = self.size = 0

    def start(self, obs: np.ndarray) -> None:
        """Goes on from `obs` [N, *obs_shape], the answer of a reset: at the beginning, and after a resume."""
        if self.size:  # the step before did not lead here
            self._columns["ended"][self._row(self.position - 1)] = True
        self._newest.start(obs)

    def add(self, *step: Any, **infos: Any) -> None:
        """Stores a step, as `ReplayBuffer.add` takes it."""
        row = self._newest.position
        self._newest.add(*step, **infos)
        records = self._newest.records(row)
        if self._leaving is not None:
            self._has_left.wait()  # what left with the step before
            records = self._leaving.copy_(records)
        self._words[self._row(self.position)].copy_(records, non_blocking=True)
        if self._leaving is not None:
            self._has_left.mark()
        self.position, self.size = (self.position + 1) % self._rows, min(self.size + 1, self.capacity)
        self._count_steps()

    def sample(self, num_batches: int, batch_size: int, rng: torch.Generator) -> Batch:
        """Draws batches, [K, B, ...] each, as `ReplayBuffer.sample` does, with a generator of the device.

        Nothing in it depends on the buffer but through tensors, so that it can be captured.
        """
        index = self._draw(num_batches * batch_size, rng)
        first = last = columns_of(self._words.index_select(0, index), self._places)
        rewards, discounts = first["rewards"], torch.full_like(first["rewards"], self.gamma)
        if self.n_step > 1:
            newest = self._newest_row(index)
            index, rewards, discounts = look_ahead(index, self._columns, newest, self.num_envs, self.gamma, self.n_step)
            last = columns_of(self._words.index_select(0, index), self._places)
        batch = {"obs": first["obs"], "actions": first["actions"], "rewards": rewards, "next_obs": last["next_obs"]}
        batch |= {"terminated": last["terminated"].float(), "discounts": discounts}
        return Batch(
            **{name: column.view(num_batches, batch_size, *column.shape[1:]) for name, column in batch.items()}
        )

    def _draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Places of transitions that are drawn, [count]."""
        steps, envs = self._steps, self.num_envs
        index = torch.randint(MANY, (count,), generator=rng, device=self.device)
        index %= steps.clamp(1, self.capacity) * envs
        return index + envs * (index >= steps % self._rows * envs)  # all rows but the one that is yet to be

    def _newest_row(self, index: Tensor) -> Tensor:
        """The newest row of the environments of these transitions."""
        return (self._steps - 1) % self._rows

    def newest_obs(self) -> Tensor:
        """Observations that the next step starts from, [N, *obs_shape], on the CPU; a view."""
        return self._newest.newest_obs()

    def newest_vectors(self) -> Tensor:
        """The same, as such a buffer holds vectors alone."""
        return self.newest_obs()

    def stacked_obs(self) -> Tensor:
        """The same, as the policy sees them."""
        return self.newest_obs()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raises NonFiniteError if the step inside has brought NaN or infinity."""
        yield
        self._newest.check_finite()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as `ReplayBuffer.state_dict` returns it: a copy."""
        used = self._rows if self.size == self.capacity else self.position + 1
        words = self._words[: used * self.num_envs].to("cpu", copy=True)
        columns_of(words, self._places)["obs"][self._row(self.position)] = self.newest_obs()
        state = {"records": words.view(torch.uint8).view(-1), "position": self.position, "size": self.size}
        return state | {"layout": self._layout(self.num_envs)} | self._newest.kept_apart()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError unless the buffer was of this capacity, for as many environments, of this layout."""
        self._check(state, self.num_envs)
        self._words.view(torch.uint8).view(-1)[: len(state["records"])] = state["records"].to(self.device)
        self.position, self.size = state["position"], state["size"]
        self._count_steps()

    def load_shards(self, shards: Sequence[Mapping[str, Any]], first: int, total: int) -> None:
        """Takes its environments out of the buffers of others, as `ReplayBuffer.load_shards` does.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        width = total // len(shards)  # environments of a shard
        for shard in shards:
            self._check(shard, width, shards[0]["position"])
        merged = merge_shards(shards, self._record, slice(first, first + self.num_envs), width)
        self.load_state_dict(merged | {"layout": self._layout(self.num_envs)})

    def clear(self) -> None:
        """Forgets all transitions."""
        self.position = self.size = 0
        self._count_steps()

    def _row(self, position: int) -> slice:
        """Positions of a step's records."""
        first = position % self._rows * self.num_envs
        return slice(first, first + self.num_envs)

    def _count_steps(self) -> None:
        """Tells the device how many steps there are; more than `capacity` + 1 look like that many or more."""
        self._steps.fill_(self.position + (self._rows if self.size == self.capacity else 0))

    def _layout(self, num_envs: int) -> str:
        return layout(self.capacity, num_envs, self._record)

    def _check(self, state: Mapping[str, Any], num_envs: int, position: int | None = None) -> None:
        own = self._layout(num_envs)
        if state["layout"] != own or position not in (None, state["position"]):
            raise CheckpointError(why_it_differs(state["layout"], own, self.num_envs))
