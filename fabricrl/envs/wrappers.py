"""Single-environment wrappers that Gymnasium does not have, and what protects a run from its environments."""

import math
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from numpy import ndarray

from fabricrl.envs.guard import Timeout
from fabricrl.envs.packing import Packer, velocities
from fabricrl.envs.spaces import mask_choices
from fabricrl.envs.values import INTERFACE, NUMBERS, Observation, as_array, flag, number
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError, RunError
from fabricrl.utils.records import Records

INFO = (dict, type(None), Mapping)  # what may stand beside an observation


class KeepPromises(gym.Wrapper):
    """Holds an environment to what its spaces promise; the innermost of our wrappers.

    Lists, tensors and numbers of other types become arrays of the space if that loses nothing; a reward becomes one
    number. Nested Dicts and Tuples become one flat Dict, without text. Shapes, types and integers are checked in every
    step, bounds of real numbers at each reset.

    Args:
        keys: parts of the observation to keep; none: all.
        everything: check the bounds of real numbers in every step, too.

    Attributes:
        given: the space of what the environment returns.
        left_out: names of the parts that are text.

    Raises:
        ConfigError: keys that are not there.
        EnvError: there is no space; later, from `reset` and `step`, what was returned does not fit.
    """

    def __init__(self, env: gym.Env, keys: Sequence[str] = (), everything: bool = False) -> None:
        super().__init__(_unguarded(env))
        for name in ("observation_space", "action_space"):
            if getattr(env, name, None) is None:
                raise EnvError(f"{type(env.unwrapped).__name__} has no {name}")
        if not isinstance(env.metadata, dict):
            self.metadata = {}
        self.given = env.observation_space
        observation = Observation(self.given, keys)
        self.left_out = [] if keys else observation.left_out
        if observation.space is not env.observation_space:
            self.observation_space = observation.space
        single, self._everything = observation.single, everything
        self._read = single or observation
        # An array of this type and shape needs no reading, unless the numbers in it matter
        plain = single is not None and not single.limited and not everything
        self._type, self._shape = (single.dtype, single.shape) if single is not None and plain else (None, None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        answer = self.env.reset(seed=seed, options=options)
        if not (isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[1], INFO)):
            raise EnvError(f"a {type(answer).__name__}, not (observation, info); {INTERFACE}")
        obs, info = answer
        return self._read(obs, True), info

    def step(self, action: Any) -> tuple:
        obs, reward, terminated, truncated, info = answer = self.env.step(action)
        if (
            obs.__class__ is ndarray
            and obs.dtype is self._type
            and obs.shape == self._shape
            and isinstance(reward, float)
            and terminated.__class__ is bool
            and truncated.__class__ is bool
        ):
            return answer  # in a tenth of a microsecond
        obs = self._read(obs, self._everything)
        reward = number(reward, "a reward")
        return obs, reward, flag(terminated, "`terminated`"), flag(truncated, "`truncated`"), info


def _unguarded(env: gym.Env) -> gym.Env:
    """Removes `gym.make`'s check for a step before the first reset, which costs more than all checks here."""
    if isinstance(env, OrderEnforcing):
        return env.env
    if isinstance(env, TimeLimit) and isinstance(env.env, OrderEnforcing):
        env.env = env.env.env
    return env


