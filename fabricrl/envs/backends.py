"""Back ends that step many environments at once: Gymnasium's native vector environments, and EnvPool.

A script sees no difference: the first observation of the next episode follows the end of an episode, whose final
observation is in `infos["final_obs"]`. A back end that cannot do that marks the rows to skip: see `NativeVectorEnv`.
"""

import contextlib
import difflib
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fabricrl.envs.atari import AtariVectorEnv, is_game
from fabricrl.envs.guard import close_problem
from fabricrl.envs.spaces import env_actions, mask_choices
from fabricrl.envs.values import Part
from fabricrl.envs.wrappers import Masks
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.extras import missing
from fabricrl.utils.records import Records

# Values of arguments that an algorithm, or an older checkpoint, does not have
DEFAULTS: dict[str, Any] = {
    "obs_keys": (),
    "mask_velocities": False,
    "action_repeat": 1,
    "noop_max": 0,
    "life_loss": False,
    "grayscale": False,
    "resize": None,
    "frame_stack": 1,
    "capture_video": False,
}
TIMEOUT = 10.0  # minutes for a call of an environment; 0: no limit
ATARI_WORDS = {"repeat_action_probability", "full_action_space", "max_num_frames_per_episode", "frameskip", "obs_type"}
# What is done to Atari games in C++, too
ATARI_OPTIONS = {"action_repeat", "noop_max", "life_loss", "grayscale", "resize", "frame_stack"}
NATIVE_FROM = 16  # environments; with fewer a step of Gymnasium's CartPole takes as long either way
LEAST_ROWS = 8  # of a minibatch of native environments, and most trainers that share one
ROUND_TRIP = 1.2e-4  # seconds that a step of an environment in another process takes besides its own work


def option(args: Any, name: str) -> Any:
    """Value of an environment argument, or its default if `args` does not have it."""
    return getattr(args, name, TIMEOUT if name == "timeout" else DEFAULTS[name])


def info_keys(args: Any) -> tuple[str, ...]:
    """Names of the numbers that are read from an environment's infos at the end of an episode."""
    return tuple(dict.fromkeys(("is_success", *getattr(args, "info_keys", ()))))


def episode_infos(infos: dict[str, Any]) -> np.ndarray | None:
    """The numbers that environments have told at the ends of episodes in this step, [N, K], NaN where there is none.

    Returns None if no environment has told any.
    """
    final = infos.get("final_info")
    if final is None or "episode_info" not in final:
        return None
    return np.where(final["_episode_info"][:, None], final["episode_info"], np.nan)


def batched_infos(keys: Sequence[str], given: dict[str, Any], ended: np.ndarray) -> dict[str, Any]:
    """Converts infos that are arrays [N], as vector environments return them, for `episode_infos`.

    Args:
        ended: [N], which episodes ended with this step.
    """
    rows = np.full((len(ended), len(keys)), np.nan)
    for column, key in enumerate(keys):
        values = np.asarray(given.get(key, np.nan))
        if values.shape == ended.shape and values.dtype.kind in "biuf":
            rows[:, column] = np.where(ended & given.get(f"_{key}", True), values, np.nan)
    there = ~np.isnan(rows).all(1)
    return {"final_info": {"episode_info": rows, "_episode_info": there}} if there.any() else {}


def check_backend(args: Any, env: gym.Env) -> None:
    """Builds the native or EnvPool back end that `args.vectorization` names, compares it with `env`, and discards it.

    Raises:
        ConfigError: the back end does not have this environment with these arguments.
    """
    if args.vectorization == "async" and args.num_envs > (most := most_workers()):
        raise ConfigError(
            f"--num-envs is {args.num_envs}: with --vectorization async it must be at most {most}, each takes one of "
            "the files that a process may have open (ulimit -n)"
        )
    if args.vectorization not in ("native", "envpool"):
        return
    if args.vectorization == "envpool" and getattr(args, "check_spaces", False):
        raise ConfigError("--check-spaces is set: it needs another --vectorization than envpool")
    atari = args.env_id.startswith("ALE/") if args.vectorization == "envpool" else is_game(args.env_id)
    for name in _of_single(args, atari):
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} is set: it needs --vectorization sync or async, not {args.vectorization}")
    if args.vectorization == "native":
        if not atari and not _is_native(args.env_id):
            ids = sorted(spec.id for spec in gym.registry.values() if _is_native(spec.id))
            there = ", ".join([*ids, "and Atari games"])
            raise ConfigError(f"--vectorization native: {args.env_id} has no native form, unlike {there}")
        if not atari and not _fills_minibatches(args):
            raise ConfigError(
                "--vectorization native: steps that only reset are left out: num-envs × (num-steps // 2) must be at "
                f"least {LEAST_ROWS} × num-minibatches = {LEAST_ROWS * args.num_minibatches}"
            )
        _try_native(args, env)
        return
    if importlib.util.find_spec("envpool") is None:
        raise missing("--vectorization envpool", "envpool")
    import envpool  # here, as it takes a moment and few runs need it

    name = _envpool_id(args.env_id)
    if name not in envpool.list_all_envs():
        close = difflib.get_close_matches(name, envpool.list_all_envs(), n=3, cutoff=0.5)
        hint = f"; nearest are {', '.join(close)}" if close else ""
        raise ConfigError(f"--vectorization envpool: {args.env_id} is not an EnvPool environment{hint}")
    if atari and (option(args, "resize") is None or option(args, "action_repeat") < 2):
        raise ConfigError(
            "--vectorization envpool resizes and repeats actions of Atari games: give --resize and --action-repeat, or "
            "--preset atari"
        )
    EnvPoolVectorEnv(args, env).close()


