"""Stands for MuJoCo Playground 0.2, with a task that needs JAX alone: see `tests.counting`."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass
class State:
    data: Any
    obs: Any
    reward: Any
    done: Any
    metrics: Any
    info: Any

    def replace(self, **fields: Any) -> "State":
        return replace(self, **fields)


class Noisy:
    """A point that is moved by actions and noise, until it is further than 1 from 0."""

    action_size = 2

    def reset(self, rng: Any) -> State:
        rng, draw = jax.random.split(rng)
        point, info = jax.random.uniform(draw, (2,), minval=-0.5, maxval=0.5), {"rng": rng}
        return State(point, self._obs(point), jnp.float32(0), jnp.float32(0), {"far": jnp.float32(0)}, info)

    def step(self, state: State, action: Any) -> State:
        rng, draw = jax.random.split(state.info["rng"])
        point = state.data + 0.2 * action + 0.05 * jax.random.normal(draw, (2,))
        far = jnp.linalg.norm(point)
        done = (far > 1).astype(jnp.float32)
        return State(point, self._obs(point), -far, done, {"far": far}, {"rng": rng})

    def _obs(self, point: Any) -> dict[str, Any]:
        return {"state": point, "privileged_state": jnp.concatenate((point, point))}


class Config(dict):
    __getattr__ = dict.__getitem__

    def update_from_flattened_dict(self, given: dict[str, Any]) -> None:
        for name in given:
            if name not in self:
                raise KeyError(f"Key {name!r} does not exist")
        self.update(given)


class registry:  # noqa: N801
    ALL_ENVS = ("NoisyPoint",)

    @staticmethod
    def get_default_config(name: str) -> Config:
        return Config(impl="warp", episode_length=1000, action_repeat=1)

    @staticmethod
    def load(name: str, config: Config) -> Noisy:
        assert config.impl == "jax"
        return Noisy()
