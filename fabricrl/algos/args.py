"""The arguments that every script accepts, and how a command line becomes a frozen dataclass."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import torch
import tyro
from gymnasium.spaces import Box, Space
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fabricrl.data.memory import GIB, available_memory
from fabricrl.utils.checkpoint import is_json_object, is_one_line, load_checkpoint, reading
from fabricrl.utils.choices import ALLOWED, check_choice
from fabricrl.utils.errors import CheckpointError, ConfigError
from fabricrl.utils.extras import pip_install
from fabricrl.utils.hub import is_installed
from fabricrl.utils.peers import MINUTES
from fabricrl.utils.utils import require

Args = TypeVar("Args", bound="StandardArgs")
LARGEST = 1e30  # float32 ends at 3.4e38, and numbers are multiplied
MAX_STEPS = 10**12 - 1  # what fits into the names of checkpoints, which sort by their steps
# Bytes that are taken at the very least: by an environment, one in a process of its own, a step of a rollout, and a
# weight that is trained (itself, its gradient and two moments), in float32
ENV_BYTES, PROCESS_BYTES, STEP_BYTES, WEIGHT_BYTES = 2**10, 8 * 2**20, 32, 16
# Arguments that names of runs leave out
UNNAMED_GROUPS = ("run, logging and checkpoints", "hardware and launching")
UNNAMED = {
    "env_id", "seed", "seeds", "jobs", "vectorization", "check_spaces", "capture_video", "video_every", "timeout",
    "eval_every", "eval_episodes", "stop_at_return",
}  # fmt: skip
MOST_NAMED = 100  # letters: names of files may have 255
AUTO = "auto"  # what `--resume` may be in place of a path
REGISTRY = ConstructorRegistry()


def arg(default: Any, help: str, group: str | None = None, advanced: bool = False) -> Any:
    """A dataclass field with its help.

    Args:
        group: opens a section of `--help`, which the fields after it join.
        advanced: the field is left to `--help-all`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "advanced": advanced})


