"""Environments of EnvPool: `--vectorization envpool`."""

import json
import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fabricrl.envs.episode_infos import batched_infos, info_keys
from fabricrl.envs.options import option
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.records import Records

ATARI_WORDS = {"repeat_action_probability", "full_action_space", "max_num_frames_per_episode", "frameskip", "obs_type"}


class EnvPoolVectorEnv(VectorEnv):
    """EnvPool (Weng et al. 2022, arXiv:2206.10558): environments in C++ threads, with the spaces that Gymnasium's have.

    EnvPool alone resets in the step after an episode's last. This class resets those environments at once, in a
    separate call, so that no row only resets.

    Args:
        env: one environment of Gymnasium's with the same id and arguments, which says how spaces look.

    Raises:
        ConfigError: the arguments do not fit, or EnvPool's observations have another shape.
    """

    def __init__(self, args: Any, env: gym.Env) -> None:
        self.num_envs = args.num_envs
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._name, self._kwargs = envpool_id(args.env_id), json.loads(args.env_kwargs)
        self._life_loss = option(args, "life_loss")
        self._keys = info_keys(args)
        if args.env_id.startswith("ALE/"):
            spec = env.spec.kwargs if env.spec else {}
            self._kwargs = _atari_settings(args, spec) | {k: v for k, v in self._kwargs.items() if k not in ATARI_WORDS}
        pool = self._make([0], 1)
        self._limit = pool.spec.config.max_episode_steps
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds that are rounded
            shape, theirs = pool.observation_space.shape, pool.action_space
        space = self.single_observation_space
        self._padding = math.prod(space.shape or ()) - math.prod(shape)
        if self._padding not in (range(4) if isinstance(space, Records) else (0,)):
            raise ConfigError(f"--vectorization envpool: EnvPool's observations of {args.env_id} are {shape}")
        same = theirs.n == env.action_space.n if isinstance(env.action_space, Discrete) else True  # type: ignore[union-attr]
        if not same or theirs.shape != env.action_space.shape:
            raise ConfigError(f"--vectorization envpool: EnvPool's actions of {args.env_id} are {theirs}")
        self._channels_first = len(shape) == 3 and shape[0] < shape[-1]
        self._action_type = theirs.dtype if isinstance(theirs, Box) else np.dtype(np.int32)
        self._pool: Any = None
        self._lives = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes; seeds require new environments, since EnvPool takes them in the constructor."""
        if seed is not None or self._pool is None:
            seeds = seed if isinstance(seed, list) else [(seed or 0) + i for i in range(self.num_envs)]
            self._pool = self._make([seed % 2**31 for seed in seeds], self.num_envs, self._limit + 1)
        obs, info = self._pool.reset()
        self._steps[:] = 0
        if self._life_loss:
            self._lives[info["env_id"]] = info["lives"]
        return self._obs(obs), {}

    def step(self, actions: Any) -> tuple:
        obs, rewards, terminated, _, info = self._pool.step(np.asarray(actions, dtype=self._action_type))
        self._steps += 1
        # By its own limit EnvPool says of an episode that ends with the last step that is allowed only that it was cut
        truncated = self._steps >= self._limit
        obs, infos = self._obs(obs), dict[str, Any]()
        if (terminated | truncated).any():
            infos |= batched_infos(self._keys, info, terminated | truncated)
        if self._life_loss:
            infos["life_lost"] = info["lives"] < self._lives
            self._lives = info["lives"].copy()
        ended = terminated | truncated
        if ended.any():
            infos["final_obs"], obs = obs, obs.copy()
            self._steps[ended] = 0
            first, info = self._pool.reset(np.flatnonzero(ended).astype(np.int32))
            obs[info["env_id"]] = self._obs(first)
            if self._life_loss:
                self._lives[info["env_id"]] = info["lives"]
        return obs, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        self._pool = None

    def _make(self, seeds: list[int], num_envs: int, limit: int | None = None) -> Any:
        import envpool

        kwargs = self._kwargs | ({} if limit is None else {"max_episode_steps": limit})
        try:
            return envpool.make(
                self._name, env_type="gymnasium", num_envs=num_envs, seed=seeds[0], env_seed=seeds, **kwargs
            )
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"--env-kwargs do not fit EnvPool's {self._name}: {error}") from error
        except RuntimeError as error:
            raise EnvError(f"EnvPool cannot make {self._name}: {error}") from error

    def _obs(self, obs: np.ndarray) -> np.ndarray:
        """Converts observations to the space's form [N, ...]: channels last, images as records."""
        if self._channels_first:
            obs = np.moveaxis(obs, 1, -1)
        if self._padding:
            obs = np.pad(obs.reshape(len(obs), -1), ((0, 0), (0, self._padding)))
        return obs.reshape(len(obs), *(self.single_observation_space.shape or ()))


def envpool_id(env_id: str) -> str:
    return env_id.removeprefix("ALE/")


def _atari_settings(args: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """EnvPool's names for the arguments of an Atari game, and settings implied by Gymnasium's id."""
    frames = spec.get("max_num_frames_per_episode", 108_000)
    return {
        "stack_num": 1,
        "frame_skip": args.action_repeat,
        "noop_max": max(args.noop_max, 1),  # draws from what is below
        "gray_scale": args.grayscale,
        "img_height": args.resize,
        "img_width": args.resize,
        "repeat_action_probability": spec.get("repeat_action_probability", 0.25),
        "full_action_space": spec.get("full_action_space", False),
        "max_episode_steps": frames // args.action_repeat,
        "use_fire_reset": False,
        "episodic_life": False,
        "reward_clip": False,
    }
