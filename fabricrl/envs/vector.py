"""Vector environments: construction, and failures that name the environment."""

import contextlib
import difflib
import importlib
import importlib.util
import json
import math
import os
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Space
from gymnasium.vector import VectorEnv

from fabricrl.envs.backends import (
    DEFAULTS,
    TIMEOUT,
    EnvPoolVectorEnv,
    check_backend,
    choose,
    episode_infos,
    info_keys,
    native_envs,
    option,
)
from fabricrl.envs.guard import (
    GRACE,
    VIDEO_GRACE,
    Keeper,
    Process,
    Timeout,
    Watch,
    children,
    close_problem,
    end_processes,
    folder_kept,
    generators_kept,
    reset_signals_in_children,
    seed_generators,
    warn,
    watched,
)
from fabricrl.envs.rows import floats_in
from fabricrl.envs.simulators import SIMULATORS, register, simulator_of
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
from fabricrl.envs.turns import TurnsVectorEnv
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.envs.wrappers import (
    ActionRepeat,
    KeepPromises,
    LifeLoss,
    MaskVelocities,
    NameFailures,
    PackImages,
    RecordEpisodes,
    has_masks,
    is_atari,
)
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.extras import missing, require_opencv
from fabricrl.utils.records import Records

BUILD_STREAM = 3  # of the generators that environments draw from while they are built

