"""Single-environment wrappers that Gymnasium does not have, and what protects a run from its environments."""

import math
import os
import signal
import sys
import traceback
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.launch import die_with_parent

# Where observations hold velocities, by id without version: the places that rl-baselines3-zoo masks
VELOCITIES = {
    "CartPole": (1, 3),
    "MountainCar": (1,),
    "MountainCarContinuous": (1,),
    "Pendulum": (2,),
    "LunarLander": (2, 3, 5),
}


class MaskVelocities(gym.ObservationWrapper):
    """Zero in place of each velocity in the observation, so that it takes memory to know them.

    Raises:
        ConfigError: it is not known where this environment's observations hold velocities.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        env_id = env.spec.id if env.spec is not None else str(env)
        name = env_id.rpartition("-v")[0]
        if name not in VELOCITIES:
            raise ConfigError(f"--mask-velocities is set: it can be for {', '.join(VELOCITIES)}, not for {env_id}")
        self._masked = list(VELOCITIES[name])

    def observation(self, observation: np.ndarray) -> np.ndarray:
        observation = observation.copy()  # the environment may keep the one it returned
        observation[self._masked] = 0.0
        return observation


class NameFailures(gym.Wrapper):
    """Turns what an environment raises into an EnvError with its index, which also crosses a pipe unharmed.

    And copies an episode's last observation: the reset that follows at once may write into the same array.
    """

    def __init__(self, env: gym.Env, index: int) -> None:
        super().__init__(env)
        self.index = index
        self._shape = env.observation_space.shape

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except BaseException as error:  # also SystemExit: an environment does not end a run quietly
            raise self._named("reset", error) from error
        self._check(obs, "reset")
        return obs, info

    def step(self, action: Any) -> tuple:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            reward, terminated, truncated = float(reward), bool(terminated), bool(truncated)
        except BaseException as error:
            raise self._named("step", error) from error
        if getattr(obs, "shape", None) != self._shape:
            self._check(obs, "step")
        return (deepcopy(obs) if terminated or truncated else obs), reward, terminated, truncated, info

    def _check(self, obs: Any, call: str) -> None:
        """Shared memory would take an observation of another shape and spread it."""
        if np.shape(obs) != self._shape:
            what = f"an observation of shape {np.shape(obs)} and type {np.asarray(obs).dtype}"
            raise EnvError(
                f"environment {self.index} returned from {call} {what}, its space is {self.observation_space}"
            )

    def _named(self, call: str, error: BaseException) -> EnvError:
        traceback.print_exception(error)
        return EnvError(f"environment {self.index} failed in {call}: {type(error).__name__}: {error}")


class RecordEpisodes(gym.wrappers.RecordVideo):
    """Records every `every`-th of `episodes` episodes, up to `max_frames` each, as `<folder>/<prefix>-episode-N.mp4`.

    The frames of one episode are all that is ever held in memory. Needs render_mode "rgb_array".
    """

    def __init__(
        self,
        env: gym.Env,
        folder: Path,
        prefix: str,
        every: int = 1,
        episodes: float = math.inf,
        max_frames: int = 5000,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # greedy and sampled episodes share a folder
            super().__init__(
                env,
                video_folder=str(folder),
                episode_trigger=lambda episode: episode % every == 0 and episode < episodes,
                name_prefix=prefix,
                disable_logger=True,
            )
        self._max_frames = max_frames

    def step(self, action: Any) -> tuple:
        if self.recording and len(self.recorded_frames) > self._max_frames:
            self.stop_recording()
        return super().step(action)


def shield_worker() -> None:
    """In the process of one asynchronous environment: leave signals to the script, and never outlive it.

    It ignores them, so that the iteration can end when a whole job is told to stop; on Linux the kernel ends it with
    its parent, however that died.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent()
