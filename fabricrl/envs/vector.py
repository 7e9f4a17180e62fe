"""Vector environments: construction, and failures that name the environment."""

import atexit
import contextlib
import difflib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.spaces import Space
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from fabricrl.envs.backends import DEFAULTS, EnvPoolVectorEnv, NativeVectorEnv, check_backend, choose, option
from fabricrl.envs.spaces import (
    check_action_space,
    check_bounded,
    check_observation_space,
    image_keys,
    is_flat,
    left_out_texts,
    odd_images,
)
from fabricrl.envs.wrappers import (
    ActionRepeat,
    KeepPromises,
    LifeLoss,
    MaskVelocities,
    NameFailures,
    PackImages,
    RecordEpisodes,
    is_atari,
    require_opencv,
    shield_worker,
)
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.records import Records

# Module that is missing -> extra that brings it
EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "box2d": "box2d", "ale_py": "atari"}


def make_env(
    args: Any,
    render_mode: str | None = None,
    video_folder: Path | None = None,
    video_prefix: str = "train",
    video_every: int = 1,
    video_episodes: float = math.inf,
) -> gym.Env:
    """One environment whose observations are one row: vectors, or records where there are images among them.

    What is neither is flattened, Discrete parts one-hot.

    Args:
        args: `env_id`, an id of Gymnasium, or `module:Id-v0`, where `module` registers the id and is found from here;
            `env_kwargs`, a JSON object of arguments for the environment's constructor; and of `backends.DEFAULTS` what
            the algorithm has.
        video_folder: where to record every `video_every`-th of the first `video_episodes` episodes; None: nowhere.

    Raises:
        ConfigError: the id, an argument, or a package that it needs is not there.
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
    """What comes before observations become one row."""
    repeat, noop_max = option(args, "action_repeat"), option(args, "noop_max")
    if option(args, "mask_velocities"):
        env = MaskVelocities(env)
    if is_atari(env) and (repeat > 1 or noop_max > 0):
        grayscale, size = option(args, "grayscale"), option(args, "resize")
        require_opencv("an Atari game with --action-repeat or --noop-max", "atari")
        screen = (160, 210) if size is None else size
        env = gym.wrappers.AtariPreprocessing(env, noop_max, repeat, screen, grayscale_obs=grayscale)
    elif noop_max > 0:
        raise ConfigError(f"--noop-max is {noop_max}: it can be for Atari games")
    elif repeat > 1:
        env = ActionRepeat(env, repeat)
    if not image_keys(env.observation_space):
        for name in ("grayscale", "resize", "frame_stack"):
            if option(args, name) != DEFAULTS[name]:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is set: {args.env_id} has no images among its observations")
    return LifeLoss(env) if option(args, "life_loss") else env


def make_envs(args: Any, rank: int, video_folder: Path) -> VectorEnv:
    """The `args.num_envs` environments of a rank, resetting in the step that ends an episode (SAME_STEP).

    `step` returns the first observation of the next episode; the last one is in `infos["final_obs"]`. Native ones
    reset a step later, which `infos["skipped"]` tells. `infos["life_lost"]` is there if `args.life_loss`.
    Rank 0 records its environment 0 if `args.capture_video`, and says what `--vectorization auto` has chosen.

    Raises:
        ConfigError, EnvError: as `make_env`; later, `reset` and `step` raise EnvError.
    """

    def thunk(index: int) -> Callable[[], gym.Env]:
        def build() -> gym.Env:
            if os.getpid() != script:
                shield_worker()
            record = args.capture_video and rank == 0 and index == 0
            folder = video_folder if record and (kind == "sync" or os.getpid() != script) else None
            mode = "rgb_array" if record else None  # also in the async dummy, whose spaces and modes must agree
            env = make_env(args, mode, folder, video_every=args.video_every)
            return NameFailures(env, index)

        return build

    script, kind = os.getpid(), args.vectorization
    if kind == "auto":
        with contextlib.closing(make_env(args)) as env:
            kind = choose(args, env)
        if rank == 0:
            print(f"vectorization: {kind}", file=sys.stderr, flush=True)
    if kind in ("native", "envpool"):
        with contextlib.closing(make_env(args)) as env:
            return ReportFailures(NativeVectorEnv(args, env) if kind == "native" else EnvPoolVectorEnv(args, env))
    thunks = [thunk(index) for index in range(args.num_envs)]
    # Without copies: the buffer copies each observation before the next step overwrites it.
    vector_env = SyncVectorEnv if kind == "sync" else AsyncVectorEnv
    try:
        envs = vector_env(thunks, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    except Exception as error:
        _kill(multiprocessing.active_children())  # workers ignore the signal that would end them at exit
        if isinstance(error, ConfigError | EnvError):
            raise
        raise EnvError(f"environments of {args.env_id} cannot be built: {type(error).__name__}: {error}") from error
    return ReportFailures(envs)


class ReportFailures(gym.vector.VectorWrapper):
    """Turns the death of an environment's process, and observations that do not fit their space, into an EnvError."""

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        atexit.register(self.abandon)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._failure("reset", error) from error

    def step(self, actions: Any) -> tuple:
        try:
            return self.env.step(actions)
        except Exception as error:
            raise self._failure("step", error) from error

    def abandon(self) -> None:
        """Ends the environments whatever state they are in; for the end of a process that may have failed."""
        if isinstance(self.env, AsyncVectorEnv):
            _kill(self.env.processes)
            with contextlib.suppress(Exception), warnings.catch_warnings():  # their pipes are broken
                warnings.simplefilter("ignore")
                self.env.close(terminate=True)
            self.env.closed = True  # or it would try again, and complain, when it is collected
        elif not self.env.closed:
            self.env.close()

    def _failure(self, call: str, error: Exception) -> RunError:
        if isinstance(error, RunError):
            return error
        for index, process in enumerate(getattr(self.env, "processes", [])):
            process.join(0.1)
            if process.exitcode is not None:
                how = (
                    signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
                )
                return EnvError(f"env worker {index} died in {call} ({how})")
        return EnvError(f"environments failed in {call}: {type(error).__name__}: {error}")


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        process.kill()


