"""Vector environments, wrapped as a run needs them; and a trial that finds mistakes before anything starts."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Box, Space
from gymnasium.vector import VectorEnv

from fabricrl.envs.backends import check_backend, choose, native_envs
from fabricrl.envs.construct import construct, construct_tensors
from fabricrl.envs.envpool import EnvPoolVectorEnv
from fabricrl.envs.episode_infos import info_keys
from fabricrl.envs.failures import ReportFailures
from fabricrl.envs.guard import (
    GRACE,
    VIDEO_GRACE,
    children,
    close_problem,
    end_processes,
    folder_kept,
    generators_kept,
    seed_generators,
    warn,
    watched,
)
from fabricrl.envs.options import DEFAULTS, TIMEOUT, option
from fabricrl.envs.spaces import (
    Spaces,
    check_action_space,
    check_bounded,
    check_observation_space,
    image_keys,
    is_flat,
    left_out_texts,
    mask_choices,
    odd_images,
)
from fabricrl.envs.sync import SequentialVectorEnv
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.envs.wrappers import (
    ActionRepeat,
    LifeLoss,
    MaskVelocities,
    NameFailures,
    PackImages,
    RecordEpisodes,
    has_masks,
    is_atari,
)
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.extras import require_opencv
from fabricrl.utils.records import Records

BUILD_STREAM = 3  # of the generators that environments draw from while they are built


def make_env(
    args: Any,
    render_mode: str | None = None,
    video_folder: Path | None = None,
    video_prefix: str = "train",
    video_every: int = 1,
    video_episodes: float = math.inf,
) -> gym.Env:
    """Makes an environment whose observations are one row: a vector, or a record if they contain images.

    Other observations are flattened, Discrete parts one-hot.

    Args:
        args: `env_id`, an id of Gymnasium, or `module:Id-v0`, where `module` registers the id and can be imported;
            `env_kwargs`, a JSON object of arguments for the environment's constructor; and of `backends.DEFAULTS` what
            the algorithm has.
        video_folder: where to record every `video_every`-th of the first `video_episodes` episodes; None: nowhere.

    Raises:
        ConfigError: the id or an argument is unknown, or a package is missing.
        EnvError: the constructor raised.
    """
    if video_folder is not None:
        render_mode = "rgb_array"
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # drawing into an array needs no screen
    env = construct(args, render_mode)
    if video_folder is not None:
        frames = 5000 * option(args, "action_repeat")  # most of an episode; it draws those between two steps, too
        env = RecordEpisodes(env, video_folder, video_prefix, video_every, video_episodes, frames)
    return _as_row(args, _preprocessed(args, env))


def _as_row(args: Any, env: gym.Env) -> gym.Env:
    if image_keys(env.observation_space):
        return PackImages(env, option(args, "grayscale"), option(args, "resize"))
    return env if is_flat(env.observation_space) else gym.wrappers.FlattenObservation(env)


def _preprocessed(args: Any, env: gym.Env) -> gym.Env:
    """Preprocesses one environment, up to where observations become one row."""
    repeat, noop_max = option(args, "action_repeat"), option(args, "noop_max")
    if option(args, "mask_velocities"):
        env = MaskVelocities(env)
    if _is_prepared_game(args, env):
        grayscale, size = option(args, "grayscale"), option(args, "resize")
        require_opencv("an Atari game with --action-repeat or --noop-max", "atari")
        screen = (160, 210) if size is None else size
        env = gym.wrappers.AtariPreprocessing(env, noop_max, repeat, screen, grayscale_obs=grayscale)
    elif noop_max > 0:
        raise ConfigError(f"--noop-max is {noop_max}: it needs an Atari game")
    elif repeat > 1:
        env = ActionRepeat(env, repeat)
    if not image_keys(env.observation_space):
        for name in ("grayscale", "resize", "frame_stack"):
            if option(args, name) != DEFAULTS[name]:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is set: {args.env_id} has no images among its observations")
    return LifeLoss(env) if option(args, "life_loss") else env


def _is_prepared_game(args: Any, env: gym.Env) -> bool:
    """Tells if Gymnasium's AtariPreprocessing makes the observations: each is of two frames of the game."""
    return is_atari(env) and (option(args, "action_repeat") > 1 or option(args, "noop_max") > 0)


