"""Environments in JAX for tests, which need no other package."""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.functional_jax_env import FunctionalJaxVectorEnv
from gymnasium.experimental.functional import FuncEnv


class Drift(FuncEnv):
    """A number that is pushed by 0 or 1 and by noise until it is above 2, and is seen through noise."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def initial(self, rng: Any, params: Any = None) -> Any:
        return {"place": jax.random.uniform(rng), "name": jax.random.bits(rng)}

    def transition(self, state: Any, action: Any, rng: Any, params: Any = None) -> Any:
        return state | {"place": state["place"] + 0.3 * action + 0.1 * jax.random.normal(rng)}

    def observation(self, state: Any, rng: Any, params: Any = None) -> Any:
        return jnp.stack((state["place"], jax.random.normal(rng)))

    def reward(self, state: Any, action: Any, next_state: Any, rng: Any, params: Any = None) -> Any:
        return -jnp.abs(next_state["place"])

    def terminal(self, state: Any, rng: Any, params: Any = None) -> Any:
        return state["place"] > 2

    def transition_info(self, state: Any, action: Any, next_state: Any, params: Any = None) -> dict[str, Any]:
        return {"is_success": next_state["place"] > 1}


class DriftVectorEnv(FunctionalJaxVectorEnv):
    metadata = {"jax": True, "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, max_episode_steps: int = 0) -> None:
        super().__init__(Drift(), num_envs, max_episode_steps, self.metadata)


gym.register("JaxDrift-v0", vector_entry_point=DriftVectorEnv, max_episode_steps=9)  # type: ignore[arg-type]
