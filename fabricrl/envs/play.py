"""Playing episodes to their ends, as evaluation does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Space
from gymnasium.vector import VectorEnv

from fabricrl.envs.episode_infos import episode_infos
from fabricrl.envs.rows import floats_in
from fabricrl.utils.errors import NonFiniteError

Policy = Callable[..., Any]


class Episodes(NamedTuple):
    """Episodes in the order in which they ended.

    Attributes:
        returns, lengths: [E].
        infos: what environments have told at their ends, by name: [E], NaN where there was nothing.
    """

    returns: np.ndarray
    lengths: np.ndarray
    infos: dict[str, np.ndarray]

    def summary(self) -> dict[str, float | int]:
        """Mean, standard deviation over episodes, minimum and maximum of returns and lengths, and their number; of what
        environments have told the mean, over the episodes that have it."""
        result: dict[str, float | int] = {}
        for name, values in (("return", self.returns), ("length", self.lengths)):
            result |= {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std())}
            result |= {f"{name}_min": values.min().item(), f"{name}_max": values.max().item()}
        told = {f"{key}_mean": values[~np.isnan(values)] for key, values in self.infos.items()}
        result |= {name: float(values.mean()) for name, values in told.items() if len(values)}
        return result | {"episodes": len(self.returns)}


def play(
    envs: VectorEnv, policy: Policy, episodes: int, seed: int, after_step: Callable[[int], Any] = lambda ended: None
) -> Episodes:
    """Plays `episodes` episodes.

    Every environment plays its share to the end. Were the first to finish taken instead, short episodes would count
    too often.

    Args:
        envs: environments that reset in the step that ends an episode (SAME_STEP), or mark in `infos["skipped"]` those
            that only reset in a step.
        policy: maps observations [N, R], and rewards and dones [N] of the step before, to actions for `envs.step`. It
            is also given the masks [N, L] of the actions that are allowed, where environments have masks.
        seed: of environment 0; environment i has `seed + i`.
        after_step: called after each step of the environments with the number of episodes that it has ended.

    Raises:
        NonFiniteError: NaN or infinity came from an environment.
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    running, steps = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    returns: list[float] = []
    lengths: list[int] = []
    keys = getattr(envs, "keys", ())
    told: list[np.ndarray] = []
    obs, infos = envs.reset(seed=seed)
    _check_finite(obs, np.zeros(envs.num_envs), envs.single_observation_space)
    rewards, dones = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    while quota.any():
        masks = [infos["action_mask"]] if "action_mask" in infos else []
        obs, rewards, terminated, truncated, infos = envs.step(policy(obs, rewards, dones, *masks))
        _check_finite(obs, rewards, envs.single_observation_space)
        dones, skipped = terminated | truncated, infos.get("skipped", np.zeros(envs.num_envs, dtype=bool))
        running, steps = running + rewards, steps + ~skipped
        ended = np.flatnonzero(dones & (quota > 0))
        rows = episode_infos(infos) if len(ended) and keys else None
        for i in ended:
            told.append(np.full(len(keys), np.nan) if rows is None else rows[i])
            returns.append(float(running[i]))
            lengths.append(int(steps[i]))
            quota[i] -= 1
        running, steps = np.where(dones, 0.0, running), np.where(dones, 0, steps)
        dones = dones | skipped  # a step that only resets leads to the first observation, too
        after_step(len(ended))
    columns = np.array(told).reshape(len(told), len(keys)).T
    return Episodes(np.array(returns), np.array(lengths), dict(zip(keys, columns, strict=True)))


def _check_finite(obs: np.ndarray, rewards: np.ndarray, space: Space) -> None:
    """Raises NonFiniteError if there is NaN or infinity: the returns would be worth nothing."""
    for name, values in (("reward", rewards), ("observation", floats_in(obs, space))):
        if not np.isfinite(values).all():
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
            raise NonFiniteError(f"{name} of environment {np.flatnonzero(bad)[0]} is not finite")
