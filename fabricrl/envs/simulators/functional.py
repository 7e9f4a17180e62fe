"""Gymnasium's functional environments in JAX, `phys2d/CartPole-v1` and those that are registered like it.

`FunctionalJaxVectorEnv` itself is not stepped: it waits for the device in every step, and in Gymnasium 1.4 the other
environments stand still while one is reset. Its functions are what is taken.
"""

from typing import Any

from gymnasium.envs.functional_jax_env import FunctionalJaxVectorEnv
from gymnasium.experimental.functional import FuncEnv

from fabricrl.envs.simulators.jax import JaxEnvs


class Functional:
    """The `Task` of a functional environment, whose functions have been vectorised."""

    def __init__(self, env: FuncEnv) -> None:
        self.env, self.observation_space, self.action_space = env, env.observation_space, env.action_space

    def first(self, keys: Any) -> Any:
        return self.env.initial(rng=keys)

    def restart(self, state: Any, keys: Any) -> Any:
        return self.first(keys)

    def next(self, state: Any, actions: Any, keys: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        new = self.env.transition(state, actions, keys)
        told = self.env.step_info(state, actions, new)
        return new, self.env.reward(state, actions, new, keys), self.env.terminal(new, keys), told

    def observe(self, state: Any, keys: Any) -> Any:
        return self.env.observation(state, keys)


def as_tensors(envs: Any, device: str) -> JaxEnvs:
    """Environments that were made as a `FunctionalJaxVectorEnv`, as tensors on `device`."""
    if not isinstance(envs, FunctionalJaxVectorEnv):
        raise TypeError(f"environments in JAX must be a FunctionalJaxVectorEnv of Gymnasium, not {type(envs)}")
    return JaxEnvs(Functional(envs.func_env), envs.num_envs, envs.time_limit, device)
