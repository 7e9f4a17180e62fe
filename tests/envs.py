"""Small environments that tests understand completely, registered when this is imported: `tests.envs:Name-v0`."""

import os
import random
import signal
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Space, Text, Tuple


def vectors(size: int) -> Box:
    """The space of observations of `size` numbers."""
    return Box(-np.inf, np.inf, (size,), np.float32)


class Identity(gym.Env):
    """The observation tells which action to take; a step earns 1 for the right one, less for a wrong one.

    Each step draws a new target, so only the action taken now matters. An episode takes `length` steps, and its best
    return is `length`.
    """

    def __init__(self, kind: str = "Discrete", length: int = 10) -> None:
        spaces: dict[str, tuple[Space, int]] = {
            "Discrete": (Discrete(4), 4),
            "MultiDiscrete": (MultiDiscrete([2, 3]), 5),
            "MultiBinary": (MultiBinary(3), 3),
            "Box": (Box(-1.0, 1.0, (2,), np.float32), 2),
        }
        self.kind, self.length = kind, length
        self.action_space, size = spaces[kind]
        self.observation_space = Box(-1.0, 1.0, (size,), np.float32)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action if self.kind != "Discrete" else int(action)), action
        reward = self._reward(np.asarray(action))
        self._steps += 1
        return self._draw(), reward, self._steps >= self.length, False, {}

    def _draw(self) -> np.ndarray:
        if self.kind == "Box":
            self._target = self.np_random.uniform(-0.8, 0.8, 2).astype(np.float32)
            return self._target
        if self.kind == "MultiBinary":
            self._target = self.np_random.integers(0, 2, 3)
            return self._target.astype(np.float32)
        choices = [4] if self.kind == "Discrete" else [2, 3]
        self._target = np.array([self.np_random.integers(n) for n in choices])
        return np.concatenate([np.eye(n, dtype=np.float32)[k] for n, k in zip(choices, self._target, strict=True)])

    def _reward(self, action: np.ndarray) -> float:
        if self.kind == "Box":
            return float(1.0 - np.abs(action - self._target).mean())
        return float((action.reshape(-1) == self._target).mean())


class Counting(gym.Env):
    """Observation (steps taken in this episode, number of the episode from 0, seed given last); reward: the steps.

    An episode is terminated after `terminate_after` steps and truncated after `truncate_after`; 0: never, and both
    may fall on the same step. The seed prolongs an episode by seed % stagger steps, so that environments side by side
    end at different times.
    """

    def __init__(self, terminate_after: int = 0, truncate_after: int = 0, stagger: int = 1) -> None:
        self.terminate_after, self.truncate_after, self.stagger = terminate_after, truncate_after, stagger
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = Discrete(2)
        self._steps, self._episode, self._seed = 0, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._seed = self._seed if seed is None else seed
        self._steps, self._episode = 0, self._episode + 1
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        steps = self._steps - self._seed % self.stagger
        terminated = self.terminate_after > 0 and steps >= self.terminate_after
        truncated = self.truncate_after > 0 and steps >= self.truncate_after
        return self._obs(), float(self._steps), terminated, truncated, {}

    def _obs(self) -> np.ndarray:
        return np.array([self._steps, self._episode, self._seed], dtype=np.float32)


class Deterministic(gym.Env):
    """No randomness whatever the seed; observation and reward depend on the actions of this episode.

    Every episode takes `length` steps, so that one that starts with a rollout whose length is a multiple ends with it.
    Actions turn the angle: by one of three amounts, or, if `continuous`, by any amount between two of other sizes.
    """

    def __init__(self, length: int = 8, truncate: bool = False, continuous: bool = False) -> None:
        self.length, self.truncate, self.continuous = length, truncate, continuous
        self.observation_space = Box(-2.0, 2.0, (3,), np.float32)
        self.action_space = Box(-0.7, 1.4, (1,), np.float32) if continuous else Discrete(3)
        self._steps, self._angle = 0, 0.3

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps, self._angle = 0, 0.3
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        self._angle += (float(action[0]) if self.continuous else 0.7 * (int(action) - 1)) + 0.1
        done = self._steps >= self.length
        return self._obs(), float(np.cos(self._angle)), done and not self.truncate, done and self.truncate, {}

    def _obs(self) -> np.ndarray:
        return np.array([np.sin(self._angle), np.cos(self._angle), self._steps / self.length], dtype=np.float32)


