"""Replay of off-policy algorithms: a ring of transitions, and those newest steps that are on their way to one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.memory import map_file
from fabricrl.data.transitions import columns_of, layout, merge_shards, places, record_type, why_it_differs
from fabricrl.utils.batch import Batch
from fabricrl.utils.errors import CheckpointError, NonFiniteError, require
from fabricrl.utils.records import Records, floats_of


class ReplayBuffer:
    """A ring of the last `capacity` transitions of N environments, on the CPU, for off-policy algorithms.

    One record holds one transition, all its fields side by side, so that sampling reads one place in memory for each:

        obs | actions | rewards | terminated | ended | next_obs

    `next_obs` is the observation that the action led to: at an episode's end the final one, never that of the next.
    `ended` marks the last transition of an episode, terminated or truncated: n-step returns stop there.
    With `implicit_next`, `next_obs` is read from the record that follows, and stored apart only where none follows (at
    an episode's end, or in a resumed run). That halves the memory of large observations and costs a second read.

    Records lie in a ring of rows × N, in which one row more than the capacity holds the observation that the next
    step starts from. Sampling is uniform, with replacement.

    With a frame stack of S, observations are sampled as the last S of them, and yet stored once each: the ring has
    S − 1 further rows, of which the oldest transitions take their older frames. A stack never reaches back beyond its
    episode: the first observation is repeated instead.

    Args:
        capacity: transitions; rounded down to whole rows.
        obs_space: a single environment's Box; uint8 stays uint8, everything else becomes float32.
        num_actions: A, float32.
        gamma: discount γ per step of n-step returns.
        n_step: rewards summed into a transition; fewer where an episode or the ring ends before.
        folder: keep the records in a temporary file there, which vanishes with the process; None: in memory.
        frame_stack: S.

    Attributes:
        size: transitions of each environment that can be sampled.

    Raises:
        ConfigError: the capacity is less than a row, or the file does not fit onto the disk.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_space: Box,
        num_actions: int,
        gamma: float = 0.99,
        n_step: int = 1,
        implicit_next: bool = False,
        folder: Path | None = None,
        frame_stack: int = 1,
    ) -> None:
        self.capacity, self.num_envs, self.frame_stack = capacity // num_envs, num_envs, frame_stack
        self.gamma, self.n_step, self.implicit_next = gamma, n_step, implicit_next
        self._num_floats = obs_space.num_floats if isinstance(obs_space, Records) else None
        require(self.capacity > 0, "buffer_size", capacity, f"at least num-envs = {num_envs}")
        dtype = record_type(obs_space, num_actions, implicit_next)
        self._rows = self.capacity + frame_stack
        self.num_bytes = self._rows * num_envs * dtype.itemsize
        shape = (self._rows, num_envs)
        self._records = np.zeros(shape, dtype) if folder is None else map_file(shape, dtype, folder)
        self._words = torch.from_numpy(self._records.reshape(-1).view(np.int32).reshape(self._rows * num_envs, -1))
        names = dtype.names or ()
        self._columns = {name: self._records[name] for name in names}  # [rows, N, ...] views, made once
        self._flat = {name: torch.from_numpy(self._records.reshape(-1)[name]) for name in names}  # [rows N, ...]
        self._places = places(dtype)
        self._finals = np.zeros((0, *obs_space.shape), dtype["obs"].base)  # next observations kept apart, [F, ...]
        self._free: list[int] = []  # rows of `_finals` that are not in use
        self._ended: list[tuple[int, np.ndarray]] = []  # environments whose episode the newest step ended
        self.position = self.size = 0
        self._reached = 1  # rows written so far, the current one included
        self.clear()

    def start(self, obs: np.ndarray) -> None:
        """Goes on from `obs` [N, *obs_shape], which a reset returned: at the start, and after a resume."""
        if self.size:  # the step before did not lead here
            last = self.position - 1
            if self.implicit_next:
                for env in np.flatnonzero(self._columns["final"][last] < 0):
                    self._keep_apart(last, int(env), self._columns["obs"][self.position, env])
            self._columns["ended"][last] = True
        self._columns["obs"][self.position] = obs

    def add(
        self,
        actions: np.ndarray,
        next_obs: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> None:
        """Stores a step: `actions` [N, A] as the policy gave them, and what `envs.step` returned under SAME_STEP."""
        columns, row = self._columns, self.position
        self.position = (row + 1) % self._rows
        self.size = min(self.size + 1, self.capacity)
        ended = terminated | truncated
        ends = np.flatnonzero(ended) if ended.any() else ()
        self._ended = [(int(env), infos["final_obs"][env].astype(columns["obs"].dtype)) for env in ends]
        columns["actions"][row] = actions
        columns["rewards"][row] = rewards
        columns["terminated"][row] = terminated
        columns["ended"][row] = ended
        columns["obs"][self.position] = next_obs  # crucial: where an episode ended, the first of the next
        if self.implicit_next:
            final = columns["final"]
            self._free += final[row][final[row] >= 0].tolist()  # of the transitions that are overwritten
            final[row] = -1
            if self.position == self._reached:
                final[self.position] = -1
        else:
            columns["next_obs"][row] = next_obs
        self._reached = max(self._reached, self.position + 1)
        for env, final_obs in self._ended:
            if self.implicit_next:
                self._keep_apart(row, env, final_obs)
            else:
                columns["next_obs"][row, env] = final_obs

    def sample(self, num_batches: int, batch_size: int, rng: torch.Generator) -> Batch:
        """Draws K batches [K, B, ...] in one call; zeros if the buffer is empty.

        Returns:
            obs [K, B, ...], or [K, B, S, ...] if frames are stacked; actions; rewards Σ_k γ^k r_k over the m ≤ n steps
            that follow; next_obs after those, as obs; terminated, as 0 or 1, whether they ended there; discounts γ^m.
        """
        index = torch.randint(max(self.size, 1) * self.num_envs, (num_batches * batch_size,), generator=rng)
        if self.size == self.capacity:  # leaves out the row being filled, and S - 1 after it, which lack older frames
            index += self.num_envs * max(self.position + self.frame_stack - self._rows, 0)
            index += self.num_envs * self.frame_stack * (index >= self.position * self.num_envs)
        fields = last_fields = self._stacked(index)
        rewards, discounts = fields["rewards"], torch.full((len(index),), self.gamma)
        if self.n_step > 1:
            newest = (self.position - 1) % self._rows
            index, rewards, discounts = look_ahead(index, self._flat, newest, self.num_envs, self.gamma, self.n_step)
            last_fields = self._stacked(index)
        terminated = last_fields["terminated"]
        if self.implicit_next:
            next_obs = self._gather((index + self.num_envs) % len(self._words))["obs"]
            final = last_fields["final"]
            (apart,) = (final >= 0).nonzero(as_tuple=True)
            next_obs[apart] = torch.from_numpy(self._finals)[final[apart].long()]
        else:
            next_obs = last_fields["next_obs"]
        if self.frame_stack > 1:
            next_obs = torch.cat((last_fields["obs"][:, 1:], next_obs[:, None]), 1)
        batch = {"obs": fields["obs"], "actions": fields["actions"], "rewards": rewards, "next_obs": next_obs}
        batch |= {"terminated": terminated.float(), "discounts": discounts}
        return Batch(
            **{name: column.view(num_batches, batch_size, *column.shape[1:]) for name, column in batch.items()}
        )

    def newest_obs(self) -> Tensor:
        """Observations at which the next step starts, [N, *obs_shape]; a view."""
        return torch.from_numpy(self._columns["obs"][self.position])

    def newest_vectors(self) -> Tensor:
        """The numbers in `newest_obs`, without images: [N, D]."""
        obs = self.newest_obs()
        return obs if self._num_floats is None else floats_of(obs, self._num_floats)

    def stacked_obs(self) -> Tensor:
        """Observations as the policy sees them where the next step starts: [N, ...], or [N, S, ...] of frame stacks."""
        if self.frame_stack == 1:
            return self.newest_obs()
        newest = torch.arange(self.position * self.num_envs, (self.position + 1) * self.num_envs)
        return self._flat["obs"][look_back(newest, self._flat["ended"], self.num_envs, self.frame_stack)]

    def records(self, row: int) -> Tensor:
        """The records of a row, as 4-byte words [N, L]; a view."""
        return self._words[row * self.num_envs : (row + 1) * self.num_envs]

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raises NonFiniteError if the step inside has brought NaN or infinity."""
        yield
        self.check_finite()

    def check_finite(self) -> None:
        """Raises NonFiniteError if the newest step has brought NaN or infinity."""
        if problem := self.find_nonfinite():
            raise NonFiniteError(problem)

    def find_nonfinite(self) -> str | None:
        """Finds NaN or infinity in the newest step, in words; None if all is finite."""
        row = self.position - 1
        obs = self._numbers(self._columns["obs"][self.position])
        seen = (("reward", self._columns["rewards"][row]), ("observation", obs))
        for name, values in seen:
            if not np.isfinite(values).all():
                bad = ~np.isfinite(values.reshape(self.num_envs, -1)).all(1)
                return f"{name} of environment {np.flatnonzero(bad)[0]} is not finite"
        bad = [env for env, final_obs in self._ended if not np.isfinite(self._numbers(final_obs)).all()]
        return f"final observation of environment {bad[0]} is not finite" if bad else None

    def _numbers(self, obs: np.ndarray) -> np.ndarray:
        """Observations [..., D]; of records, the numbers beside their images."""
        return obs if self._num_floats is None else obs[..., : 4 * self._num_floats].view(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: records without a copy, so save it before the next `add`."""
        records = torch.from_numpy(self._records[: self._reached].reshape(-1).view(np.uint8))
        state = {"records": records, "position": self.position, "size": self.size, "layout": self._layout()}
        return state | self.kept_apart()

    def kept_apart(self) -> dict[str, Any]:
        """Next observations that stand in no record, and which places for them are free."""
        return {"finals": torch.from_numpy(self._finals), "free": list(self._free)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError unless the buffer was of this capacity, for as many environments, of this layout."""
        if state["layout"] != self._layout():
            raise CheckpointError(self._differs(state["layout"], self.num_envs))
        self.clear()
        self._words.view(torch.uint8).view(-1)[: len(state["records"])] = state["records"]
        self.position, self.size = state["position"], state["size"]
        self._reached = len(state["records"]) // self._records[0].nbytes
        self._finals, self._free = state["finals"].numpy().copy(), list(state["free"])

    def load_shards(self, shards: Sequence[Mapping[str, Any]], first: int, total: int) -> None:
        """Loads its environments, from number `first` on, from shards that hold the buffers of `total` environments.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        width = total // len(shards)  # environments of a shard
        for shard in shards:
            if shard["layout"] != self._layout(width) or shard["position"] != shards[0]["position"]:
                raise CheckpointError(self._differs(shard["layout"], width))
        merged = merge_shards(shards, self._records.dtype, slice(first, first + self.num_envs), width)
        self.load_state_dict(merged | {"layout": self._layout()})

    def clear(self) -> None:
        """Forgets all transitions."""
        self.position = self.size = 0
        self._finals, self._free = self._finals[:0], []
        if self.frame_stack > 1:
            self._columns["ended"][-1] = True  # nothing leads to the first row
        if self.implicit_next:  # row by row, as rows are reached: memory that is never written to takes no room
            self._columns["final"][: self.n_step] = -1  # and those that a sample of an empty buffer looks at
        self._reached = 1

    def _layout(self, num_envs: int | None = None) -> str:
        width = self.num_envs if num_envs is None else num_envs
        return layout(self.capacity, width, self._records.dtype, self.frame_stack)

    def _differs(self, stored: str, num_envs: int) -> str:
        return why_it_differs(stored, self._layout(num_envs), self.num_envs)

    def _gather(self, index: Tensor) -> dict[str, Tensor]:
        """The records [I] as one read; [I, ...] each, views of one block."""
        return columns_of(self._words.index_select(0, index), self._places)

    def _stacked(self, index: Tensor) -> dict[str, Tensor]:
        """The records [I], whose observations are stacks [I, S, ...] if S is above 1; one read."""
        if self.frame_stack == 1:
            return self._gather(index)
        rows = look_back(index, self._flat["ended"], self.num_envs, self.frame_stack)
        fields = {name: column.unflatten(0, rows.shape) for name, column in self._gather(rows.flatten()).items()}
        return {name: column if name == "obs" else column[:, -1] for name, column in fields.items()}

    def _keep_apart(self, row: int, env: int, next_obs: np.ndarray) -> None:
        """Stores next observations apart, where no following record holds them; doubles the room when it is full."""
        if not self._free:
            room = len(self._finals)
            grown = np.zeros((max(64, 2 * room), *self._finals.shape[1:]), dtype=self._finals.dtype)
            grown[:room] = self._finals
            self._finals, self._free = grown, list(range(len(grown) - 1, room - 1, -1))
        slot = self._free.pop()
        self._finals[slot] = next_obs
        self._columns["final"][row, env] = slot


class NewestSteps(ReplayBuffer):
    """Only the newest steps, on their way to those who keep them.

    Args:
        max_waiting: steps that may wait, S.

    Attributes:
        steps: what was added since `sent` was called, by name, [S, N, ...] each; the first `waiting` count.
        waiting: how many these are; none: the environments were reset, and `next_obs` [0] are their observations.
    """

    def __init__(self, max_waiting: int, num_envs: int, obs_space: Box, num_actions: int, frame_stack: int = 1) -> None:
        super().__init__(num_envs, num_envs, obs_space, num_actions, frame_stack=frame_stack)
        shape, newest = (max_waiting, num_envs), self.newest_obs()
        obs = torch.zeros(max_waiting, *newest.shape, dtype=newest.dtype)
        self.steps = {"actions": torch.zeros(*shape, num_actions), "rewards": torch.zeros(shape)}
        self.steps |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("terminated", "truncated")}
        self.steps |= {"next_obs": obs, "final_obs": obs.clone()}
        self._arrays = {name: column.numpy() for name, column in self.steps.items()}
        self.waiting = 0

    def sent(self) -> None:
        """Forgets the steps that were waiting."""
        self.waiting = 0

    def start(self, obs: np.ndarray) -> None:
        super().start(obs)
        self._arrays["next_obs"][0] = self._columns["obs"][self.position]

    def add(
        self,
        actions: np.ndarray,
        next_obs: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> None:
        super().add(actions, next_obs, rewards, terminated, truncated, infos)
        arrays, row = self._arrays, self.waiting
        arrays["actions"][row] = actions
        arrays["rewards"][row] = rewards
        arrays["terminated"][row] = terminated
        arrays["truncated"][row] = truncated
        arrays["next_obs"][row] = self._columns["obs"][self.position]
        for env, final_obs in self._ended:
            arrays["final_obs"][row, env] = final_obs
        self.waiting += 1


def look_ahead(
    index: Tensor, columns: Mapping[str, Tensor], newest: int | Tensor, num_envs: int, gamma: float, n_step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Looks n steps ahead of records [I], up to the end of their episodes or to the newest row of the ring.

    Returns:
        the last record that counts; Σ_k γ^k r_{t+k} up to it; γ^m after m steps; [I] each.
    """
    last, rewards = index, columns["rewards"][index]
    discounts = torch.full_like(rewards, gamma)
    for _ in range(n_step - 1):
        goes_on = ~(columns["ended"][last] | (last // num_envs == newest))
        last = torch.where(goes_on, (last + num_envs) % len(columns["ended"]), last)
        rewards = rewards + torch.where(goes_on, discounts * columns["rewards"][last], 0.0)
        discounts = torch.where(goes_on, discounts * gamma, discounts)
    return last, rewards, discounts


def look_back(index: Tensor, ended: Tensor, num_envs: int, depth: int) -> Tensor:
    """The records of the stack that ends with each of `index` [I], oldest first; [I, S].

    Args:
        ended: [rows N], which records are the last of their episodes.
        depth: S.
    """
    stack = [index]
    for _ in range(depth - 1):
        before = (stack[-1] - num_envs) % len(ended)
        stack.append(torch.where(ended[before], stack[-1], before))
    return torch.stack(stack[::-1], 1)
