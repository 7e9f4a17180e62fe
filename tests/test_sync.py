"""Environments that are stepped in turn do what Gymnasium's do."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fabricrl.envs.sync import SequentialVectorEnv


class Talker(gym.Wrapper):
    """Tells something in every info; `space` replaces the actions, which the environment does not see then."""

    def __init__(self, env: gym.Env, space: gym.Space | None = None) -> None:
        super().__init__(env)
        self.seen: list[Any] = []
        if space is not None:
            self.action_space = space

    def reset(self, **options: Any) -> tuple:
        obs, _ = self.env.reset(**options)
        return obs, {"mask": np.array([True, False])}

    def step(self, action: Any) -> tuple:
        self.seen.append(copy.copy(action))
        given = action if self.action_space is self.env.action_space else 0
        obs, reward, terminated, truncated, _ = self.env.step(given)
        told = {"mask": np.array([False, True]), "sum": float(obs.sum())}
        return obs, reward, terminated, truncated, told | ({"lost": terminated} if terminated or obs[0] > 0 else {})


def talker(env_id: str, limit: int, space: gym.Space | None = None) -> gym.Env:
    return Talker(gym.make(env_id, max_episode_steps=limit), space)


def plain(value: Any) -> Any:
    """The same in lists and types, which can be compared."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype, value.tolist()
    return [plain(part) for part in value] if isinstance(value, tuple | list | np.ndarray) else value


@pytest.mark.parametrize(
    "make",
    [
        partial(gym.make, "CartPole-v1"),
        partial(gym.make, "Pendulum-v1", max_episode_steps=7),
        partial(talker, "CartPole-v1", 12),
        partial(talker, "Pendulum-v1", 5),
        partial(talker, "CartPole-v1", 12, MultiDiscrete([3, 2])),
        partial(talker, "CartPole-v1", 12, MultiBinary(4)),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_steps_are_those_of_gymnasium(make: Callable[[], gym.Env], count: int) -> None:
    ours = SequentialVectorEnv([make] * count)
    theirs = SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    seeds, kept, ended = list(range(count)), [], 0
    assert plain(ours.reset(seed=seeds)) == plain(theirs.reset(seed=seeds))
    ours.action_space.seed(1)
    for _ in range(60):
        actions = ours.action_space.sample()
        answer = ours.step(actions)
        assert plain(answer) == plain(theirs.step(actions))
        kept.append((answer[1:], plain(answer[1:])))
        ended += int((answer[2] | answer[3]).sum())
    assert ended > count
    assert all(plain(parts) == before for parts, before in kept)  # all but the observations is the caller's to keep
    if isinstance(ours.envs[0], Talker):
        assert [plain(env.seen) for env in ours.envs] == [plain(env.seen) for env in theirs.envs]