class Recall(gym.Env):
    """The first observation is a cue, ±1, and those of the `delay` steps after it are 0; then the episode ends.

    The action at the last of them earns 1 if it is that of the cue, 0 for −1 and 1 for +1; all others earn nothing.
    Whoever acts on the present observation alone sees 0 there, whatever the cue was, so that half of all episodes earn
    nothing in expectation, however it was trained. Half of all cues are +1.
    """

    def __init__(self, delay: int = 4) -> None:
        self.delay = delay
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self._steps, self.cue = 0, 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps, self.cue = 0, 2 * int(self.np_random.integers(2)) - 1
        return np.array([self.cue], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        done = self._steps == self.delay
        right = done and int(action) == (self.cue + 1) // 2
        self._steps += 1
        return np.zeros(1, np.float32), float(right), done, False, {}


class Dicey(gym.Env):
    """Draws from the global generators of Python, NumPy and, if `torch_too`, torch: when built, at resets, in steps.

    An action earns more the nearer it is to the first number seen. At an episode's end infos have `bias`, one number
    an environment, and `is_success`, whether that is above a half.
    """

    def __init__(self, continuous: bool = False, length: int = 6, torch_too: bool = True) -> None:
        self.length, self.torch_too = length, torch_too
        self.bias = float(np.random.rand())
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32) if continuous else Discrete(2)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        reward = self.bias - abs(float(np.asarray(action).reshape(-1)[0]) - float(self._obs[0]))
        info = {"is_success": self.bias > 0.5, "bias": self.bias} if self._steps == self.length else {"bias": -1e9}
        return self._draw(), reward, False, self._steps >= self.length, info

    def _draw(self) -> np.ndarray:
        numbers = [random.random(), np.random.rand(), 0.0]
        if self.torch_too:
            import torch  # here, as processes of other environments do without

            numbers[2] = torch.rand(()).item()
        self._obs = np.array(numbers, np.float32)
        return self._obs


MASKED: dict[str, tuple[Space, list[int]]] = {
    "Discrete": (Discrete(5, start=2), [5]),
    "MultiDiscrete": (MultiDiscrete([3, 2, 4]), [3, 2, 4]),
    "MultiBinary": (MultiBinary(3), [2, 2, 2]),
}


class Masked(gym.Env):
    """Refuses an action that its mask forbids. The observation is the mask, which is drawn anew in every step.

    The mask is told by the method `action_masks` (see `MaskedByMethod`), or in infos. At an episode's end, infos have
    `is_success`, whether all actions were the first that was allowed; `half`, in every other episode; and `text`.
    """

    def __init__(self, kind: str = "Discrete", length: int = 7, tells: bool = True) -> None:
        self.length, self.tells = length, tells
        self.action_space, self.choices = MASKED[kind]
        self.observation_space = Box(0.0, 1.0, (sum(self.choices),), np.float32)
        self._episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps, self._firsts, self._episode = 0, 0, self._episode + 1
        return self._draw()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        taken = np.asarray(action).reshape(-1) - getattr(self.action_space, "start", 0)
        parts = np.split(self._mask, np.cumsum(self.choices)[:-1])
        for part, choice in zip(parts, taken, strict=True):
            if not part[int(choice)]:
                raise ValueError(f"action {action!r} is forbidden by {self._mask}")
        first = all(int(choice) == part.argmax() for part, choice in zip(parts, taken, strict=True))
        self._steps, self._firsts = self._steps + 1, self._firsts + first
        obs, info = self._draw()
        if ended := self._steps == self.length:
            info |= {"is_success": self._firsts == self.length, "text": "good"}
            info |= {"half": np.float32(5.0)} if self._episode % 2 else {}
        return obs, float(first), ended, False, info

    def _draw(self) -> tuple[np.ndarray, dict]:
        masks = [self.np_random.random(n) < 0.5 for n in self.choices]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = True
        self._mask = np.concatenate(masks)
        return self._mask.astype(np.float32), {"action_mask": self._mask} if self.tells else {}


