"""Choice of what steps the environments: checks `--vectorization`, and makes the choice where it is auto.

A script sees no difference: the first observation of the next episode follows the end of an episode, whose final
observation is in `infos["final_obs"]`. A back end that cannot do that marks the rows to skip: see `NativeVectorEnv`.
"""

import contextlib
import difflib
import importlib.util
import math
import os
import sys
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Space
from gymnasium.vector import VectorEnv

from fabricrl.envs.atari import AtariVectorEnv, is_game
from fabricrl.envs.envpool import EnvPoolVectorEnv, envpool_id
from fabricrl.envs.guard import close_problem
from fabricrl.envs.native import NativeVectorEnv
from fabricrl.envs.options import DEFAULTS, option
from fabricrl.envs.spaces import env_actions, mask_choices
from fabricrl.envs.wrappers import Masks
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.extras import missing

# What is done to Atari games in C++, too
ATARI_OPTIONS = {"action_repeat", "noop_max", "life_loss", "grayscale", "resize", "frame_stack"}
NATIVE_FROM = 16  # environments; with fewer a step of Gymnasium's CartPole takes as long either way
LEAST_ROWS = 8  # of a minibatch of native environments, and most trainers that share one
ROUND_TRIP = 1.2e-4  # seconds that a step of an environment in another process takes besides its own work


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

    name = envpool_id(args.env_id)
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
    plain = env.unwrapped.observation_space.shape == env.observation_space.shape  # neither packed nor flattened
    return has_native_form(args) and (plain or is_game(args.env_id))


def has_native_form(args: Any) -> bool:
    """Returns True if there is a native form of what the arguments ask for, and so many environments that it pays."""
    atari = is_game(args.env_id)
    if _of_single(args, atari) or not hasattr(args, "num_steps"):  # a replay buffer takes no row that only resets
        return False
    return atari or (_is_native(args.env_id) and args.num_envs >= NATIVE_FROM and _fills_minibatches(args))


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
