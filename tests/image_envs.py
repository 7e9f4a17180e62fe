"""Small environments with images, registered when this is imported: `tests.image_envs:Name-v0`."""

from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Space


def image(*shape: int) -> Box:
    return Box(0, 255, shape, np.uint8)


SPACES: dict[str, Space] = {
    "last": image(36, 40, 3),
    "first": image(3, 36, 40),
    "grey": image(40, 44),
    "grey_odd": image(37, 39),  # 1443 bytes: a record needs padding
    "grey_last": image(36, 36, 1),
    "grey_first": image(1, 38, 36),
    "two": image(36, 36, 2),
    "large": image(90, 100, 3),
    "large_first": image(3, 90, 100),
    "large_grey": image(90, 100),
    "small": image(20, 24, 3),
    "small_first": image(3, 20, 44),
    "dict": Dict(
        {
            "camera": image(36, 40, 3),
            "depth": image(37, 39),
            "gear": Discrete(3, start=-1),
            "speed": Box(-np.inf, np.inf, (3,), np.float32),
        }
    ),
    "more_vectors": Dict(
        {"arm": Box(-5.0, 5.0, (2, 2), np.float64), "bits": MultiBinary(3), "eye": image(3, 37, 39), "tag": Discrete(5)}
    ),
    "nested": Dict({"inner": Dict({"camera": image(36, 40, 3)})}),
    "vectors_only": Dict({"speed": Box(-1.0, 1.0, (2,), np.float32), "gear": Discrete(3)}),
}


class Pictures(gym.Env):
    """Random observations of a space chosen by name from SPACES; rewards 3, −2, 3, … whatever is done.

    From step `at_step` on, counted over all episodes, what it returns is wrong in the way of `fault`, if the seed it
    was given last is `only_seed` (None: any): shape, transposed, fraction or brighter (of an image), vector (its
    shape), nan (in "speed").
    """

    def __init__(
        self, obs: str = "last", length: int = 5, fault: str = "none", at_step: int = 0, only_seed: int | None = None
    ) -> None:
        self.observation_space, self.action_space = deepcopy(SPACES[obs]), Discrete(3)
        self.length, self.fault, self.at_step, self.only_seed = length, fault, at_step, only_seed
        self._steps = self._total = 0
        self._seed: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self._seed = seed
            self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._steps, self._total = self._steps + 1, self._total + 1
        obs = self.observation_space.sample()
        if self.fault != "none" and self._total > self.at_step and self.only_seed in (None, self._seed):
            obs = self._spoiled(obs)
        return obs, 3.0 if self._steps % 2 else -2.0, self._steps >= self.length, False, {}

    def _spoiled(self, obs: Any) -> Any:
        if self.fault == "nan":
            return obs | {"speed": np.array([0.0, np.nan, 0.0], np.float32)}
        if self.fault == "vector":
            return obs | {"speed": np.ones(1, np.float32)}
        changes = {
            "shape": lambda pixels: pixels[:-1],
            "transposed": lambda pixels: pixels.swapaxes(0, 1),
            "fraction": lambda pixels: pixels + np.float32(0.5),
            "brighter": lambda pixels: np.full(pixels.shape, 256),
        }
        if isinstance(obs, dict):
            return obs | {"camera": changes[self.fault](obs["camera"])}
        return changes[self.fault](obs)


class CountingImages(gym.Env):
    """Pixels tell, channel by channel: steps taken in this episode, its number, the seed, the action before.

    Each episode ends after a number of steps drawn from 1 to `longest` (`length` if that is not 0), by termination, a
    time limit or both: that is drawn as well, or is `ending`. The reward is the number of steps taken.
    """

    def __init__(self, longest: int = 9, length: int = 0, ending: str = "any") -> None:
        self.observation_space, self.action_space = image(36, 38, 4), Discrete(3)
        self.longest, self.length, self.ending = longest, length, ending
        self._seed, self._episode = 0, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, -1
        self._steps, self._action, self._episode = 0, 0, self._episode + 1
        self._limit = self.length or int(self.np_random.integers(1, self.longest + 1))
        kinds = ("terminated", "truncated", "both")
        self._kind = kinds[int(self.np_random.integers(3))] if self.ending == "any" else self.ending
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps, self._action = self._steps + 1, int(action)
        done = self._steps >= self._limit
        ends = done and self._kind != "truncated", done and self._kind != "terminated"
        return self._obs(), float(self._steps), *ends, {}

    def _obs(self) -> np.ndarray:
        numbers = np.array([self._steps, self._episode % 256, self._seed % 256, self._action], np.uint8)
        return np.broadcast_to(numbers, (36, 38, 4)).copy()


class Lives(Pictures):
    """Pictures as a game with three lives, of which every third step costs one; the last ends the game.

    It has an `ale`, as games of the Arcade Learning Environment do, and nothing else of them.
    """

    def __init__(self, truncate_after: int = 0) -> None:
        super().__init__("grey", length=9)
        self.ale, self.truncate_after = "an emulator", truncate_after

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        obs, info = super().reset(seed=seed)
        return obs, info | {"lives": 3}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, self._steps == self.truncate_after, info | {"lives": 3 - self._steps // 3}


class Drift(gym.Env):
    """A bright block, which actions in [−1, 1] push to the left or to the right, and a vector with its speed.

    Nothing is random: an episode begins as all others do, and ends by a time limit after `length` steps.
    """

    def __init__(self, length: int = 8) -> None:
        self.observation_space = Dict({"camera": image(36, 40, 3), "speed": Box(-2.0, 2.0, (2,), np.float32)})
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._steps, self._place, self._speed = 0, 16.0, 0.0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._steps, self._speed = self._steps + 1, 0.5 * self._speed + float(action[0])
        self._place = min(max(self._place + 3 * self._speed, 0.0), 32.0)
        return self._obs(), -abs(self._place - 24) / 8, False, self._steps >= self.length, {}

    def _obs(self) -> dict[str, np.ndarray]:
        camera = np.full((36, 40, 3), (10, 20, 30), np.uint8)
        camera[12:20, round(self._place) : round(self._place) + 8] = (250, 120, 60)
        return {"camera": camera, "speed": np.array([self._speed, -self._speed], np.float32)}


gym.register("Drift-v0", entry_point=Drift)
gym.register("Pictures-v0", entry_point=Pictures)
gym.register("CountingImages-v0", entry_point=CountingImages)
gym.register("Lives-v0", entry_point=Lives)


class Lit(gym.Env):
    """A number that is always the same, beside an image that differs from seed to seed."""

    observation_space = Dict({"image": Box(0, 255, (36, 36, 1), np.uint8), "number": Box(-1.0, 1.0, (1,), np.float32)})
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        image = self.np_random.integers(0, 255, (36, 36, 1), np.uint8)
        return {"image": image, "number": np.zeros(1, np.float32)}, {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        return self.reset()[0], 0.0, False, False, {}


gym.register("Lit-v0", entry_point=Lit)