# Module that is missing -> extra that brings it
EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "box2d": "box2d", "ale_py": "atari", "jax": "jax", "flax": "jax"}


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
    env = _construct(args, render_mode)
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
    `infos["action_mask"]` [N, S], the actions that are allowed next, if they are `masked`, as `check_env` says.
    Rank 0 records its environment 0 if `args.capture_video`, and prints what `--vectorization auto` has chosen.
    `first`: the number of its first environment, where several ranks share those that one would have. `device`: of
    environments that take and return tensors.

    Raises:
        ConfigError, EnvError: as `make_env`; later, `reset` and `step` raise EnvError.
    """
    from fabricrl.utils.utils import stream_seed  # here, as it brings torch, without which workers start faster

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
        return ReportFailures(_construct_tensors(args, device), **settings)
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
        return step_in_turn(makers, seeds, **settings)
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
    from fabricrl.utils.utils import EVAL_STREAM, stream_seed  # here, as it brings torch

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

    return ReportFailures(OnHost(_construct_tensors(args, device)), **{"keys": info_keys(args)} | settings)


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


def step_in_turn(
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
            envs = TurnsVectorEnv(thunks)
    except BaseException as error:
        for env in built:
            close_problem(env.close)
        end_processes(children() - before)
        if isinstance(error, RunError) or not isinstance(error, Exception):
            raise
        raise EnvError(f"environments cannot be built: {type(error).__name__}: {error}") from error
    return ReportFailures(envs, started=children() - before, **settings)


class ReportFailures(gym.vector.VectorWrapper):
    """Stands between a script and environments that may fail.

    Their exceptions become EnvErrors, and so does a call that does not return in time. `close` ends them in any state,
    with the processes that they have started; a failure there costs only a warning.

    Args:
        timeout: minutes for a call; 0: no limit.
        rank: rank 0 warns of equal first observations.
        resumed: torch's global generator has been restored, and is not seeded again.
        grace: seconds for an environment's `close`.
        started: processes that building the environments has started.
        told: warnings printed before; none is printed twice.
        keys: names of the numbers that environments tell at the ends of episodes.
    """

    def __init__(
        self,
        env: VectorEnv,
        timeout: float = TIMEOUT,
        rank: int = 0,
        resumed: bool = False,
        grace: float = GRACE,
        started: Iterable[Process] = (),
        told: set[str] | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        super().__init__(env)
        self.keys = keys
        self._episode_infos: list[np.ndarray] = []
        self._rank, self._resumed, self._grace = rank, resumed, grace
        self._started, self.told = set(started), set() if told is None else told
        self._watch = Watch(60 * timeout, self._where, self._end_processes)
        self._apart = isinstance(env, WorkerVectorEnv)
        self._keeper: Keeper | None = None
        _close_at_exit(self)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes; seeds also reset the global generators, from which some environments draw."""
        before = set() if self._apart else children()
        if seed is not None:  # also where environments are elsewhere: a run is the same however they are stepped
            seed_generators(seed, torch_too=not self._resumed)
        try:
            with self._watch:
                obs, infos = self.env.reset(seed=seed, options=options)
        except (Exception, Timeout) as error:
            raise self._failure("reset", error) from error
        finally:
            self._keep(set() if self._apart else children() - before)
        if seed is not None:
            self._compare(obs)
        return obs, infos

    def step(self, actions: Any) -> tuple:
        try:
            with self._watch:
                answer = self.env.step(actions)
        except (Exception, Timeout) as error:
            raise self._failure("step", error) from error
        if (found := episode_infos(answer[-1])) is not None:
            self._episode_infos.append(found[~np.isnan(found).all(1)])
        return answer

    def take_episode_infos(self) -> np.ndarray:
        """The numbers that environments have told at the ends of episodes since the last call: [E, K], NaN if missing.

        E counts the episodes in which one of the K keys was there.
        """
        rows = np.concatenate((np.empty((0, len(self.keys))), *self._episode_infos))
        self._episode_infos.clear()
        return rows

    def close(self, **kwargs: Any) -> None:
        """Closes all environments; also at the end of a process that has failed."""
        _OPEN.discard(self)
        self._watch.stop()
        if self.env.closed:
            return
        if isinstance(self.env, WorkerVectorEnv):
            self.env.close()
            problems = self.env.problems
        else:
            envs = {f"environment {index}": env.close for index, env in enumerate(getattr(self.env, "envs", ()))}
            envs = envs or {"environments": self.env.close}
            found = {name: close_problem(close, self._grace) for name, close in envs.items()}
            problems = [f"{name} {problem}" for name, problem in found.items() if problem]
            self.env.closed = True
            self._end_processes()
        if problems and problems[0] not in self.told:
            self.told.add(problems[0])
            warn(problems[0] + (f" ({len(problems) - 1} more likewise)" if problems[1:] else ""))

    def _keep(self, started: set[Process]) -> None:
        """Ends the processes that environments have started if this process dies."""
        if (self._started or started) and not (self._keeper and started <= self._started):
            self._started |= started
            if self._keeper is not None:
                self._keeper.stop()
            self._keeper = Keeper(self._started)

    def _end_processes(self) -> None:
        end_processes(self._started)
        if self._keeper is not None:
            self._keeper.stop()

    def _compare(self, obs: Any) -> None:
        """Warns if environments start from equal observations: they may stay equal, and count as one."""
        first: dict[bytes, int] = {}
        rows = obs.cpu().numpy() if hasattr(obs, "cpu") else obs
        numbers = floats_in(rows, self.single_observation_space)
        if numbers.dtype == np.uint8 or not numbers.size:  # frames alone: games start alike
            return
        for index, row in enumerate(rows):
            other = first.setdefault(row.tobytes(), index)
            if other != index:
                text = (
                    f"environments {other} and {index} start from equal observations: right if every episode begins "
                    "alike; if not, does reset use its seed?"
                )
                if self._rank == 0 and text not in self.told:
                    warn(text)
                self.told.add(text)
                return

    def _where(self) -> str:
        """Names the environment that the main thread is in."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if isinstance(env := frame.f_locals.get("self"), NameFailures):
                return f"environment {env.index} failed in {frame.f_code.co_name}"
            frame = frame.f_back
        return "environments"

    def _failure(self, call: str, error: BaseException) -> RunError:
        if isinstance(error, RunError):
            return error
        return EnvError(f"environments failed in {call}: {type(error).__name__}: {error}")


_OPEN: set[ReportFailures] = set()


def _close_at_exit(envs: ReportFailures) -> None:
    """Closes environments at the end of the script, before Python waits for threads that they have started."""
    if not _CLOSES:
        _CLOSES.append(True)
        threading._register_atexit(_close_all)  # type: ignore[attr-defined]
    _OPEN.add(envs)


def _close_all() -> None:
    for envs in list(_OPEN):
        envs.close()


_CLOSES: list[bool] = []


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
    with _passing(args, _construct) as env:
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
    with _passing(one, partial(_construct_tensors, device=device)) as env:
        envs: Any = env
        check_action_space(envs.single_action_space, action_spaces)
        if bounded:
            check_bounded(envs.single_action_space)
        return Spaces(
            envs.single_observation_space, envs.single_action_space, 0, envs.unwrapped.single_observation_space
        )


def _construct_tensors(args: Any, device: Any) -> Any:
    """Builds tensor environments: `TensorEnvs`."""
    from fabricrl.envs.tensors import TensorEnvs, make

    if ":" in args.env_id and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            envs = make(args, device)
    except RunError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "'device'" in str(error):
            raise ConfigError(
                f"--vectorization torch: {args.env_id} does not take tensors: its vector_entry_point has no argument "
                "`device`"
            ) from error
        raise _construction_error(args.env_id, args.env_kwargs, error) from error
    return TensorEnvs(envs, args, device)


def _construct(args: Any, render_mode: str | None = None) -> gym.Env:
    reset_signals_in_children()
    env_id, env_kwargs = args.env_id, args.env_kwargs
    kwargs = json.loads(env_kwargs) | ({} if render_mode is None else {"render_mode": render_mode})
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        if importlib.util.find_spec("ale_py") is None:
            raise missing(f"--env-id {env_id}", "atari")
        import ale_py  # which registers its games when it is imported

        gym.register_envs(ale_py)
        if option(args, "action_repeat") > 1 or option(args, "noop_max") > 0:
            if taken := {"frameskip", "obs_type"} & kwargs.keys():
                raise ConfigError(
                    f"--env-kwargs has {taken.pop()!r}: it is chosen by --action-repeat, --noop-max and --grayscale"
                )
            kwargs["frameskip"] = 1  # AtariPreprocessing repeats
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # modules of one's own are looked up where the command was given
    if render_mode == "rgb_array" and _draws_nowhere(env_id):
        raise ConfigError("MuJoCo has no screen to draw on here: set MUJOCO_GL=egl (or osmesa) before the command")
    register(env_id)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old versions; unknown ids raise an error that says more
            env = _make(env_id, kwargs)
    except (Exception, SystemExit) as error:
        raise _construction_error(env_id, env_kwargs, error) from error
    return KeepPromises(env, option(args, "obs_keys"), getattr(args, "check_spaces", False))


def _make(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """Calls `gym.make`, without `render_mode` if the constructor does not take it; `render` is called all the same."""
    mode = kwargs.get("render_mode")
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except (TypeError, gym.error.Error) as error:
        cause = error.__cause__ or error
        if mode is None or "unexpected keyword argument 'render_mode'" not in str(cause):
            raise
        env = gym.make(env_id, disable_env_checker=True, **{k: v for k, v in kwargs.items() if k != "render_mode"})
        if mode == "human" and "human" not in env.metadata["render_modes"]:
            env.unwrapped.render_mode = "rgb_array"
            return gym.wrappers.HumanRendering(env)
    if mode is not None and env.render_mode is None:
        env.unwrapped.render_mode = mode
    return env


def _draws_nowhere(env_id: str) -> bool:
    """Returns True for Gymnasium's MuJoCo environments on Linux without a screen and without MUJOCO_GL."""
    spec = gym.registry.get(env_id)
    mujoco = spec is not None and str(spec.entry_point).startswith("gymnasium.envs.mujoco")
    return mujoco and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & os.environ.keys()