@dataclass(frozen=True)
class StandardArgs:
    """Arguments of every script. Checked when made: see `__post_init__`.

    Attributes:
        presets: name → arguments that a preset sets, where the algorithm has presets.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    # --- environment
    env_id: str = arg("CartPole-v1", "Gymnasium id, or module:Id-v0 for an environment of your own", "environment")
    env_kwargs: str = arg("{}", "arguments of the environment's constructor, as a JSON object")
    mask_velocities: bool = arg(
        False,
        "zero velocities in observations: CartPole, MountainCar, MountainCarContinuous, Pendulum, LunarLander",
        advanced=True,
    )
    obs_keys: tuple[str, ...] = arg((), "parts of a Dict observation to use; none: all", advanced=True)
    action_repeat: int = arg(
        1,
        "steps that each action is taken for; Atari observations are the maximum of the last two frames",
        advanced=True,
    )
    vectorization: Literal["auto", "sync", "async", "native", "envpool", "torch"] = arg(
        "auto",
        "sync: one process steps all; async: a process each; native: Gymnasium's or ale-py's vector form, where there "
        "is one; envpool: C++ threads, by the extra of that name; torch: tensors on the device that trains; auto: "
        "torch for environments that are tensors, else native or the faster of sync and async",
    )
    check_spaces: bool = arg(
        False,
        "check the bounds of all observations at every step; off: those of integers, and of floats at resets",
        advanced=True,
    )
    info_keys: tuple[str, ...] = arg(
        (),
        "numbers in an environment's infos at the end of an episode whose means are logged, beside is_success",
        advanced=True,
    )
    num_envs: int = arg(1, "environments per rank")
    total_timesteps: int = arg(1_000_000, "environment steps over all environments and ranks, in whole iterations")
    seed: int = arg(1, "seed of parameters, environments, action noise and minibatches")
    seeds: int = arg(1, "runs, with seed, seed + 1, ...; more than one are compared at the end", advanced=True)
    jobs: int = arg(1, "runs side by side, with --seeds", advanced=True)
    capture_video: bool = arg(False, "record environment 0 of rank 0 into the run folder")
    video_every: int = arg(100, "episodes of that environment between recordings", advanced=True)
    eval_every: int = arg(
        0, "environment steps between evaluations, which choose best.ckpt: greedy, on other environments; 0: none"
    )
    eval_episodes: int = arg(10, "episodes of an evaluation; ranks share them", advanced=True)
    stop_at_return: float | None = arg(
        None, "end the run, with success, once the mean return of an evaluation reaches this", advanced=True
    )

    # --- run
    exp_name: str = arg(
        "",
        "name of the run; empty: the script's, with what differs from the defaults",
        "run, logging and checkpoints",
    )
    log_dir: str = arg("logs", "folder of all runs")
    logger: Literal["tensorboard", "csv", "wandb"] = arg(
        "tensorboard", "where metrics go; wandb needs the extra of that name"
    )
    log_every: int = arg(2_000, "environment steps between log entries, rounded up to whole iterations", advanced=True)
    track: bool = arg(False, "short for --logger wandb", advanced=True)
    wandb_project_name: str = arg("fabricrl", "project on Weights & Biases", advanced=True)
    wandb_entity: str | None = arg(None, "user or team on Weights & Biases", advanced=True)
    save_model: bool = arg(True, "write checkpoints, the last one when the run ends or is stopped", advanced=True)
    checkpoint_every: int = arg(100_000, "environment steps between checkpoints; 0: only the last")
    keep_checkpoints: int = arg(3, "newest checkpoints to keep, besides the best", advanced=True)
    upload_model: bool = arg(
        False,
        "upload checkpoints and a page to the Hugging Face Hub at the end; needs the extra hub",
        advanced=True,
    )
    hf_entity: str | None = arg(
        None, "user or organisation on the Hugging Face Hub; None: the owner of the token", advanced=True
    )
    resume: str | None = arg(
        None,
        "checkpoint, run folder or hf://user/repository to continue, with its arguments; flags beside it win; "
        "auto: the newest run of the arguments given here, or a new one",
    )

    # --- hardware
    accelerator: Literal["cpu", "cuda", "gpu", "mps", "auto"] | None = arg(
        None, "cpu, cuda or auto; None: cpu, which is faster for small networks", "hardware and launching"
    )
    cuda: bool = arg(False, "short for --accelerator cuda", advanced=True)
    devices: str | None = arg(None, "processes per node, or a list of GPUs such as 0,2; None: 1")
    strategy: str | None = arg(None, "auto or ddp; None: ddp with several devices")
    num_nodes: int | None = arg(None, "machines; None: 1", advanced=True)
    node_rank: int = arg(0, "number of this machine, from 0", advanced=True)
    main_address: str = arg("127.0.0.1", "address of machine 0", advanced=True)
    main_port: int = arg(29400, "port on machine 0 where ranks meet; for several machines", advanced=True)
    timeout: float = arg(
        MINUTES, "minutes to wait for another rank or an environment before the run ends; 0: for ever", advanced=True
    )
    precision: str | None = arg(
        None, "32-true, bf16-mixed, or on a GPU 16-mixed, which scales the loss; None: 32-true", advanced=True
    )
    num_threads: int | None = arg(1, "threads of PyTorch per rank; more than one slows small networks down")
    matmul_precision: Literal["highest", "high", "medium"] = arg(
        "highest",
        "float32 products: medium is faster for wide networks on some processors, slower for narrow ones",
        advanced=True,
    )
    compile: bool = arg(False, "compile the whole update: faster for small networks, after up to a minute's wait")
    cuda_graphs: bool = arg(True, "capture updates as CUDA graphs; on a GPU only", advanced=True)
    player_device: Literal["auto", "cpu", "cuda"] = arg(
        "auto", "where the policy acts; auto: the faster of the CPU and the GPU that trains", advanced=True
    )
    torch_deterministic: bool = arg(True, "deterministic cuDNN kernels", advanced=True)

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the argument, what was given, and what is allowed."""
        check_types(self)
        require_counts(self, MAX_STEPS, "total_timesteps")
        require_counts(self, 2**63 - 1, "num_envs", "video_every", "log_every", "keep_checkpoints")
        require_counts(self, 1000, "action_repeat", "jobs")
        require_counts(self, 10_000, "seeds")
        require(self.jobs == 1 or self.seeds > 1, "jobs", self.jobs, "1 without --seeds")
        require_counts(self, 10_000, "num_threads", "num_nodes")
        require_counts(self, 1_000_000, "eval_episodes")
        require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        require(0 <= self.eval_every <= MAX_STEPS, "eval_every", self.eval_every, f"between 0 and {MAX_STEPS}")
        self._check_stop()
        require(0 <= self.seed < 2**31, "seed", self.seed, "between 0 and 2^31 - 1")
        require(0 <= self.node_rank < (self.num_nodes or 1), "node_rank", self.node_rank, "from 0 to num-nodes - 1")
        require(0 < self.main_port < 65536, "main_port", self.main_port, "between 1 and 65535")
        allowed = "a number of minutes, at most 100000; or 0: for ever"
        require(0 <= self.timeout <= 100_000, "timeout", self.timeout, allowed)
        for name in ALLOWED:
            check_choice(name, getattr(self, name))
        clash = self.cuda and self.accelerator not in (None, "cuda", "gpu")
        require(not clash, "accelerator", self.accelerator, "cuda, or left out, beside --cuda")
        self._check_texts()

    def _check_stop(self) -> None:
        if self.stop_at_return is not None:
            require_between(self, -LARGEST, LARGEST, "stop_at_return")
            allowed = "left out, or given beside --eval-every, since evaluations decide"
            require(self.eval_every > 0, "stop_at_return", self.stop_at_return, allowed)

    def _check_texts(self) -> None:
        given, name = self.env_kwargs, self.exp_name
        allowed = """a JSON object such as '{"continuous": true}', of at most 100 000 characters and 50 levels"""
        require(is_json_object(given), "env_kwargs", repr(given if len(given) < 500 else f"{given[:500]}..."), allowed)
        fits = re.fullmatch(r"[\w.-]*", name) is not None and len(name.encode()) <= 220  # file names may have 255
        require(fits, "exp_name", repr(name), "at most 220 letters, digits, . _ or -")
        for name in ("resume", "log_dir"):
            require(getattr(self, name) != "", name, "empty", "a path")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                line = " ".join(text.split()) if field.name == "env_kwargs" else text  # JSON may have more lines
                require(not isinstance(text, str) or is_one_line(line), field.name, repr(text), "one line of text")

    def check_machine(self) -> None:
        """Raises ConfigError if this machine cannot do it: a package, a folder, processors or memory are not there."""
        if self.track or self.logger == "wandb":
            there = importlib.util.find_spec("wandb") is not None
            require(there, "logger", "wandb", f"another one, or wandb after: {pip_install('wandb')}")
        if self.upload_model:
            require(is_installed(), "upload_model", "set", f"left out, or set after: {pip_install('hub')}")
            require(self.save_model, "upload_model", "set", "left out beside --no-save-model, which leaves nothing")
        processors = os.cpu_count() or 1
        allowed = f"at most {processors}, the processors of this machine"
        require(self.num_threads is None or self.num_threads <= processors, "num_threads", self.num_threads, allowed)
        each = PROCESS_BYTES if self.vectorization == "async" else ENV_BYTES
        need = self.num_envs * (each if self.vectorization in ("sync", "async") else STEP_BYTES)
        require_memory("--num-envs", f"{self.num_envs} environments", need)
        self._check_log_dir()

    def _check_log_dir(self) -> None:
        allowed = "a folder that can be written or made"
        try:
            folder = Path(self.log_dir).expanduser().absolute()
            while not _exists(folder) and folder != folder.parent:
                folder = folder.parent
        except (OSError, RuntimeError) as error:  # too long, links that lead to each other; a user that is not there
            reason = str(getattr(error, "strerror", None) or error).rstrip(".")
            raise ConfigError(f"--log-dir is {self.log_dir}: it must be {allowed}; {reason}") from error
        require(is_one_line(folder), "log_dir", repr(str(folder)), "one line of text")
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        require(writable, "log_dir", self.log_dir, f"{allowed}, and {folder} is not")