def make_envs(
    args: Any, rank: int, video_folder: Path, masked: bool = False, first: int = 0, device: Any = "cpu"
) -> VectorEnv:
    """Makes the `args.num_envs` environments of a rank, which reset in the step that ends an episode (SAME_STEP).

    `step` returns the first observation of the next episode; the last one is in `infos["final_obs"]`. Native ones
    reset a step later, which `infos["skipped"]` marks. `infos["life_lost"]` is there if `args.life_loss`, and
    `infos["action_mask"]` [N, L], the actions that are allowed next, if they are `masked`, as `check_env` says.
    Rank 0 records its environment 0 if `args.capture_video`, and prints what `--vectorization auto` has chosen.
    `first`: the number of its first environment, where several ranks share those that one would have. `device`: of
    environments that take and return tensors.

    Raises:
        ConfigError, EnvError: as `make_env`; later, `reset` and `step` raise EnvError.
    """
    from fabricrl.utils.seeding import stream_seed  # here, as it brings torch, without which workers start faster

    kind, seconds = args.vectorization, _limit(args)
    if kind == "auto":
        if _takes_tensors(args):
            kind = "torch"
        else:
            with _passing(args, make_env) as env:
                kind = choose(args, env, masked)
        if rank == 0:
            print(f"vectorization: {kind}", file=sys.stderr, flush=True)
    record = args.capture_video and rank == 0
    grace, resumed = VIDEO_GRACE if record else GRACE, getattr(args, "resume", None) is not None
    settings: dict[str, Any] = {"timeout": seconds / 60, "rank": rank, "resumed": resumed, "grace": grace}
    settings["keys"] = info_keys(args)
    if kind == "torch":
        return ReportFailures(construct_tensors(args, device), **settings)
    if kind in ("native", "envpool"):
        with _passing(args, make_env) as env:
            return ReportFailures(
                native_envs(args, env, masked) if kind == "native" else EnvPoolVectorEnv(args, env), **settings
            )
    plain, spec = SimpleNamespace(**vars(args)), None if ":" in args.env_id else gym.registry.get(args.env_id)
    numbers = range(first, first + args.num_envs)
    makers = [
        partial(_numbered, plain, index, spec, video_folder if record and index == 0 else None, masked)
        for index in numbers
    ]
    seeds = [stream_seed(args.seed, 0 if first else rank, BUILD_STREAM, index) for index in numbers]
    if kind == "sync":
        return make_sync_envs(makers, seeds, **settings)
    threads = sys.modules["torch"].get_num_threads()
    with watched(seconds, "environments"):
        envs = WorkerVectorEnv(makers, seeds, _module_of(args.env_id, spec), threads, grace)
    return ReportFailures(envs, **settings)


def make_eval_envs(args: Any, rank: int, num_envs: int, masked: bool, like: VectorEnv) -> VectorEnv:
    """Makes `num_envs` environments that are played beside those in training, `like`, and have nothing in common with
    them: other seeds, and global generators that are put back.

    They are stepped in processes if those in training are, else in turn.

    Raises:
        ConfigError, EnvError: as `make_envs`; `reset` and `step` do what they do there.
    """
    from fabricrl.utils.seeding import EVAL_STREAM, stream_seed  # here, as it brings torch

    kind = "async" if isinstance(like.unwrapped, WorkerVectorEnv) else "sync"
    changed = {"num_envs": num_envs, "vectorization": kind, "capture_video": False, "resume": None}
    changed["seed"] = stream_seed(args.seed, EVAL_STREAM)
    with generators_kept():
        if _takes_tensors(args):
            return play_tensors(SimpleNamespace(**vars(args) | changed), like.env.device, told=like.told)  # type: ignore[attr-defined]
        envs = make_envs(SimpleNamespace(**vars(args) | changed), rank, Path(), masked)
    envs.told = like.told  # type: ignore[attr-defined]  # one warning is enough
    return envs


def play_tensors(args: Any, device: Any = "cpu", **settings: Any) -> "ReportFailures":
    """Makes tensor environments that are played with arrays, as all others are."""
    from fabricrl.envs.tensors import OnHost

    return ReportFailures(OnHost(construct_tensors(args, device)), **{"keys": info_keys(args)} | settings)


def _limit(args: Any) -> float:
    """Seconds for a call of an environment: with several ranks at most half of what they wait for each other, so that
    the error names the environment and not a rank."""
    import torch  # here, as workers start faster without

    return option(args, "timeout") * (30 if torch.distributed.is_initialized() else 60)


def _numbered(args: Any, index: int, spec: Any, video_folder: Path | None, masked: bool) -> gym.Env:
    """Makes environment `index`; `spec` registers its id in a process that may not know it."""
    if spec is not None:
        gym.registry[spec.id] = spec
    env = make_env(args, None, video_folder, video_every=args.video_every)
    return NameFailures(env, index, info_keys(args), masked)


def _module_of(env_id: str, spec: Any) -> str:
    """Module to import for an environment; empty if another process could not find it."""
    if ":" in env_id:
        return env_id.partition(":")[0]
    if env_id.startswith("ALE/"):
        return "ale_py"
    entry = spec.entry_point if spec is not None else ""
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    return "" if module == "__main__" else module