class MaskVelocities(gym.ObservationWrapper):
    """Sets the velocities in observations to zero, so that the policy needs memory.

    Raises:
        ConfigError: the positions of velocities in this environment's observations are unknown.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._masked = velocities(env.spec.id if env.spec is not None else str(env))

    def observation(self, observation: np.ndarray) -> np.ndarray:
        observation = observation.copy()  # the environment may keep the one it returned
        observation[self._masked] = 0.0
        return observation


class ActionRepeat(gym.Wrapper):
    """Repeats each action `count` times, or until the episode ends, and sums the rewards."""

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
    """Reports a lost life in `info["life_lost"]`; the game and its return go on."""

    tells_lives = True

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._lives = 0
        if not is_atari(env):
            raise ConfigError("--life-loss is set: it needs an Atari game, which counts lives")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        obs, info = self.env.reset(seed=seed, options=options)
        self._lives = info["lives"]
        return obs, info

    def step(self, action: Any) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        before, self._lives = self._lives, info["lives"]
        return obs, reward, terminated, truncated, info | {"life_lost": self._lives < before}


class PackImages(gym.ObservationWrapper):
    """Observations with images as records of bytes: see `Packer`."""

    def __init__(self, env: gym.Env, grayscale: bool = False, resize: int | None = None) -> None:
        super().__init__(env)
        self._pack = Packer(env.observation_space, grayscale, resize)
        self.observation_space = self._pack.space

    def observation(self, observation: Any) -> np.ndarray:
        return self._pack(observation)


def is_atari(env: gym.Env) -> bool:
    """Returns True for games of the Arcade Learning Environment."""
    return hasattr(env.unwrapped, "ale")


class NameFailures(gym.Wrapper):
    """Turns what an environment raises into an EnvError with its index, which also crosses a pipe unharmed.

    Also copies an episode's last observation, which must be finite: the reset that follows may write into the same
    array, and not every buffer checks it.

    Of what an environment tells in its infos it passes on the numbers in `keys` at an episode's end (`episode_info`
    [K], NaN for what is missing), and which actions are allowed (`action_mask` [L], bool).

    Args:
        keys: names of the numbers.
        masked: whether the environment has masks, in `action_masks()` or in `info["action_mask"]`.
    """

    def __init__(self, env: gym.Env, index: int, keys: Sequence[str] = (), masked: bool = False) -> None:
        super().__init__(env)
        self.index, self.keys = index, keys
        self._masks = Masks(env) if masked else None
        self.mask_size = self._masks.size if self._masks is not None else 0
        space = env.observation_space
        self._floats = slice(4 * space.num_floats) if isinstance(space, Records) else None
        self._tells_lives = env.has_wrapper_attr("tells_lives")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        try:
            obs, info = self.env.reset(seed=seed, options=options)
            told = {} if self._masks is None else {"action_mask": self._masks(info)}
        except (Exception, SystemExit, Timeout) as error:  # an environment does not end a run quietly; Ctrl-C does
            raise self._named("reset", error) from error
        return obs, told

    def step(self, action: Any) -> tuple:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            ended = terminated or truncated  # the next mask is then that of the reset that follows
            # What an environment tells besides is for people: names such as `final_obs` mean something to buffers
            told = {"life_lost": info["life_lost"]} if self._tells_lives else {}
            if self._masks is not None and not ended:
                told["action_mask"] = self._masks(info)
            if ended and info and any(key in info for key in self.keys):
                told["episode_info"] = np.array([as_number(info.get(key)) for key in self.keys])
        except (Exception, SystemExit, Timeout) as error:
            raise self._named("step", error) from error
        return (self._last(obs) if ended else obs), reward, terminated, truncated, told

    def _last(self, obs: np.ndarray) -> np.ndarray:
        """A copy of an episode's last observation. Raises NonFiniteError if it has NaN or infinity."""
        obs = obs.copy()
        numbers = obs if self._floats is None else obs[self._floats].view(np.float32)
        if np.count_nonzero(np.isfinite(numbers)) != numbers.size:
            raise NonFiniteError(f"final observation of environment {self.index} is not finite")
        return obs

    def _named(self, call: str, error: BaseException) -> RunError:
        if isinstance(error, RunError):  # by our own wrappers
            return type(error)(f"environment {self.index} returned from {call} {error}")
        if _is_misunderstood(error):
            return EnvError(f"environment {self.index} cannot be asked to {call} ({error}); {INTERFACE}")
        traceback.print_exception(error)
        return EnvError(f"environment {self.index} failed in {call}: {type(error).__name__}: {error}")


class Masks:
    """Reads which actions an environment allows now: from its method `action_masks()`, or else from its infos.

    Raises:
        EnvError: the mask has another size, or a variable of the action has no choice left.
    """

    def __init__(self, env: gym.Env) -> None:
        self._method = env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None
        choices = mask_choices(env.action_space)
        self.size, self._starts = sum(choices), np.cumsum([0, *choices[:-1]])

    def __call__(self, info: Mapping[str, Any] | None) -> np.ndarray:
        """The mask [L]; all True if the environment has none now."""
        given = (info or {}).get("action_mask") if self._method is None else self._method()
        if given is None:
            return np.ones(self.size, bool)
        parts = given if isinstance(given, tuple | list) else (given,)  # perhaps one for each variable
        mask = np.concatenate([as_array(part).reshape(-1) for part in parts]).astype(bool)
        if mask.shape != (self.size,):
            raise EnvError(f"an action mask of {mask.size} entries, where its action space needs {self.size}")
        if not np.logical_or.reduceat(mask, self._starts).all():
            raise EnvError("an action mask that allows no action")
        return mask


