"""MuJoCo Playground (Zakka et al. 2025, arXiv:2502.08844): tasks of MJX, physics in JAX. `playground/CartpoleBalance`.

Its functions of one environment are vectorised here. Episodes end as in its own training wrapper, but for three things:
the last observation is kept, so that truncated episodes are bootstrapped from it; a new episode begins in a state of
its own, not in the one that its environment began with, unless `full_reset` is false; and observations that are a
dictionary are the actor's part, "state".
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from gymnasium.spaces import Box, Space
from mujoco_playground import registry

from fabricrl.envs.simulators import unknown
from fabricrl.envs.simulators.jax import JaxEnvs
from fabricrl.utils.errors import ConfigError

KEPT = "AutoResetWrapper_preserve_info"  # of the infos, what Playground's tasks carry from an episode to the next


class Playground:
    """The `Task` of an `MjxEnv`, or of any with its `reset(rng)` and `step(state, action)`.

    Args:
        full_reset: whether each episode begins in a state of its own, as `reset` draws it; else in the first of its
            environment.
        action_repeat: how often the task takes each action; the rewards are added up.
    """

    def __init__(self, env: Any, full_reset: bool = True, action_repeat: int = 1) -> None:
        self._reset, self._step = jax.vmap(env.reset), jax.vmap(env.step)
        self._full_reset, self._repeat = full_reset, action_repeat
        example = jax.eval_shape(env.reset, jax.random.PRNGKey(0)).obs
        if isinstance(example, Mapping) and "state" not in example:
            raise ConfigError(f"observations of the task have no part called 'state', only {', '.join(example)}")
        shape = _of_actor(example).shape
        self.observation_space: Space = Box(-np.inf, np.inf, shape, np.float32)
        self.action_space: Space = Box(-1.0, 1.0, (env.action_size,), np.float32)

    def first(self, keys: Any) -> Any:
        """The task's states, and their data and observations, if further episodes are to begin with these, too."""
        state = self._reset(keys)
        return state, None if self._full_reset else (state.data, state.obs)

    def restart(self, state: Any, keys: Any) -> Any:
        old, begun = state
        if begun is not None:
            data, obs = begun
            return old.replace(data=data, obs=obs), begun
        new, _ = self.first(keys)
        return new.replace(info=new.info | {KEPT: old.info[KEPT]}) if KEPT in old.info else new, None

    def next(self, state: Any, actions: Any, keys: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        (new, begun), rewards = state, 0.0
        for _ in range(self._repeat):
            new = self._step(new, actions)
            rewards += new.reward
        terminated = new.done > 0
        return (new.replace(done=0 * new.done), begun), rewards, terminated, dict(new.metrics)

    def observe(self, state: Any, keys: Any) -> Any:
        return _of_actor(state[0].obs)


def _of_actor(obs: Any) -> Any:
    return obs["state"] if isinstance(obs, Mapping) else obs


def make(task: str, num_envs: int, device: str = "cpu", full_reset: bool = True, **config: Any) -> JaxEnvs:
    """Loads a task of the registry; `config` has entries of the task's configuration, by their full names.

    Raises:
        ConfigError: there is no such task, or its configuration has no such entry.
    """
    if task not in registry.ALL_ENVS:
        raise unknown(f"playground/{task}", registry.ALL_ENVS)
    given = registry.get_default_config(task)
    if device == "cpu" and "impl" in given:
        config = {"impl": "jax"} | config  # Playground's default, Warp, needs a GPU
    try:
        given.update_from_flattened_dict(config)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"--env-kwargs do not fit playground/{task}: {' '.join(str(error).split())}") from error
    env = registry.load(task, given)
    steps = math.ceil(given.episode_length / given.action_repeat)  # the configuration counts repetitions
    return JaxEnvs(Playground(env, full_reset, given.action_repeat), num_envs, steps, device)
