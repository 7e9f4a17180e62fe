"""Vector environments that tests understand completely, beside single ones: `tests.vector_envs:Name-v0`."""

import time
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tests.envs import vectors


class Step(NamedTuple):
    """True events of one step of one environment; `t` counts calls of `step` from the first reset."""

    t: int
    env: int
    obs: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


MADE: list["StaggeredVector"] = []  # in the order in which they were made


class StaggeredVector(VectorEnv):
    """Observation (steps in this episode, number of the episode, number of the environment); reward: the steps.

    Episodes take from one step to seven. In turn one is terminated, one truncated, and one both at once. The array that
    holds observations is always the same.

    Args:
        mode: when an environment that has ended is reset, a name of AutoresetMode.
        reset_reward: what the step earns that only resets; Gymnasium's environments earn nothing there.

    Attributes:
        history: what happened, without the steps that only reset.
    """

    def __init__(self, num_envs: int = 1, mode: str = "next_step", reset_reward: float = 0.0) -> None:
        self.num_envs, self.mode, self.reset_reward = num_envs, AutoresetMode[mode.upper()], reset_reward
        self.metadata = {"autoreset_mode": self.mode}
        self.single_observation_space, self.single_action_space = vectors(3), Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.history: list[Step] = []
        self._t, self._obs = 0, np.zeros((num_envs, 3), np.float32)
        self._ended = np.zeros(num_envs, bool)
        MADE.append(self)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._obs[:] = 0
        self._obs[:, 2] = (seed or 0) + np.arange(self.num_envs)
        self._ended[:] = False
        return self._obs, {}

    def step(self, actions: Any) -> tuple:
        assert self.action_space.contains(actions)
        rewards, infos = np.full(self.num_envs, self.reset_reward), {}
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        finals = np.full(self.num_envs, None, dtype=object)
        for env in range(self.num_envs):
            if self._ended[env]:
                self._begin(env)
                self._ended[env] = False
                continue
            before = self._obs[env].copy()
            self._obs[env, 0] += 1
            steps, episode, index = map(int, self._obs[env])
            done, kind = steps == 1 + (5 * index + 3 * episode) % 7, (index + episode) % 3
            rewards[env], terminated[env], truncated[env] = steps, done and kind != 1, done and kind != 0
            ends = bool(terminated[env]), bool(truncated[env])
            self.history.append(Step(self._t, env, before, int(actions[env]), steps, *ends, self._obs[env].copy()))
            if done and self.mode == AutoresetMode.SAME_STEP:
                finals[env] = self._obs[env].copy()
                self._begin(env)
                infos = {"final_obs": finals}
            elif done:
                self._ended[env] = True
        self._t += 1
        return self._obs, rewards, terminated, truncated, infos

    def _begin(self, env: int) -> None:
        self._obs[env, 0] = 0
        self._obs[env, 1] += 1


class Staggered(gym.Env):
    """The same, one environment; only its spaces are ever asked for."""

    def __init__(self, **_: Any) -> None:
        self.observation_space, self.action_space = vectors(3), Discrete(3)


class Slow(gym.Env):
    """A step takes so many seconds of sleep; an episode eight steps.

    `fails`: how many steps from the first on, over all environments of this process, raise.
    """

    failed = 0

    def __init__(self, seconds: float = 0.0, fails: int = 0) -> None:
        self.seconds, self.fails = seconds, fails
        self.observation_space, self.action_space = vectors(1), Discrete(2)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if Slow.failed < self.fails:
            Slow.failed += 1
            raise RuntimeError("a cable is loose")
        if self.seconds:  # a sleep of 0 lets others have the core
            time.sleep(self.seconds)
        self._steps += 1
        return np.zeros(1, np.float32), 1.0, self._steps == 8, False, {}


gym.register("Staggered-v0", entry_point=Staggered, vector_entry_point=StaggeredVector)
gym.register("SlowSteps-v0", entry_point=Slow)
gym.register("CartPool-v1", entry_point=Slow)  # which EnvPool does not have, but nearly