class MaskedByMethod(Masked):
    """Tells its masks as environments for sb3-contrib do."""

    def __init__(self, kind: str = "Discrete", length: int = 7) -> None:
        super().__init__(kind, length, tells=False)

    def action_masks(self) -> np.ndarray:
        return self._mask


class Scaled(Deterministic):
    """Observations around 500, as of a position in millimetres."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(-1e4, 1e4, self.observation_space.shape, np.float32)

    def _obs(self) -> np.ndarray:
        return 500 + 100 * super()._obs()


class Picture(gym.Env):
    """A picture [40, 44, 3] of noise that a bright square crosses, and rewards of many sizes and both signs.

    If `beside`, observations are a Dict of the picture, a vector and a gear. `tests.envs:PictureDict-v0` is that one.
    """

    def __init__(self, beside: bool = False, length: int = 7) -> None:
        self.beside, self.length = beside, length
        picture = Box(0, 255, (40, 44, 3), np.uint8)
        beside_it = {"speed": Box(-1.0, 1.0, (2,), np.float32), "gear": Discrete(3)}
        self.observation_space = Dict({"picture": picture, **beside_it}) if beside else picture
        self.action_space = Discrete(3)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._steps += 1
        reward = float(self.np_random.normal()) * 3 + int(action)
        return self._obs(), reward, False, self._steps >= self.length, {}

    def _obs(self) -> Any:
        picture = self.np_random.integers(0, 128, (40, 44, 3), np.uint8)
        picture[8:16, 4 * self._steps : 4 * self._steps + 8] = (250, 120, 60)
        if not self.beside:
            return picture
        speed = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"picture": picture, "speed": speed, "gear": self._steps % 3}


class TwoArgumentError(Exception):
    """Cannot be made from its text alone, as some libraries' errors cannot."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"code {code}: {text}")


class Fault(gym.Env):
    """Goes wrong in the way of `kind` from step `at_step` on, counted from 0 over all episodes of this environment.

    Args:
        kind: reward_nan, reward_inf, obs_nan, raise_step, raise_reset (the first reset after `at_step` steps, the very
            first if that is 0), raise_init, multi_arg_error, die (the process kills itself), none.
        only_seed: go wrong only in the environment whose last seed was this; None: in all.
        length: steps of an episode.
        continuous: whether actions are a Box.
    """

    def __init__(
        self,
        kind: str = "none",
        at_step: int = 0,
        only_seed: int | None = None,
        length: int = 8,
        continuous: bool = False,
    ) -> None:
        if kind == "raise_init":
            raise RuntimeError("this environment cannot be built")
        self.kind, self.at_step, self.only_seed, self.length = kind, at_step, only_seed, length
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32) if continuous else Discrete(2)
        self._total, self._steps, self._seed = 0, 0, None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._seed = self._seed if seed is None else seed
        self._steps = 0
        if self._fails("raise_reset"):
            raise RuntimeError("this environment cannot be reset")
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._fails("raise_step"):
            raise RuntimeError("this environment cannot step")
        if self._fails("multi_arg_error"):
            raise TwoArgumentError(17, "this environment is out of order")
        if self._fails("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        reward = np.nan if self._fails("reward_nan") else np.inf if self._fails("reward_inf") else 1.0
        obs = np.full(2, np.nan, dtype=np.float32) if self._fails("obs_nan") else self._obs()
        self._total, self._steps = self._total + 1, self._steps + 1
        return obs, float(reward), self._steps >= self.length, False, {}

    def _fails(self, kind: str) -> bool:
        return kind == self.kind and self._total >= self.at_step and self.only_seed in (None, self._seed)

    def _obs(self) -> np.ndarray:
        return np.array([self._steps / self.length, self._total % 5], dtype=np.float32)


ODD_SPACES: dict[str, Space] = {
    "box": Box(-1.0, 1.0, (3,), np.float32),
    "box_2d": Box(-1.0, 1.0, (2, 3), np.float32),
    "box_int": Box(0, 5, (2,), np.int64),
    "box_unbounded": Box(-np.inf, np.inf, (3,), np.float32),
    "box_half_bounded": Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, np.inf], np.float32)),
    "box_point": Box(np.array([-1.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32)),
    "box_uneven": Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32)),
    "dict": Dict({"speed": Box(-1.0, 1.0, (2,), np.float32), "gear": Discrete(3)}),
    "dict_sequence": Dict({"speed": Box(-1.0, 1.0, (2,), np.float32), "words": Sequence(Discrete(3))}),
    "dict_text": Dict({"hint": Text(8), "speed": Box(-1.0, 1.0, (2,), np.float32), "gear": Discrete(3)}),
    "dict_nested": Dict({"inner": Dict({"speed": Box(-1.0, 1.0, (2,), np.float32)})}),
    "discrete": Discrete(3),
    "discrete_start": Discrete(3, start=5),
    "multi_binary": MultiBinary(4),
    "multi_binary_2d": MultiBinary((2, 3)),
    "multi_discrete": MultiDiscrete([2, 3]),
    "multi_discrete_2d": MultiDiscrete([[2, 3], [4, 2]]),
    "multi_discrete_start": MultiDiscrete([2, 3], start=[1, -1]),
    "sequence": Sequence(Discrete(3)),
    "text": Text(8),
    "tuple": Tuple((Discrete(2), Box(-1.0, 1.0, (2,), np.float32))),
}


