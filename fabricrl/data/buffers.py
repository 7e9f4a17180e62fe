"""Preallocated storage for what environments return."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor
from torch.utils import _pytree as pytree

from fabricrl.data.memory import map_file
from fabricrl.utils.batch import Batch
from fabricrl.utils.device import pinned, to_device
from fabricrl.utils.errors import CheckpointError, NonFiniteError
from fabricrl.utils.records import Records, floats_of
from fabricrl.utils.utils import require

CPU = torch.device("cpu")
TORCH_TYPES = {"f4": torch.float32, "i4": torch.int32, "u1": torch.uint8, "b1": torch.bool}


class RolloutBuffer:
    """T steps of N environments, on the CPU, for on-policy algorithms.

    Row t holds the observation of step t, the action drawn for it, and what the environment answered. Row T of `obs`
    is the observation that the next rollout starts from. Everything is written through NumPy views of the tensors: a
    step makes no tensor.

    With a frame stack of S, the policy sees the last S observations, yet each is stored once: `frames` begins with
    S − 1 rows of the rollout before, and `stacks` holds the rows of each step's stack. A stack never reaches back
    beyond its episode: the first observation is repeated instead.

    Attributes:
        obs: [T + 1, N, R]; actions: [T, N, A]; rewards: [T, N], as the environment gave them;
        terminated, truncated: [T, N], bool; terminated also where a life was lost, if the environment reports it;
        ends: [T, N], ends of episodes, not of lives;
        allowed: [T + 1, N, S], bool, the masks of the actions that were allowed at each step; None if there are none;
        skipped: [T, N], steps that only reset an environment, as some do after an episode: they belong to none.

    Args:
        obs_space: a single environment's, one row R; records stay bytes, everything else becomes float32.
        frame_stack: S.
        skips: environments may have steps that only reset.
        mask_size: S; 0 if environments have no masks.
        device: where the rollout is learned from; for a GPU, memory is pinned.
        place: where it lies: the CPU but for environments that take and return tensors, see `DeviceRolloutBuffer`.
    """

    bootstraps: float | Tensor = 1.0  # weight of each of `truncated_episodes`

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        obs_space: Box,
        num_actions: int,
        action_dtype: torch.dtype,
        frame_stack: int = 1,
        skips: bool = False,
        mask_size: int = 0,
        device: torch.device = CPU,
        place: torch.device = CPU,
    ) -> None:
        self.num_envs, self.frame_stack, self.skips = num_envs, frame_stack, skips
        self.num_floats = obs_space.num_floats if isinstance(obs_space, Records) else None
        dtype = torch.float32 if self.num_floats is None else torch.uint8
        pin, steps = pinned(device), (num_steps, num_envs)
        zeros = partial(torch.zeros, pin_memory=pin, device=place)
        self.frames = zeros(frame_stack + num_steps, num_envs, *obs_space.shape, dtype=dtype)
        self.obs = self.frames[frame_stack - 1 :]
        self.actions, self.rewards = zeros(*steps, num_actions, dtype=action_dtype), zeros(steps)
        flags = (torch.zeros(steps, dtype=torch.bool, device=place) for _ in range(4))
        self.terminated, self.truncated, self.skipped, self.ends = flags
        masked = torch.ones(num_steps + 1, num_envs, mask_size, dtype=torch.bool, pin_memory=pin)
        self.allowed = masked if mask_size > 0 else None
        self.obs_rows = self.obs.unbind()  # T + 1 views [N, R], made once
        if place.type == "cpu":
            self._obs, self._actions = self.obs.numpy(), self.actions.numpy()
            self._rewards, self._ends = self.rewards.numpy(), self.ends.numpy()
            self._terminated, self._truncated = self.terminated.numpy(), self.truncated.numpy()
            self._skipped = self.skipped.numpy()
        self._final: list[tuple[int, int, np.ndarray]] = []
        stacks = (num_steps + 1, num_envs, frame_stack)
        self.stacks = torch.zeros(stacks, dtype=torch.int64, pin_memory=pin)  # rows of frames × N
        self._rows = self.stacks.numpy()
        self._first = np.zeros((num_envs, 1), dtype=np.int64)  # row of `frames` that the running episode began with
        self._sent: Tensor | None = None  # `frames` where the policy acts or learns, if that is elsewhere
        self._num_sent = 0  # rows of them that are there

    def start(self, obs: np.ndarray | None = None, masks: np.ndarray | None = None) -> None:
        """Starts a rollout at `obs` [N, R]: first observations of episodes, or those where the last rollout ended.

        `masks` [N, S]: actions that are allowed there, if environments have masks.
        """
        if self.allowed is not None:
            self.allowed[0] = self.allowed[-1] if obs is None else torch.as_tensor(masks)
        if obs is None:
            self.frames[: self.frame_stack] = self.frames[-self.frame_stack :].clone()
            self._first -= len(self.actions)
        else:
            self._obs[0] = obs
            self._first[:] = self.frame_stack - 1
        self._final.clear()
        self._skipped[:] = False
        self._num_sent = 0
        self._stack(0)

    def _stack(self, t: int) -> None:
        """Notes the frames of step t's stack, oldest first."""
        if self.frame_stack > 1:
            rows = np.maximum(np.arange(t, t + self.frame_stack), self._first)  # [N, S]
            self._rows[t] = rows * self.num_envs + np.arange(self.num_envs)[:, None]

    def stacked_obs(self, t: int, device: torch.device = CPU) -> Tensor:
        """Observations as the policy sees them at step t, on its device: [N, R], or [N, S, R] if frames are stacked."""
        if self.frame_stack == 1 and device == self.frames.device:
            return self.obs_rows[t]
        frames = self._frames_on(device, t + self.frame_stack)
        if self.frame_stack == 1:
            return frames[t]
        return StackedFrames(frames.flatten(0, 1), to_device(self.stacks[t], device))[:]

    def _frames_on(self, device: torch.device, count: int) -> Tensor:
        """`frames` on a device, of which at least the first `count` are there: each is sent once in a rollout."""
        if device == self.frames.device:
            return self.frames
        if self._sent is None:
            with torch.inference_mode(False):  # the update learns from it
                self._sent = torch.empty_like(self.frames, device=device, pin_memory=False)
        if count > self._num_sent:
            new = slice(self._num_sent, count)
            self._sent[new].copy_(self.frames[new], non_blocking=True)
            self._num_sent = count
        return self._sent

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
        """Stores step t: `actions` [N, A] as they were drawn, and what `envs.step` of `make_envs` returned."""
        self._actions[t] = actions
        self._obs[t + 1] = next_obs  # crucial: the first observation of the next episode, not the final one
        self._rewards[t] = rewards
        self._terminated[t] = terminated
        self._truncated[t] = truncated
        self._ends[t] = ended = terminated | truncated
        if self.allowed is not None:
            self.allowed[t + 1] = torch.from_numpy(infos["action_mask"])
        if "life_lost" in infos:
            self._terminated[t] |= infos["life_lost"]
        if truncated.any():
            for env in np.flatnonzero(truncated & ~self._terminated[t]):
                final_obs = np.array(infos["final_obs"][env], dtype=self._obs.dtype)
                self._final.append((t, int(env), final_obs))
        if "skipped" in infos:
            self.skips = True
            self._skipped[t] = infos["skipped"]
            ended = ended | self._skipped[t]  # so that nothing leads from such a row to the next
        if self.frame_stack > 1:
            self._first[ended] = t + self.frame_stack
            self._stack(t + 1)

    @property
    def dones(self) -> Tensor:
        """[T, N], bool: steps across which no return and no advantage flows."""
        return self.terminated | self.truncated | self.skipped

    def counts(self, device: torch.device) -> Tensor | None:
        """1 where a step can be learned from, 0 where it only reset, [T N]; None: there are no such steps."""
        return to_device((~self.skipped).flatten().float(), device) if self.skips else None

    def mask(self, t: int, device: torch.device) -> Tensor | None:
        """The actions that are allowed at step t, [N, S]; None if environments have no masks."""
        return None if self.allowed is None else to_device(self.allowed[t], device)

    def masks(self, device: torch.device) -> Tensor | None:
        """Those of the whole rollout, [T N, S]."""
        return None if self.allowed is None else to_device(self.allowed[:-1].flatten(0, 1), device)

    def inputs(
        self, prepare: Callable[[Tensor], Tensor], device: torch.device
    ) -> "tuple[Tensor | StackedFrames, Tensor]":
        """Prepared observations on the device: those of the rollout [T N, ...], and the next ones [N, ...]."""
        frames = prepare(self._frames_on(device, len(self.frames)))
        if self.frame_stack == 1:
            return frames[:-1].flatten(0, 1), frames[-1]
        stacks = StackedFrames(frames.flatten(0, 1), to_device(self.stacks.flatten(0, 1), device))
        count = self.actions.shape[:2].numel()
        return stacks.rows(slice(count)), stacks[slice(count, None)]

    def vectors(self, rows: Tensor) -> Tensor:
        """The numbers in observations [..., R], without images: [..., D]."""
        return rows if self.num_floats is None else floats_of(rows, self.num_floats)

    @property
    def has_truncated(self) -> bool:
        """True if an episode was truncated and not terminated."""
        return bool(self._final)

    def truncated_episodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Episodes that were truncated and not terminated: t [E], env [E], final observations [E, ...]."""
        steps, envs, obs = zip(*self._final, strict=True)
        t, env, final_obs = torch.tensor(steps), torch.tensor(envs), torch.from_numpy(np.stack(obs))
        if self.frame_stack > 1:
            before = StackedFrames(self.frames.flatten(0, 1), self.stacks[t, env, 1:])[:]  # [E, S - 1, R]
            final_obs = torch.cat((before, final_obs[:, None]), 1)
        return t, env, final_obs

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raises NonFiniteError if the steps inside have brought NaN or infinity.

        Also if an environment has failed on the action that they led to.
        """
        try:
            yield
        finally:
            if problem := self.find_nonfinite():
                raise NonFiniteError(problem)

    def find_nonfinite(self) -> str | None:
        """Finds the first NaN or infinity from an environment, in words; None if all is finite."""
        obs = self.vectors(self.obs)
        if obs.sum().isfinite() and self.rewards.sum().isfinite() and not self._final:
            return None  # a finite sum has finite terms: one cheap test instead of the masks below
        for name, values in (("reward", self.rewards[..., None]), ("observation", obs[1:].flatten(2))):
            bad = (~values.isfinite().all(-1)).nonzero()
            if len(bad):
                step, env = bad[0].tolist()
                return f"{name} of environment {env} is not finite after step {step} of the rollout"
        for step, env, final_obs in self._final:
            if not self.vectors(torch.from_numpy(final_obs)).isfinite().all():
                return f"final observation of environment {env} is not finite after step {step} of the rollout"
        return None if obs[0].isfinite().all() else "first observation is not finite"