def _exists(path: Path) -> bool:
    """Tells if something has this name, even a dangling link. Raises OSError if the system cannot look."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if path.is_symlink() and not path.exists():
        os.stat(path)  # raises why
    return True


@dataclass(frozen=True)
class DecoupledArgs:
    """Arguments that a decoupled script adds to those of its coupled sibling; its class extends both."""

    max_lag: int = arg(
        1,
        "iterations by which playing is ahead of training; 0: wait for fresh weights",
        "decoupling",
    )
    players: int = arg(1, "ranks that play, each its share of the environments; the others train")
    weights_precision: Literal["fp32", "bf16"] = arg(
        "fp32", "in which weights travel to players; bf16: rounded, in half the bytes", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require(0 <= self.max_lag <= 100, "max_lag", self.max_lag, "between 0 and 100")
        given: Any = self
        require_counts(given, 10_000, "players")
        allowed = f"a multiple of {self.players}, the players"
        require(given.num_envs % self.players == 0, "num_envs", given.num_envs, allowed)


def script_name(args: StandardArgs, algo: str) -> str:
    """The script that takes these arguments: the algorithm, or its decoupled twin."""
    return algo + "_decoupled" * isinstance(args, DecoupledArgs)


def run_name(args: StandardArgs, algo: str) -> str:
    """The name that was given, or the script's with what was changed: `ppo_num-envs=16_norm-obs`."""
    if args.exp_name:
        return args.exp_name
    name, changed = script_name(args, algo), _changed(args)
    for index, change in enumerate(changed):
        if len(name) + len(change) > MOST_NAMED:
            return f"{name}_and-{len(changed) - index}-more"
        name += f"_{change}"
    return name