def make_sync_envs(
    makers: Sequence[Callable[[], gym.Env]], seeds: Sequence[int] | None = None, **settings: Any
) -> "ReportFailures":
    """Makes environments that this process steps one after the other.

    Args:
        seeds: of the global generators while each environment is built; None: leave the generators alone.
        settings: of `ReportFailures`.

    Raises:
        ConfigError, EnvError: one could not be built; the others are closed.
    """
    before, built = children(), []
    seconds = 60 * settings.get("timeout", TIMEOUT)

    def build(index: int) -> gym.Env:
        if seeds is not None:
            seed_generators(seeds[index])
        with watched(seconds, f"environment {index} failed in the constructor"):
            built.append(makers[index]())
        return built[-1]

    try:
        with generators_kept():
            thunks = [partial(build, index) for index in range(len(makers))]
            envs = SequentialVectorEnv(thunks)
    except BaseException as error:
        for env in built:
            close_problem(env.close)
        end_processes(children() - before)
        if isinstance(error, RunError) or not isinstance(error, Exception):
            raise
        raise EnvError(f"environments cannot be built: {type(error).__name__}: {error}") from error
    return ReportFailures(envs, started=children() - before, **settings)


@contextlib.contextmanager
def _passing(args: Any, make: Callable[[Any], gym.Env]) -> Iterator[gym.Env]:
    """Builds an environment for a moment and leaves nothing of it behind."""
    before = children()
    trial = f"an environment of {args.env_id} failed in a trial"
    with generators_kept(), folder_kept(), watched(_limit(args), trial):
        env = None
        try:
            env = make(args)
            yield env
        finally:
            if env is not None:
                close_problem(env.close)  # its complaints on closing do not matter yet
            end_processes(children() - before)


def check_env(
    args: Any,
    action_spaces: tuple[type[Space], ...],
    render_mode: str | None,
    bounded: bool = False,
    images: bool = False,
) -> Spaces:
    """Builds one environment and discards it, so that mistakes are reported before anything starts.

    `bounded`: actions must be a Box with finite bounds; `images`: observations may have images.

    Raises:
        ConfigError: the environment does not exist, has spaces that are not supported, cannot be rendered, or has no
            velocities to mask.
        EnvError: its constructor raised.
    """
    if _takes_tensors(args):
        return _check_tensors(args, action_spaces, bounded)
    with _passing(args, construct) as env:
        env = _preprocessed(args, env)
        given = env.observation_space if _is_prepared_game(args, env) else env.get_wrapper_attr("given")
        check_observation_space(env.observation_space, images)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            texts = [f"warning: {text}" for text in odd_images(env.observation_space)]
            for text in texts + left_out_texts(env.get_wrapper_attr("left_out"), env.observation_space):
                print(text, file=sys.stderr, flush=True)
        check_action_space(env.action_space, action_spaces)
        if bounded:
            check_bounded(env.action_space)
        modes = list(env.metadata.get("render_modes") or [])
        shown = render_mode == "human" and "rgb_array" in modes  # Gymnasium shows such pictures in a window
        if render_mode is not None and render_mode not in modes and not shown:
            others = f"only as {', '.join(map(str, modes))}" if modes else "as its metadata names no render_modes"
            raise ConfigError(f"--env-id {args.env_id} cannot be rendered as {render_mode!r}, {others}")
        env = _as_row(args, env)
        space = env.observation_space
        assert isinstance(space, Box)
        if getattr(args, "norm_obs", False) and isinstance(space, Records) and not space.num_floats:
            raise ConfigError("--norm-obs is set: it normalises numbers, but all observations are images")
        for name in () if isinstance(space, Records) else ("random_shift", "cnn_features"):
            default = getattr(type(args), name, None)  # of those from a command line; others have been checked
            if default is not None and getattr(args, name) != default:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is set: {args.env_id} has no images among its observations")
        check_backend(args, env)
        masked = has_masks(env)
        if masked and args.vectorization == "envpool":
            warn(f"--vectorization envpool: {args.env_id} has action masks, which are not there")
            masked = False
        mask_size = sum(mask_choices(env.action_space)) if masked else 0
        return Spaces(space, env.action_space, mask_size, given)


def _takes_tensors(args: Any) -> bool:
    from fabricrl.envs.tensors import takes_tensors  # here, as it brings torch

    return takes_tensors(args)


def _check_tensors(args: Any, action_spaces: tuple[type[Space], ...], bounded: bool) -> Spaces:
    """Builds one environment of tensors and discards it, as `check_env` does with others."""
    from fabricrl.envs.tensors import check_arguments, trial_device

    check_arguments(args)
    device, one = trial_device(args), SimpleNamespace(**vars(args) | {"num_envs": 1})
    with _passing(one, partial(construct_tensors, device=device)) as env:
        envs: Any = env
        check_action_space(envs.single_action_space, action_spaces)
        if bounded:
            check_bounded(envs.single_action_space)
        return Spaces(
            envs.single_observation_space, envs.single_action_space, 0, envs.unwrapped.single_observation_space
        )