class StackedFrames:
    """Frame stacks of which each frame is stored once; indexing puts them together.

    Args:
        frames: [F, R]; places: [B, S], the frames of each stack.
    """

    def __init__(self, frames: Tensor, places: Tensor) -> None:
        self.frames, self.places = frames, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """[..., S, R]"""
        places = self.places[index]
        return self.frames.index_select(0, places.flatten()).view(*places.shape, -1)  # much faster than frames[places]

    def rows(self, index: Tensor | slice) -> "StackedFrames":
        """Some of the stacks, not put together yet."""
        return StackedFrames(self.frames, self.places[index])


pytree.register_pytree_node(
    StackedFrames, lambda stacks: ([stacks.frames, stacks.places], None), lambda parts, _: StackedFrames(*parts)
)


class RecurrentRolloutBuffer(RolloutBuffer):
    """A rollout of a recurrent policy: with each observation it stores the memory *before* it.

    Args:
        player_device: where the policy acts.

    Attributes:
        memory: [T + 1, N, M], where the policy acts; zero at the first observation of an episode.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        obs_space: Box,
        num_actions: int,
        action_dtype: torch.dtype,
        memory_size: int,
        frame_stack: int = 1,
        skips: bool = False,
        player_device: torch.device = CPU,
        mask_size: int = 0,
        device: torch.device = CPU,
    ) -> None:
        rest = frame_stack, skips, mask_size, device
        super().__init__(num_steps, num_envs, obs_space, num_actions, action_dtype, *rest)
        pin = pinned(device) and not pinned(player_device)
        self.memory = torch.zeros(num_steps + 1, num_envs, memory_size, device=player_device, pin_memory=pin)
        self._memory_rows = self.memory.unbind()
        self._final_memory: list[Tensor] = []

    def start(self, obs: np.ndarray | None = None, masks: np.ndarray | None = None) -> None:
        """Starts a rollout; clears memory if `obs` are first observations, keeps it where the last rollout ended."""
        super().start(obs, masks)
        self._final_memory.clear()
        self.memory[0] = self.memory[-1] if obs is None else 0.0

    def memory_at(self, t: int) -> Tensor:
        """The memory before step t, [N, M], where the policy acts."""
        return self._memory_rows[t]

    def rewards_at(self, t: int) -> Tensor:
        """The rewards of step t, [N], where the policy acts."""
        return to_device(self.rewards[t], self.memory.device)

    def remember(self, t: int, memory: Tensor) -> None:
        """Stores the memory [N, M] after step t, cleared where an episode ended; call `add` before."""
        row = self._memory_rows[t + 1].copy_(memory)
        ended = self._ends[t] | self._skipped[t]  # not where a life was lost: the game goes on
        if ended.any():
            self._final_memory += [memory[env].clone() for step, env, _ in self._final if step == t]
            row.masked_fill_(to_device(torch.from_numpy(ended), memory.device)[:, None], 0.0)

    def final_memory(self) -> Tensor:
        """Memory at the final observations of `truncated_episodes`, [E, M]."""
        return torch.stack(self._final_memory)


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
        self._reached = 1  # rows that have been in use, with that of the position
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
        if self.size == self.capacity:  # all rows but the one that is yet to be, and S - 1 after it
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
        """The numbers in them, without images: [N, D]."""
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
        most: how many may wait, S.

    Attributes:
        steps: what was added since `sent` was called, by name, [S, N, ...] each; the first `waiting` count.
        waiting: how many these are; none: the environments were reset, and `next_obs` [0] are their observations.
    """

    def __init__(self, most: int, num_envs: int, obs_space: Box, num_actions: int, frame_stack: int = 1) -> None:
        super().__init__(num_envs, num_envs, obs_space, num_actions, frame_stack=frame_stack)
        shape, obs = (most, num_envs), torch.zeros(most, *self.newest_obs().shape, dtype=self.newest_obs().dtype)
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