def _construction_error(env_id: str, env_kwargs: str, error: BaseException) -> ConfigError | EnvError:
    """Explains to the user why an environment could not be built."""
    text = " ".join(str(error).split()).partition(" was raised from the environment creator")[0]
    absent = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(absent, ImportError) or isinstance(error, gym.error.DependencyNotInstalled):
        name = (getattr(absent, "name", None) or "").split(".")[0]
        if simulator := simulator_of(env_id):
            return ConfigError(f"--env-id {env_id} needs a package that is not installed: {SIMULATORS[simulator]}")
        hinted = [extra for extra in EXTRAS.values() if f"gymnasium[{extra}]" in text]  # by Gymnasium itself
        if extra := EXTRAS.get(name) or next(iter(hinted), None):
            return missing(f"--env-id {env_id}", extra)
        if type(absent) is ImportError and type(error) is ImportError:
            return ConfigError(f"--env-id {env_id} cannot be imported ({text}){_newest(env_id)}")
        module = env_id.rpartition(":")[0]
        looked = f"; modules of your own are looked up in {os.getcwd()}" if module else ""
        if f"{module}.".startswith(f"{getattr(error.__cause__, 'name', None)}."):  # Gymnasium raises it anew
            if module.endswith(".py"):
                return ConfigError(f"--env-id {env_id}: name the module without .py")
            return ConfigError(f"--env-id {env_id}: there is no module {module}{looked}")
        return ConfigError(f"--env-id {env_id} needs a package that is not installed ({text}){looked}")
    if "entry_point is not specified" in text:
        return ConfigError(
            f"--env-id {env_id} is registered only as a vector environment: it needs --vectorization torch, in a "
            "script that is not decoupled"
        )
    malformed = env_id.count(":") > 1 or "Malformed environment ID" in text
    if malformed or isinstance(error, gym.error.UnregisteredEnv | gym.error.DeprecatedEnv):
        return ConfigError(f"--env-id {env_id} is not a known environment ({text}); {_nearest(env_id)}")
    if isinstance(error, TypeError) and "argument" in text and _is_of_the_call(error):
        return ConfigError(f"--env-kwargs {env_kwargs} does not fit {env_id}: {text}")
    return EnvError(f"{env_id} cannot be built: {type(error).__name__}{f': {text}' if text else ''}{_where(error)}")