def command(args: StandardArgs, algo: str) -> str:
    """The command line that trains with these arguments; what concerns one's own disk and accounts is left out."""
    words = ["fabricrl", script_name(args, algo).replace("_", "-")]
    words += ["--env-id", args.env_id]
    for name, value in _different(args, set(UNNAMED_GROUPS[:1]), {"env_id", "seeds", "jobs", "node_rank"}):
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def identity(kind: type[StandardArgs], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, as JSON has them: those that its name comes from, seed and `exp_name`.

    They are the arguments of environment and algorithm, and whether the script is the decoupled one. How a run is
    watched, and where it computes, is no part of it.
    Arguments that `values` lack, as they are of an earlier version, have their defaults.
    """
    found, group = {}, ""
    for field in dataclasses.fields(kind):
        group = field.metadata["group"] or group
        named = group not in UNNAMED_GROUPS and field.name not in UNNAMED
        if named or field.name in ("env_id", "seed", "exp_name"):
            found[field.name] = values.get(field.name, field.default)
    return json.loads(json.dumps(found | {"is_decoupled": "max_lag" in values}))


def _different(args: StandardArgs, groups: set[str], names: set[str]) -> Iterator[tuple[str, Any]]:
    """Arguments that differ from the defaults, or from those of the preset, save some groups and names."""
    preset: dict[str, Any] = {}
    with contextlib.suppress(ConfigError):
        preset = _preset(type(args), getattr(args, "preset", "default"), args.presets, args.env_id)
    group = ""
    for field in dataclasses.fields(args):
        group = field.metadata["group"] or group
        value = getattr(args, field.name)
        default = preset.get(field.name, field.default)
        if group not in groups and field.name not in names and value != default:
            yield field.name, value


def _changed(args: StandardArgs) -> list[str]:
    """Arguments of environment and algorithm that differ from the defaults, in the names of runs."""
    told = []
    for field, value in _different(args, set(UNNAMED_GROUPS), UNNAMED):
        name = field.replace("_", "-")
        if isinstance(value, bool):
            told.append(name if value else f"no-{name}")
        else:
            text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
            told.append(f"{name}={re.sub(r'[^A-Za-z0-9.+]+', '-', text).strip('-') or 'none'}")
    return told


def require_between(args: StandardArgs, low: float, high: float, *names: str) -> None:
    """Raises ConfigError unless each of the named arguments is a number in [low, high]."""
    for name in names:
        value = getattr(args, name)
        require(math.isfinite(value) and low <= value <= high, name, value, f"between {low:g} and {high:g}")


def require_counts(args: StandardArgs, most: int, *names: str) -> None:
    """Raises ConfigError unless each of the named arguments is None, or at least 1 and at most this."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            require(value >= 1, name, value, "an integer of at least 1")
            require(value <= most, name, value, f"at most {most}")


def require_above_zero(args: StandardArgs, *names: str) -> None:
    """Raises ConfigError unless each of the named arguments is None, or a number above 0 that float32 can hold."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            require(0 < value <= LARGEST, name, value, f"a number above 0, at most {LARGEST:g}")


def require_widths(args: StandardArgs, *names: str) -> None:
    """Raises ConfigError unless each of the named arguments holds widths of layers."""
    for name in names:
        sizes = getattr(args, name)
        allowed = "at most 100 integers of at least 1"
        require(len(sizes) <= 100 and all(size >= 1 for size in sizes), name, sizes, allowed)


def require_memory(flags: str, what: str, num_bytes: int) -> None:
    """Raises ConfigError, with the figures, if something of `num_bytes` or more does not fit into memory."""
    if num_bytes > (free := available_memory()):
        raise ConfigError(
            f"{flags}: the memory that is free, {free / GIB:.2f} GiB, is too little for {what}, "
            f"{num_bytes / GIB:.2f} GiB or more"
        )


def check_sizes(args: StandardArgs, algo: str, obs_space: Box, action_space: Space) -> None:
    """Raises ConfigError, with the figures, if what these spaces make of a run does not fit into memory.

    That is the observations of a step, of a rollout and of those on their way to trainers, and the networks, which are
    built without memory, to be counted.
    """
    row, num_steps = obs_space.shape[0] * obs_space.dtype.itemsize, getattr(args, "num_steps", 1)
    flags, steps = "--num-envs", args.num_envs * num_steps
    if num_steps > 1:
        flags, what = f"{flags} × --num-steps", f"rollouts of {steps} observations of {row} bytes"
    else:
        what = f"{steps} observations of {row} bytes"
    if isinstance(args, DecoupledArgs):
        flags, what, row = f"{flags} × --max-lag", f"{args.max_lag + 3} {what}", row * (args.max_lag + 3)
    require_memory(flags, what, steps * row)
    if importlib.util.find_spec(f"fabricrl.algos.{algo}.utils") is None:
        return
    make_agent = importlib.import_module(f"fabricrl.algos.{algo}.utils").make_agent
    spaces = {"single_observation_space": obs_space, "single_action_space": action_space}
    with torch.device("meta"):
        weights = sum(part.numel() for part in make_agent(args, SimpleNamespace(**spaces)).parameters())
    what = f"networks of {weights} weights for these observations and actions"
    require_memory("--env-id, --hidden-sizes", what, weights * WEIGHT_BYTES)


def num_weights(inputs: int, *sizes: int) -> int:
    """Weights and biases of fully connected layers of these widths."""
    return sum((before + 1) * after for before, after in itertools.pairwise((inputs, *sizes)))


def check_types(args: StandardArgs) -> None:
    """Raises ConfigError unless each argument has its declared type: a checkpoint can hold anything."""
    kind: Any = type(args)
    for name, hint in _hints(kind).items():
        value = getattr(args, name)
        require(_fits(value, hint), name, repr(value), _in_words(hint))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float) and type(value) is int:
        return abs(value) < 2**63
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is tuple:
        return f"a tuple, each part {_in_words(parts[0])}"
    names = {
        int: "an integer below 2^63",
        float: "a number",
        str: "text",
        bool: "true or false",
        types.NoneType: "None",
    }
    return names[hint]


@REGISTRY.primitive_rule
def _integers(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Makes tyro read integers as people write them: 1e6, too."""
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_integer,
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


def _integer(words: Sequence[str]) -> int:
    """Raises ValueError unless it is whole."""
    (word,) = words
    with contextlib.suppress(ValueError):
        return int(word)
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        raise ValueError(f"{word} is not an int")
    return int(number)


def parse(kind: type[Args], algo: str, presets: dict[str, dict[str, Any]] | None = None) -> Args:
    """The arguments of a command line: flags given win over `--resume`'s, those over `--preset`'s, those over defaults.

    With `--seeds` the process does not come back: it runs its own command once a seed, and compares the runs.

    Raises:
        ConfigError: an unknown flag, or a value that is not allowed.
        CheckpointError: `--resume` names something that cannot be resumed.
    """
    defaults: dict[str, Any] = {}
    preset = _early("--preset")
    if (resume := _early("--resume")) not in (None, AUTO):
        if preset is not None:
            raise ConfigError(f"--preset {preset} beside --resume: a run that is resumed keeps the arguments it has")
        require(bool(resume), "resume", "empty", "a checkpoint or a run folder")
        defaults = _inherited(kind, *load_checkpoint(str(resume), algo))
    elif preset is not None:
        defaults = {
            "preset": preset,
            **_preset(kind, preset, presets or {"default": {}}, _early("--env-id") or kind.env_id),
        }
    args = kind(**_parse_flags(kind, defaults))
    args.check_machine()
    if args.seeds > 1:
        from fabricrl.sweep import run_seeds  # the commands around the scripts import what scripts do without

        sys.exit(run_seeds(args.seed, args.seeds, args.jobs, args.log_dir))
    return args


def _preset(kind: type[StandardArgs], name: str, presets: dict[str, dict[str, Any]], env_id: str) -> dict[str, Any]:
    """The defaults of a preset; `tuned` looks into the algorithm's presets.toml for the environment.

    Raises:
        ConfigError: there is no such preset, or none for the environment.
    """
    if name != "tuned":
        require(name in presets, "preset", name, f"one of {', '.join([*presets, 'tuned'])}")
        return presets[name]
    if env_id.startswith("ALE/") and "atari" in presets:
        return presets["atari"] | {"env_id": env_id}
    path = Path(sys.modules[kind.__module__].__file__ or "").with_name("presets.toml")
    tuned = tomllib.loads(path.read_text()) if path.exists() else {}
    family = re.sub(r"-v\d+$", "", env_id)
    require(
        family in tuned,
        "preset",
        name,
        f"another one: there are tuned settings for {', '.join(tuned) or 'nothing'}, not for {env_id}",
    )
    settings = {field: tuple(value) if isinstance(value, list) else value for field, value in tuned[family].items()}
    return settings | {"env_id": env_id}


def _inherited(kind: type[StandardArgs], state: dict[str, Any], found: Path) -> dict[str, Any]:
    """The arguments of a checkpoint that a run which goes on from it has.

    Raises:
        CheckpointError: one is unknown, of another type, or not allowed, also beside the others.
    """
    older = {"player_device": "auto"} if state["args"].get("player_device", "") is None else {}  # its name was None
    stored, own = state["args"] | older, {field.name for field in dataclasses.fields(kind)}
    twins = {field.name for field in dataclasses.fields(DecoupledArgs)}  # of the decoupled script, perhaps
    if unknown := sorted(stored.keys() - own - twins):
        raise CheckpointError(f"{found} has an argument that {state['algo']} does not know: {unknown[0]!r}")
    with reading(found):
        kind(**{name: value for name, value in stored.items() if name in own})
    inherited = own - _not_resumed()
    if ("max_lag" in stored) != issubclass(kind, DecoupledArgs):
        inherited -= {"devices", "num_nodes", "exp_name"}  # one rank more plays there, or here
    return {name: value for name, value in stored.items() if name in inherited}


def _early(flag: str) -> str | None:
    """Value given for a flag that the defaults of others depend on."""
    words = sys.argv[1:]
    given = [after for word, after in itertools.pairwise(words) if _is_flag(word, flag)]
    given += [
        value for name, equals, value in (word.partition("=") for word in words) if equals and _is_flag(name, flag)
    ]
    return given[-1] if given and given[-1] != "None" else None


def _is_flag(word: str, flag: str) -> bool:
    """Tells if a word is this flag, as people write it: `--num_envs`, too."""
    return word.replace("_", "-") == flag


def is_given(name: str) -> bool:
    """Tells if an argument stands on the command line."""
    return _early(f"--{name.replace('_', '-')}") is not None


def _not_resumed() -> set[str]:
    """Arguments that say where this process stands, not what the run is; another launcher brings its own."""
    if "LT_CLI_USED" in os.environ:
        choices = {"accelerator", "cuda", "devices", "strategy", "num_nodes", "precision"}
    else:
        choices = {"devices", "num_nodes"} if "TORCHELASTIC_RUN_ID" in os.environ else set()
    return {"resume", "seeds", "jobs", "node_rank", "main_address", "main_port", "allow_empty_buffer"} | choices


def _parse_flags(kind: type[StandardArgs], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. tyro draws a box of help for each nested dataclass, so each section becomes one."""
    sections = _sections(kind, defaults)
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    words = sys.argv[1:]
    if "--help-all" in words:
        words = ["--help"]
    elif "--help" in words or "-h" in words:
        words, sections = ["--help"], _sections(kind, defaults, advanced=False)
        description += "\n\nThese are the arguments that people change; --help-all lists all."
    boxes = []
    for title, fields in sections.items():
        box = dataclasses.make_dataclass(title, fields, frozen=True)
        box.__doc__ = ""  # tyro would print the one that is made up
        boxes.append((title, Annotated[box, tyro.conf.OmitArgPrefixes], dataclasses.field(default=box())))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = dataclasses.make_dataclass("Arguments", boxes, frozen=True)
            parsed: Any = tyro.cli(arguments, args=words, description=description, registry=REGISTRY)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        _complain(errors.getvalue())
    return {name: getattr(getattr(parsed, title), name) for title, fields in sections.items() for name, *_ in fields}


def _sections(kind: type[StandardArgs], defaults: dict[str, Any], advanced: bool = True) -> dict[str, list[tuple]]:
    """Title → fields (name, type, default): the environment, then what the algorithm adds, then the rest.

    `advanced`: with those that people rarely change.
    """
    sections: dict[str, list[tuple]] = {}
    title = ""
    for field in dataclasses.fields(kind):
        title = re.sub(r"\W+", "_", field.metadata["group"] or title)
        if field.metadata["advanced"] and not advanced:
            continue
        kind_and_help = Annotated[field.type, tyro.conf.arg(help=field.metadata["help"])]  # type: ignore[name-defined]
        default = dataclasses.field(default=defaults.get(field.name, field.default))
        sections.setdefault(title, []).append((field.name, kind_and_help, default))
    standard = [
        re.sub(r"\W+", "_", f.metadata["group"]) for f in dataclasses.fields(StandardArgs) if f.metadata["group"]
    ]
    rank = {title: len(sections) + i if i else -1 for i, title in enumerate(standard)}
    return dict(sorted(sections.items(), key=lambda item: rank.get(item[0], 0)))


def _complain(text: str) -> NoReturn:
    """Raises ConfigError with one line out of tyro's box: the mistake, and the flag that was probably meant."""
    boxed = "╭" in text  # elsewhere, on terminals without such characters, a title and a rule come first
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    lines = lines if boxed else lines[2:]
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}]
    head = " ".join(lines[: rules[0] if rules else len(lines)])
    meant = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")]
    hint = f"; did you mean {meant[0].split(' ')[0].rstrip(',')}?" if meant else "; see --help"
    raise ConfigError(head + hint)
