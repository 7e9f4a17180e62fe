"""Rollouts of on-policy algorithms, preallocated: steps, stacked frames, and the memory of recurrent policies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.frames import StackedFrames
from fabricrl.utils.device import pinned, to_device
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.records import Records, floats_of

CPU = torch.device("cpu")


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
        allowed: [T + 1, N, L], bool, the masks of the actions that were allowed at each step; None if there are none;
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

        `masks` [N, L]: actions that are allowed there, if environments have masks.
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

    def valid(self, device: torch.device) -> Tensor | None:
        """Validity of each step, [T N]: 1 if it can be learned from, 0 if it only reset; None: all are valid."""
        return to_device((~self.skipped).flatten().float(), device) if self.skips else None

    def mask(self, t: int, device: torch.device) -> Tensor | None:
        """The actions that are allowed at step t, [N, L]; None if environments have no masks."""
        return None if self.allowed is None else to_device(self.allowed[t], device)

    def masks(self, device: torch.device) -> Tensor | None:
        """The masks of the whole rollout, [T N, L]; None if environments have none."""
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

        Even if an environment has raised meanwhile: NaN, fed back as an action, is often why.
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