def _where(error: BaseException) -> str:
    """The place in the user's own code where an error was raised; else where it was, if it has no text."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    others = "site-packages", sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]), "<frozen"
    own = [frame for frame in frames if not any(part in frame.filename for part in others)]
    shown = [] if isinstance(error, SyntaxError) else own[-1:] or ([] if str(error) else frames[-1:])
    return "".join(f" in {frame.name}, line {frame.lineno} of {frame.filename}" for frame in shown)


def _is_of_the_call(error: BaseException) -> bool:
    """Returns True if the constructor rejected its arguments, rather than failed; Gymnasium raises the error anew."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    return Path(frames[-1].filename).parent == Path(gym.envs.registration.__file__).parent


def _newest(env_id: str) -> str:
    """Names the newest version of an environment, if it is another."""
    name = env_id.rpartition("-v")[0]
    versions = [spec.version for spec in gym.registry.values() if spec.id.rpartition("-v")[0] == name and spec.version]
    newest = f"{name}-v{max(versions, default=0)}"
    return f"; there is {newest}" if versions and newest != env_id else ""


def _nearest(env_id: str) -> str:
    """Suggests known ids that resemble an unknown one."""
    if importlib.util.find_spec("ale_py") is not None:
        importlib.import_module("ale_py")  # registers its games
    names = {known.rpartition("/")[2]: known for known in gym.registry} | {known: known for known in gym.registry}
    close = [names[name] for name in difflib.get_close_matches(env_id, names, n=3, cutoff=0.7)]
    if close:
        return f"did you mean {', '.join(close)}?"
    own = f"name your own with its module, as in my_envs:{env_id}; " if env_id and ":" not in env_id else ""
    return f"{own}see gymnasium.pprint_registry() for those there are"