def choose(args: Any, env: gym.Env, masked: bool = False) -> str:
    """Chooses for `--vectorization auto`: native if it exists and pays off, else the faster of sync and async, for
    which it steps `env` for a moment. An environment that fails here will fail again later, where that is reported.
    Environments that are `masked` are not native: few of those tell their masks."""
    if not masked and _native_pays(args, env):
        with contextlib.suppress(ConfigError, EnvError):  # its arguments or spaces are others: not for us
            _try_native(args, env)
            return "native"
    cores = cores_of_rank(args)
    if min(args.num_envs, cores) == 1:
        return "sync"
    saved = 1 - math.ceil(args.num_envs / cores) / args.num_envs  # share of the steps' time
    apart = args.num_envs <= most_workers() and _step_seconds(env, masked) * saved > ROUND_TRIP
    return "async" if apart else "sync"


def _native_pays(args: Any, env: gym.Env) -> bool:
    """Returns True if there may be a native form, of what the arguments ask for, that is faster than all others."""
    atari = is_game(args.env_id)
    if _of_single(args, atari) or not hasattr(args, "num_steps"):  # a replay buffer takes no row that only resets
        return False
    if atari:
        return True
    plain = env.unwrapped.observation_space.shape == env.observation_space.shape  # neither packed nor flattened
    return plain and _is_native(args.env_id) and args.num_envs >= NATIVE_FROM and _fills_minibatches(args)


def _of_single(args: Any, atari: bool) -> list[str]:
    """Names of the arguments that are set and that only environments which are stepped one by one have."""
    both = ATARI_OPTIONS if atari else ()
    return [name for name, default in DEFAULTS.items() if name not in both and option(args, name) != default]


def cores_of_rank(args: Any) -> int:
    """Processor cores of this machine for each of its ranks, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    import torch  # here, as workers start faster without

    if torch.distributed.is_initialized():  # ranks share the cores
        cores = max(cores * (getattr(args, "num_nodes", None) or 1) // torch.distributed.get_world_size(), 1)
    return cores


def native_envs(args: Any, env: gym.Env, masked: bool = False) -> VectorEnv:
    """The vector form of an environment, ale-py's or Gymnasium's. Raises ConfigError and EnvError as they do."""
    if is_game(args.env_id):
        return AtariVectorEnv(args, env, min(args.num_envs, cores_of_rank(args)))
    return NativeVectorEnv(args, env, masked)


def _try_native(args: Any, env: gym.Env) -> None:
    """Builds the vector form and discards it. Of games, which take a tenth of a second to load, one is enough."""
    args = SimpleNamespace(**vars(args) | {"num_envs": 1}) if is_game(args.env_id) else args
    close_problem(native_envs(args, env).close)


def most_workers() -> int:
    """The most environments that can have processes of their own: each takes a file of this process, others 64."""
    try:
        import resource
    except ImportError:  # elsewhere than on Unix there is no such limit
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - 64, 0)


def _step_seconds(env: gym.Env, masked: bool = False) -> float:
    """Median time of a step with a random action, without resets; 0 if the environment failed."""
    seconds: list[float] = []
    enough = 0.05  # seconds of trial, or five steps, or a second
    try:
        env.action_space.seed(0)
        masks, rng = Masks(env) if masked else None, np.random.default_rng(0)
        _, info = env.reset(seed=0)
        begin = perf_counter()
        while (passed := perf_counter() - begin) < enough or (len(seconds) < 5 and passed < 1.0):
            action = env.action_space.sample() if masks is None else _allowed_action(env.action_space, masks(info), rng)
            start = perf_counter()
            *_, terminated, truncated, info = env.step(action)
            seconds.append(perf_counter() - start)
            if terminated or truncated:
                _, info = env.reset()
    except RunError:  # what it returns does not fit: it will be told, with a name
        return 0.0
    except Exception as error:
        print(f"warning: environment failed in a trial: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 0.0
    return float(np.median(seconds))


def _allowed_action(space: Space, mask: np.ndarray, rng: np.random.Generator) -> Any:
    """Draws an action that the mask allows."""
    parts = np.split(mask, np.cumsum(mask_choices(space))[:-1])
    return env_actions(space, np.array([[rng.choice(np.flatnonzero(part)) for part in parts]]))[0]


def _is_native(env_id: str) -> bool:
    """Returns True if Gymnasium has a vector form of it in plain NumPy, with the same observations."""
    spec = gym.registry.get(env_id.rpartition(":")[2])
    if spec is None or spec.vector_entry_point is None or spec.entry_point is None:  # alone, it takes tensors
        return False
    return spec.namespace not in ("phys2d", "ALE", "torch")


def _fills_minibatches(args: Any) -> bool:
    """Returns True if minibatches have enough rows even when every other step only resets."""
    return args.num_envs * (args.num_steps // 2) >= LEAST_ROWS * args.num_minibatches


def _envpool_id(env_id: str) -> str:
    return env_id.removeprefix("ALE/")


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
        self._name, self._kwargs = _envpool_id(args.env_id), json.loads(args.env_kwargs)
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