Place = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


def places(record: np.dtype) -> dict[str, Place]:
    """Finds the fields in a record that is read as a row of a field's type: that type, where, shape and strides."""
    found = {}
    for name in record.names or ():
        kind, offset = record.fields[name][:2]  # type: ignore[index]
        strides = tuple(math.prod(kind.shape[i + 1 :]) for i in range(len(kind.shape)))
        found[name] = TORCH_TYPES[kind.base.str[1:]], offset // kind.base.itemsize, kind.shape, strides
    return found


def columns_of(words: Tensor, where: Mapping[str, Place]) -> dict[str, Tensor]:
    """The fields, at their `places`, of records that are rows of 4-byte words [I, L]; [I, ...] each, views."""
    views = {dtype: words.view(dtype) for dtype in {place[0] for place in where.values()}}
    return {
        name: views[dtype].as_strided((len(words), *shape), (views[dtype].stride(0), *strides), offset)
        for name, (dtype, offset, shape, strides) in where.items()
    }


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


def layout(capacity: int, num_envs: int, record: np.dtype, frame_stack: int = 1) -> str:
    """Names what has to be equal where a stored replay buffer is loaded."""
    stacks = f" in stacks of {frame_stack}" if frame_stack > 1 else ""
    return f"{capacity} × {num_envs} of {record.descr}{stacks}"


