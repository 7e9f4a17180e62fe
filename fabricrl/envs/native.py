"""Environments of Gymnasium that have a vector form of their own: `--vectorization native`."""

import json
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

from fabricrl.envs.episode_infos import batched_infos, info_keys
from fabricrl.envs.spaces import mask_choices
from fabricrl.envs.values import Part
from fabricrl.utils.errors import ConfigError, EnvError


class NativeVectorEnv(gym.vector.VectorWrapper):
    """A vector environment that resets in the step *after* an episode's last.

    That step ignores the action, earns nothing and belongs to no episode. `infos["skipped"]` [N] marks the
    environments that are resetting, so that the step reaches no loss, no statistic and no buffer.

    Args:
        env: one environment with the same id and arguments, as a script sees it.
        masked: whether it has action masks, which must be in the infos of all resets and steps then.

    Raises:
        ConfigError: the arguments do not fit, or the native form has other spaces.
        EnvError: it cannot be built; later, `reset` or `step` returned what its spaces do not allow.
    """

    def __init__(self, args: Any, env: gym.Env, masked: bool = False) -> None:
        try:
            kwargs = json.loads(args.env_kwargs)
            envs = gym.make_vec(args.env_id, args.num_envs, vectorization_mode="vector_entry_point", **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"--env-kwargs {args.env_kwargs} does not fit the native {args.env_id}: {error}"
            ) from error
        except Exception as error:
            raise EnvError(f"the native {args.env_id} cannot be built: {type(error).__name__}: {error}") from error
        super().__init__(envs)
        mode = envs.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ConfigError(f"--vectorization native: {args.env_id} resets in a way that is not supported ({mode})")
        theirs = envs.single_observation_space, envs.single_action_space
        for there, here in zip(theirs, (env.observation_space, env.action_space), strict=True):
            same_kind = isinstance(here, Box) or there == here
            if there.shape != here.shape or there.dtype != here.dtype or not same_kind:
                raise ConfigError(f"--vectorization native: {args.env_id} has {there} there, and {here} otherwise")
        if envs.num_envs != args.num_envs:
            raise EnvError(
                f"the native {args.env_id} has {envs.num_envs} environments where {args.num_envs} were asked"
            )
        self._obs = Part(envs.observation_space)
        self._check_all = getattr(args, "check_spaces", False)
        self._next_step = mode == AutoresetMode.NEXT_STEP
        self._ended = np.zeros(args.num_envs, dtype=bool)
        self._keys = info_keys(args)
        self._choices = mask_choices(env.action_space) if masked else []

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes; the first of a list of seeds seeds all."""
        self._ended[:] = False
        obs, given = self.env.reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)
        return self._checked("reset", obs, True), self._masks("reset", given)

    def step(self, actions: Any) -> tuple:
        obs, rewards, terminated, truncated, given = self.env.step(actions)
        columns = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        obs = self._checked("step", obs, self._check_all)
        self._check_columns(columns)
        infos = self._masks("step", given)
        if self._next_step:
            skipped, infos["final_obs"] = self._ended, obs
            if skipped.any():
                infos["skipped"] = skipped
                rewards = np.where(skipped, 0.0, rewards)
                terminated, truncated = terminated & ~skipped, truncated & ~skipped
            self._ended = terminated | truncated
        elif (terminated | truncated).any():
            if "final_obs" not in given:
                raise EnvError("the native environments ended episodes without `final_obs` in their infos")
            infos["final_obs"] = given["final_obs"]
        if (ended := terminated | truncated).any():
            infos |= batched_infos(self._keys, given if self._next_step else given.get("final_info", {}), ended)
        return obs, rewards, terminated, truncated, infos

    def _masks(self, call: str, given: dict[str, Any]) -> dict[str, Any]:
        """The masks [N, L]. Where an episode has just ended, the next step only resets, whatever they say."""
        if not self._choices:
            return {}
        shape = len(self._ended), sum(self._choices)
        if getattr(given.get("action_mask"), "shape", None) != shape:
            raise EnvError(
                f"the native environments returned no action masks of shape {shape} from {call}; --vectorization sync "
                "asks each environment"
            )
        return {"action_mask": np.asarray(given["action_mask"], bool)}

    def _checked(self, call: str, obs: Any, everything: bool) -> np.ndarray:
        """Checks that values are [N, ...], as the spaces promise; a buffer would broadcast any other shape."""
        try:
            return self._obs(obs, everything)
        except EnvError as error:
            raise EnvError(f"the native environments returned from {call} {error}") from error

    def _check_columns(self, columns: dict[str, Any]) -> None:
        for name, column in columns.items():
            if getattr(column, "shape", None) != self._ended.shape:
                shape = np.shape(column)
                raise EnvError(
                    f"the native environments returned {name} of shape {shape} from step, not {self._ended.shape}"
                )
