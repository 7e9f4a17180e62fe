"""Single-environment wrappers that Gymnasium does not have, and what protects a run from its environments."""

import importlib.util
import math
import traceback
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, flatdim, flatten

from fabricrl.envs.spaces import SMALLEST_IMAGE, is_image
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.records import Records

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


class ActionRepeat(gym.Wrapper):
    """Each action is taken `count` times, or until the episode ends; rewards are summed."""

    def __init__(self, env: gym.Env, count: int) -> None:
        super().__init__(env)
        self.count = count

    def step(self, action: Any) -> tuple:
        total = 0.0
        for _ in range(self.count):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class LifeLoss(gym.Wrapper):
    """Says in `info["life_lost"]` when a life was lost, for who learns from it; the game and its return go on."""

    tells_lives = True

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._lives = 0
        if not is_atari(env):
            raise ConfigError("--life-loss is set: it can be for Atari games, which count lives")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        obs, info = self.env.reset(seed=seed, options=options)
        self._lives = info["lives"]
        return obs, info

    def step(self, action: Any) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        before, self._lives = self._lives, info["lives"]
        return obs, reward, terminated, truncated, info | {"life_lost": self._lives < before}


class PackImages(gym.ObservationWrapper):
    """Observations with images, alone or in a flat Dict, as records of bytes (see `utils/records.py`).

    Args:
        grayscale: images of three colours, transparent or not, become one channel, by the weights of ITU-R 601.
        resize: height and width of images, by area; None: as they are.

    Raises:
        ConfigError: an image is too small for the encoder, or OpenCV is needed and not here.
    """

    def __init__(self, env: gym.Env, grayscale: bool = False, resize: int | None = None) -> None:
        super().__init__(env)
        space = env.observation_space
        parts = space.spaces if isinstance(space, Dict) else {"image": space}
        self._vectors = {key: part for key, part in parts.items() if not is_image(part)}
        self._images = {key: part for key, part in parts.items() if is_image(part)}
        self._single = not isinstance(space, Dict)
        self._grayscale, self._resize = grayscale, resize
        if grayscale or resize is not None:
            require_opencv("--grayscale" if grayscale else "--resize")
        shapes = {key: self._process(np.zeros(part.shape or (), np.uint8)).shape for key, part in self._images.items()}
        for key, shape in shapes.items():
            sides = shape if len(shape) == 2 else shape[1:] if shape[0] < shape[-1] else shape[:-1]
            if min(sides) < SMALLEST_IMAGE:
                raise ConfigError(
                    f"observation {key!r} is an image of {sides[0]} × {sides[1]}: the encoder takes "
                    f"{SMALLEST_IMAGE} × {SMALLEST_IMAGE} and more; --resize 84 enlarges it"
                )
        self.records = Records({key: flatdim(part) for key, part in self._vectors.items()}, shapes)
        self.observation_space = self.records

    def observation(self, observation: Any) -> np.ndarray:
        record = np.empty(self.records.size, np.uint8)
        parts = {"image": observation} if self._single else observation
        if not isinstance(parts, Mapping) or not parts.keys() >= self._vectors.keys() | self._images.keys():
            what = sorted(map(str, parts)) if isinstance(parts, Mapping) else type(parts).__name__
            raise EnvError(f"an observation is {what}, its space is {self.env.observation_space}")
        floats = record[: 4 * self.records.num_floats].view(np.float32)
        at = 0
        for key, part in self._vectors.items():
            if np.shape(parts[key]) != part.shape or not (isinstance(part, Box) or part.contains(parts[key])):
                raise EnvError(f"part {key!r} is {parts[key]} of shape {np.shape(parts[key])}, its space is {part}")
            size = self.records.vectors[key]
            floats[at : at + size] = np.asarray(flatten(part, parts[key]))
            at += size
        end = 4 * at
        for key, image in self.records.images.items():
            given = parts[key]
            if not isinstance(given, np.ndarray):
                raise EnvError(f"image {key!r} is a {type(given).__name__}, its space is {self._images[key]}")
            if given.shape != self._images[key].shape or given.dtype != np.uint8:
                raise EnvError(f"image {key!r} is {given.dtype} {given.shape}, its space is {self._images[key]}")
            pixels = self._process(given)
            end = image.start + pixels.size
            record[image.start : end] = pixels.reshape(-1)
        record[end:] = 0
        return record

    def _process(self, image: np.ndarray) -> np.ndarray:
        if not self._grayscale and self._resize is None:
            return image
        import cv2  # here, as it takes a moment and few runs need it

        if image.ndim == 3 and image.shape[0] < image.shape[-1]:
            image = np.ascontiguousarray(image.transpose(1, 2, 0))
        if self._grayscale and image.ndim == 3 and image.shape[-1] in (3, 4):
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if image.shape[-1] == 3 else cv2.COLOR_RGBA2GRAY)
        if self._resize is not None and image.shape[:2] != (self._resize, self._resize):
            planes = [image] if image.ndim == 2 else np.split(image, range(4, image.shape[-1], 4), -1)
            size = (self._resize, self._resize)  # OpenCV takes up to four channels at once
            image = np.dstack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
            image = image[..., 0] if image.shape[-1] == 1 else image
        return image


def is_atari(env: gym.Env) -> bool:
    """Whether this is a game of the Arcade Learning Environment."""
    return hasattr(env.unwrapped, "ale")


def require_opencv(what: str, extra: str = "images") -> None:
    """Raises ConfigError, with the command, unless OpenCV is here."""
    if importlib.util.find_spec("cv2") is None:
        raise ConfigError(f"{what} needs a package that is not here: pip install -e '.[{extra}]'")


class NameFailures(gym.Wrapper):
    """Turns what an environment raises into an EnvError with its index, which also crosses a pipe unharmed.

    And copies an episode's last observation: the reset that follows at once may write into the same array.
    """

    def __init__(self, env: gym.Env, index: int) -> None:
        super().__init__(env)
        self.index = index
        self._shape = env.observation_space.shape
        self._tells_lives = env.has_wrapper_attr("tells_lives")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
        except BaseException as error:  # also SystemExit: an environment does not end a run quietly
            raise self._named("reset", error) from error
        self._check(obs, "reset")
        return obs, {}

    def step(self, action: Any) -> tuple:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            reward, terminated, truncated = float(reward), bool(terminated), bool(truncated)
        except BaseException as error:
            raise self._named("step", error) from error
        if getattr(obs, "shape", None) != self._shape:
            self._check(obs, "step")
        # What an environment tells besides is for people: names such as `final_obs` mean something to buffers
        told = {"life_lost": info["life_lost"]} if self._tells_lives else {}
        return (deepcopy(obs) if terminated or truncated else obs), reward, terminated, truncated, told

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