def why_it_differs(stored: str, own: str, num_envs: int) -> str:
    """Explains how a stored layout differs from `own`, and what a buffer of so many environments can do."""
    (there, columns), (here, own_columns) = (text.split(" of ", 1) for text in (stored, own))
    if columns != own_columns:
        return f"the checkpoint's replay buffer has records of {columns}, this run's {own_columns}: keep its arguments"
    rows, envs = (int(number) for number in there.split(" × "))
    same = envs == int(here.split(" × ")[1])
    advice = f"--buffer-size {rows * num_envs} (of a rank) fits" if same else "keep --num-envs"
    return f"the checkpoint's replay buffer holds {there} transitions, this run's {here}: {advice}"


def merge_shards(shards: Sequence[Mapping[str, Any]], record: np.dtype, envs: slice, width: int) -> dict[str, Any]:
    """The state of a buffer with some of the environments of several, which hold `width` each, but for its layout."""
    parts, offset, implicit = [], 0, "final" in (record.names or ())
    for shard in shards:
        part = shard["records"].numpy().view(record).reshape(-1, width).copy()
        if implicit:
            part["final"] += offset * (part["final"] >= 0)
            offset += len(shard["finals"])
        parts.append(part)
    records = np.ascontiguousarray(np.concatenate(parts, 1)[:, envs])
    state = dict(shards[0]) | {"records": torch.from_numpy(records.reshape(-1).view(np.uint8))}
    if "steps" in state:
        state["steps"] = torch.cat([shard["steps"] for shard in shards])[envs]
    if implicit:
        state["finals"] = torch.cat([shard["finals"] for shard in shards])
        state["free"] = sorted(set(range(offset)) - set(records["final"].ravel().tolist()), reverse=True)
    return state


def record_type(obs_space: Box, num_actions: int, implicit_next: bool) -> np.dtype:
    """Layout of one transition in a ReplayBuffer."""
    obs = ("u1" if obs_space.dtype == np.uint8 else "f4", obs_space.shape)
    fields: list[tuple] = [("obs", *obs), ("actions", "f4", (num_actions,)), ("rewards", "f4")]
    fields += [("terminated", "?"), ("ended", "?")]
    fields += [("final", "i4")] if implicit_next else [("next_obs", *obs)]
    return np.dtype(fields, align=True)