class Odd(gym.Env):
    """Spaces chosen by name from ODD_SPACES, random observations; refuses an action that is not in its space."""

    def __init__(self, obs: str = "box", action: str = "discrete", length: int = 5) -> None:
        self.observation_space, self.action_space, self.length = ODD_SPACES[obs], ODD_SPACES[action], length
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self._steps += 1
        return self.observation_space.sample(), 1.0, self._steps >= self.length, False, {}


class Telling(Odd):
    """Tells in its infos what means something to buffers, in every step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        *answer, _ = super().step(action)
        return (*answer, {"skipped": True, "life_lost": True, "final_obs": "nothing", "lives": 1})


class Misbehaving(gym.Env):
    """Exits, answers in odd types, pays too much, or writes all observations into one array."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, kind: str = "") -> None:
        self.kind, self.steps = kind, 0
        self.obs = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps, self.obs[:] = 0, 0.0
        return self.obs, {}

    def step(self, action: int) -> tuple:
        self.steps += 1
        self.obs[:] = self.steps
        if self.kind == "exit":
            raise SystemExit(0)
        obs = self.obs[:1] if self.kind == "shape" else self.obs
        reward = {"much": 1e25, "array": np.array([1.0])}.get(self.kind, 1.0)
        return obs, reward, False, self.steps == 5, {}


for _kind in ("Discrete", "MultiDiscrete", "MultiBinary", "Box"):
    gym.register(f"Identity{_kind}-v0", entry_point=Identity, kwargs={"kind": _kind})
gym.register("Counting-v0", entry_point=Counting)
gym.register("Deterministic-v0", entry_point=Deterministic)
gym.register("Scaled-v0", entry_point=Scaled)
gym.register("Fault-v0", entry_point=Fault)
gym.register("Odd-v0", entry_point=Odd)
gym.register("Recall-v0", entry_point=Recall)
gym.register("Dicey-v0", entry_point=Dicey)
gym.register("Masked-v0", entry_point=Masked)
gym.register("MaskedByMethod-v0", entry_point=MaskedByMethod)
gym.register("Picture-v0", entry_point=Picture)
gym.register("PictureDict-v0", entry_point=Picture, kwargs={"beside": True})
gym.register("Misbehaving-v0", entry_point=Misbehaving)
gym.register("Telling-v0", entry_point=Telling)