def check_env(
    args: Any,
    action_spaces: tuple[type[Space], ...],
    render_mode: str | None,
    bounded: bool = False,
    images: bool = False,
) -> tuple[Space, Space]:
    """Builds one environment and throws it away, so that mistakes are told before anything starts.

    `bounded`: actions must be a Box with finite bounds; `images`: observations may have images.

    Returns the observation and the action space that `make_envs` will give each environment.

    Raises:
        ConfigError: the environment cannot be had, or has spaces that are not supported, or cannot be rendered, or has
            no velocities that could be masked.
        EnvError: its constructor raised.
    """
    env = _construct(args)
    try:
        env = _preprocessed(args, env)
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
            raise ConfigError(f"{args.env_id} cannot be rendered as {render_mode!r}, only as {modes}")
        env = _as_row(args, env)
        space = env.observation_space
        if getattr(args, "norm_obs", False) and isinstance(space, Records) and not space.num_floats:
            raise ConfigError("--norm-obs is set: it is for numbers, and there are only images among the observations")
        check_backend(args, env)
        return env.observation_space, env.action_space
    finally:
        with contextlib.suppress(Exception):  # what it says at its end does not matter yet
            env.close()


def _construct(args: Any, render_mode: str | None = None) -> gym.Env:
    env_id, env_kwargs = args.env_id, args.env_kwargs
    kwargs = json.loads(env_kwargs) | ({} if render_mode is None else {"render_mode": render_mode})
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        if importlib.util.find_spec("ale_py") is None:
            raise ConfigError(f"--env-id {env_id} needs a package that is not here: pip install -e '.[atari]'")
        import ale_py  # which registers its games when it is imported

        gym.register_envs(ale_py)
        if option(args, "action_repeat") > 1 or option(args, "noop_max") > 0:
            if taken := {"frameskip", "obs_type"} & kwargs.keys():
                raise ConfigError(
                    f"--env-kwargs has {taken.pop()!r}: it is chosen by --action-repeat, --noop-max and --grayscale"
                )
            kwargs["frameskip"] = 1  # AtariPreprocessing repeats
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `module` of one's own is looked for where the command was given
    if render_mode == "rgb_array" and _draws_nowhere(env_id):
        raise ConfigError("MuJoCo has no screen to draw on here: set MUJOCO_GL=egl (or osmesa) before the command")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old versions; an unknown one is an error that says more
            env = _make(env_id, kwargs)
    except (Exception, SystemExit) as error:
        raise _construction_error(env_id, env_kwargs, error) from error
    return KeepPromises(env, option(args, "obs_keys"), getattr(args, "check_spaces", False))


