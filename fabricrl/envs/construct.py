"""An environment from its id and arguments; or the reason, in the user's terms, why it cannot be built."""

import difflib
import importlib
import importlib.util
import json
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym

from fabricrl.envs.guard import reset_signals_in_children
from fabricrl.envs.options import option
from fabricrl.envs.simulators import SIMULATORS, register, simulator_of
from fabricrl.envs.wrappers import KeepPromises
from fabricrl.utils.errors import ConfigError, EnvError, RunError
from fabricrl.utils.extras import missing

# Module that is missing -> extra that brings it
EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "box2d": "box2d", "ale_py": "atari", "jax": "jax", "flax": "jax"}


def construct_tensors(args: Any, device: Any) -> Any:
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


def construct(args: Any, render_mode: str | None = None) -> gym.Env:
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
        looked = f"; your own modules are looked for in {os.getcwd()}" if module else ""
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
        text = text.partition(" Did you mean")[0].rstrip(".")  # ours knows of versions and modules
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
    module, colon, name = env_id.rpartition(":")
    close = [names[like] for like in difflib.get_close_matches(name, names, n=3, cutoff=0.7)]
    if close:
        return f"did you mean {', '.join(module + colon + like for like in close)}?"
    own = f"name your own with its module, as in my_envs:{env_id}; " if env_id and ":" not in env_id else ""
    return f"{own}see gymnasium.pprint_registry() for those there are"
