"""Environments in JAX as tensor environments: arrays become tensors, and tensors arrays, by DLPack, where they lie.

DLPack hands over memory and the stream that it is written on, so that nothing is copied and no side waits for the other
on the host. JAX never changes an array; nor may who takes one as a tensor.
"""

import secrets
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from gymnasium.spaces import Box, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fabricrl.utils.errors import ConfigError


class Task(Protocol):
    """Pure functions of N environments. A state is any structure of arrays, most of them [N, ...]; keys are [N, 2]."""

    observation_space: Space
    action_space: Space

    def first(self, keys: Any) -> Any:
        """States that episodes begin in."""

    def restart(self, state: Any, keys: Any) -> Any:
        """States of new episodes, for the environments whose episode has ended in `state`."""

    def next(self, state: Any, actions: Any, keys: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        """The states that a step leads to, rewards [N], terminated [N], and numbers [N] for the infos."""

    def observe(self, state: Any, keys: Any) -> Any:
        """Observations [N, ...]."""


class Running(NamedTuple):
    """All that the steps to come depend on: states, steps [N] of the running episodes, and the key of all draws."""

    state: Any
    steps: Any
    key: Any


class JaxEnvs(VectorEnv):
    """N environments of a task in JAX, whose `reset` and `step` take and return tensors on `device`.

    A step is one program of XLA: what the task does, the end of episodes, and the first states of new ones, which are
    computed in those steps alone in which an episode ends. It is compiled when `reset` is first called.

    Args:
        max_episode_steps: steps after which an episode is truncated; 0: never.

    Raises:
        ConfigError: JAX does not know the device.
    """

    metadata: dict[str, Any] = {"tensors": True, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, task: Task, num_envs: int, max_episode_steps: int, device: str | torch.device = "cpu") -> None:
        self.task, self.num_envs, self.max_episode_steps = task, num_envs, max_episode_steps
        self.device, self._place = torch.device(device), jax_device(torch.device(device))
        self.single_observation_space, self.single_action_space = task.observation_space, task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._first, self._next = jax.jit(self._first_states), jax.jit(self._next_states)
        self._running: Running | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Starts new episodes in all environments; a seed starts their random numbers anew."""
        is_first = self._running is None
        if seed is None and self._running is not None:
            key = self._running.key
        else:
            number = secrets.randbits(32) if seed is None else seed % 2**32
            key = jax.device_put(jax.random.PRNGKey(number), self._place)
        self._running, obs = self._first(key)
        if is_first:  # compiles a step now, and forgets it
            self._next(self._running, self._array(self._no_actions()))
        return self._tensor(obs), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Takes a step in every environment: observations, rewards, terminated and truncated [N], infos."""
        self._running, results = self._next(self._running, self._array(actions))
        obs, rewards, terminated, truncated, infos = jax.tree.map(self._tensor, results)
        return obs, rewards, terminated, truncated, infos

    def _first_states(self, key: Any) -> tuple[Running, Any]:
        key, first, seen = jax.random.split(key, 3)
        state = self.task.first(jax.random.split(first, self.num_envs))
        running = _of_one_type(Running(state, jnp.zeros(self.num_envs, jnp.int32), key))
        return running, self.task.observe(state, jax.random.split(seen, self.num_envs))

    def _next_states(self, running: Running, actions: Any) -> tuple[Running, tuple[Any, ...]]:
        key, *keys = jax.random.split(running.key, 4)
        moves, restarts, sights = (jax.random.split(one, self.num_envs) for one in keys)
        state, rewards, terminated, told = self.task.next(running.state, actions, moves)
        steps = running.steps + 1
        truncated = steps >= self.max_episode_steps if self.max_episode_steps else jnp.zeros_like(terminated)
        final_obs = self.task.observe(state, sights)
        ended = terminated | truncated
        fresh = jax.lax.cond(ended.any(), self.task.restart, lambda state, keys: state, state, restarts)
        state = jax.tree.map(partial(_choose, ended), fresh, state)
        running = _of_one_type(Running(state, jnp.where(ended, 0, steps), key))
        infos = {"final_obs": final_obs, **told}
        return running, (self.task.observe(state, sights), rewards, terminated, truncated, infos)

    def _no_actions(self) -> Tensor:
        space = self.single_action_space
        kind = torch.float32 if isinstance(space, Box) else torch.int64
        return torch.zeros(self.num_envs, *(space.shape or ()), dtype=kind, device=self.device)

    def _array(self, actions: Tensor) -> Any:
        """The memory of a tensor as an array; JAX has integers of 32 bits."""
        actions = actions.detach().contiguous()
        return jax.dlpack.from_dlpack(actions.int() if actions.dtype == torch.int64 else actions)

    def _tensor(self, array: Any) -> Tensor:
        """The memory of an array as a tensor. On a GPU the stream waits for it; on a CPU there is none."""
        return torch.from_dlpack(array.block_until_ready() if self.device.type == "cpu" else array)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the steps to come depend on."""
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(self._running)]  # copies
        return {str(i): torch.from_numpy(_signed(leaf)) for i, leaf in enumerate(leaves) if leaf.size}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state_dict` was called."""
        leaves, structure = jax.tree.flatten(self._running)
        for i, leaf in enumerate(leaves):
            if leaf.size:
                stored = state[str(i)].cpu().numpy().view(leaf.dtype).reshape(leaf.shape)
                leaves[i] = jax.device_put(stored, self._place)
        self._running = jax.tree.unflatten(structure, leaves)


def jax_device(device: torch.device) -> Any:
    """JAX's name for a device. Raises ConfigError where JAX has none of that kind."""
    try:
        return jax.devices("cuda" if device.type == "cuda" else "cpu")[device.index or 0]
    except RuntimeError as error:
        raise ConfigError(
            "the run is on a GPU, but JAX here knows the CPU alone: pip install 'jax[cuda13]', or --accelerator cpu"
        ) from error


def _choose(ended: Any, fresh: Any, old: Any) -> Any:
    """Rows of new episodes where one has ended. What belongs to no single environment stays."""
    if old.ndim == 0 or old.shape[0] != len(ended):
        return old
    return jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)


def _of_one_type(running: Running) -> Running:
    """The same without weak types, in which first states may differ from later ones: two programs of a step."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), running)


def _signed(values: np.ndarray) -> np.ndarray:
    """The same bytes in a type that all collectives take: keys are unsigned."""
    return values.view(f"i{values.itemsize}") if values.dtype.kind == "u" else values