def has_masks(env: gym.Env) -> bool:
    """Returns True if an environment says which actions are allowed. Without `action_masks()` it is reset to see."""
    if not mask_choices(env.action_space):
        return False
    if env.has_wrapper_attr("action_masks"):
        return True
    try:
        _, info = env.reset(seed=0)
    except (Exception, SystemExit):  # it will fail again, and then with its name
        return False
    return "action_mask" in (info or {})


def as_number(value: Any) -> float:
    """The number in `value`, NaN if there is none."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    one = isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in NUMBERS
    return float(value.item()) if one else math.nan


def _is_misunderstood(error: BaseException) -> bool:
    """Returns True if `reset` or `step` does not follow Gymnasium's interface: its arguments, or what it returned."""
    words = ("to unpack", "cannot unpack", "unexpected keyword argument", "positional argument")
    if not isinstance(error, TypeError | ValueError) or not any(word in str(error) for word in words):
        return False
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
    library = Path(gym.__file__).parent
    return place in (library, library / "wrappers", Path(__file__).parent)


class RecordEpisodes(gym.wrappers.RecordVideo):
    """Records every `every`-th of `episodes` episodes, up to `max_frames` each, as `<folder>/<prefix>-episode-N.mp4`.

    The frames of one episode are all that is ever held in memory. Needs render_mode "rgb_array". An environment that
    cannot be drawn, or a video that cannot be written, costs the videos and a warning, not the run.
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
                fps=env.metadata.get("render_fps") or 30,
                disable_logger=True,
            )
        self._max_frames = max_frames
        self._given_up = False

    def step(self, action: Any) -> tuple:
        if self.recording and len(self.recorded_frames) > self._max_frames:
            self.stop_recording()
        return super().step(action)

    def start_recording(self, video_name: str) -> None:
        if not self._given_up:
            super().start_recording(video_name)

    def stop_recording(self) -> None:
        try:
            super().stop_recording()
        except Exception as error:
            self._give_up("a video cannot be written", error)

    def _capture_frame(self) -> None:
        frames: list[Any] = self.recorded_frames
        try:
            frames.append(as_frame(self.env.render(), frames[0].shape[:2] if frames else None))
        except Exception as error:
            if frames:
                self.stop_recording()
            self._give_up("the environment cannot be drawn", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self.recorded_frames, self.recording = [], False
        if not self._given_up:
            self._given_up = True
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {what} ({text}): no more videos", file=sys.stderr, flush=True)


def as_frame(picture: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Converts a picture to a video frame: uint8 [H, W, 3], with even sides.

    Also takes grey pictures, channels first, real numbers up to 1 or 255, and lists of pictures, of which it takes the
    last. A picture of another size than `size` is cropped or padded at its lower and right edge.

    Raises:
        EnvError, ValueError: it is not a picture.
    """
    frame = as_array(picture)
    frame = frame[-1] if frame.ndim == 4 and len(frame) else frame
    frame = frame[..., None] if frame.ndim == 2 else frame
    if frame.ndim == 3 and frame.shape[-1] not in (1, 3, 4) and frame.shape[0] in (1, 3, 4):
        frame = np.moveaxis(frame, 0, -1)
    if frame.ndim != 3 or frame.shape[-1] not in (1, 3, 4) or not frame.size or frame.dtype.kind not in NUMBERS:
        raise ValueError(f"render returned a {type(picture).__name__} of shape {frame.shape}, which is not a picture")
    frame = frame[..., [0, 0, 0] if frame.shape[-1] == 1 else [0, 1, 2]]
    if frame.dtype != np.uint8:
        share = frame.dtype.kind in "bf" and np.nanmax(frame) <= 1  # of full light
        frame = np.clip(np.nan_to_num(frame.astype(np.float64) * (255 if share else 1)), 0, 255).astype(np.uint8)
    height, width = size or (frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2)
    frame = frame[:height, :width]
    missing = height - frame.shape[0], width - frame.shape[1]
    return np.pad(frame, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge") if any(missing) else frame