def _make(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """`gym.make`; a constructor without `render_mode` is not given it, and `render` is called all the same."""
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
    """Whether this is one of Gymnasium's MuJoCo environments, on Linux without a screen and without a word on how."""
    spec = gym.registry.get(env_id)
    mujoco = spec is not None and str(spec.entry_point).startswith("gymnasium.envs.mujoco")
    return mujoco and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & os.environ.keys()


def _construction_error(env_id: str, env_kwargs: str, error: BaseException) -> ConfigError | EnvError:
    """What to tell a user whose environment could not be built."""
    text = " ".join(str(error).split())
    missing = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(missing, ImportError) or isinstance(error, gym.error.DependencyNotInstalled):
        name = (getattr(missing, "name", None) or "").split(".")[0]
        hinted = [extra for extra in EXTRAS.values() if f"gymnasium[{extra}]" in text]  # by Gymnasium itself
        if extra := EXTRAS.get(name) or next(iter(hinted), None):
            return ConfigError(f"--env-id {env_id} needs a package that is not here: pip install -e '.[{extra}]'")
        if type(missing) is ImportError and type(error) is ImportError:
            return ConfigError(f"--env-id {env_id} cannot be imported ({text}){_newest(env_id)}")
        looked = f"; a module of your own is looked for in {os.getcwd()}" if ":" in env_id else ""
        return ConfigError(f"--env-id {env_id} needs a package that is not here ({text}){looked}")
    malformed = env_id.count(":") > 1 or "Malformed environment ID" in text
    if malformed or isinstance(error, gym.error.UnregisteredEnv | gym.error.DeprecatedEnv):
        return ConfigError(f"--env-id {env_id} is not a known environment ({text}); {_nearest(env_id)}")
    if isinstance(error, TypeError) and "argument" in text and _is_of_the_call(error):
        return ConfigError(f"--env-kwargs {env_kwargs} does not fit {env_id}: {text}")
    return EnvError(f"{env_id} cannot be built: {type(error).__name__}: {text}")


def _is_of_the_call(error: BaseException) -> bool:
    """Whether a constructor could not be called at all, rather than failed; Gymnasium raises it anew."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    return Path(frames[-1].filename).parent == Path(gym.envs.registration.__file__).parent


def _newest(env_id: str) -> str:
    """The newest version of an environment, if that is another one."""
    name = env_id.rpartition("-v")[0]
    versions = [spec.version for spec in gym.registry.values() if spec.id.rpartition("-v")[0] == name and spec.version]
    newest = f"{name}-v{max(versions, default=0)}"
    return f"; there is {newest}" if versions and newest != env_id else ""


def _nearest(env_id: str) -> str:
    """What may have been meant by an id that is not known."""
    if importlib.util.find_spec("ale_py") is not None:
        importlib.import_module("ale_py")  # registers its games
    names = {known.rpartition("/")[2]: known for known in gym.registry} | {known: known for known in gym.registry}
    close = [names[name] for name in difflib.get_close_matches(env_id, names, n=3, cutoff=0.7)]
    if close:
        return f"did you mean {', '.join(close)}?"
    own = f"one of your own is named with its module, as my_envs:{env_id}; " if env_id and ":" not in env_id else ""
    return f"{own}see gymnasium.pprint_registry() for those there are"
