"""The arguments that every script accepts, and what is allowed."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from gymnasium.spaces import Box, Space

from fabricrl.data.memory import GIB, available_memory
from fabricrl.utils.choices import ALLOWED, check_choice
from fabricrl.utils.errors import ConfigError, require
from fabricrl.utils.extras import missing
from fabricrl.utils.hub import is_installed
from fabricrl.utils.peers import MINUTES
from fabricrl.utils.text import is_json_object, is_one_line

LARGEST = 1e30  # float32 ends at 3.4e38, and numbers are multiplied
MAX_STEPS = 10**12 - 1  # what fits into the names of checkpoints, which sort by their steps
# Bytes that are taken at the very least: by an environment, one in a process of its own, a step of a rollout, and a
# weight that is trained (itself, its gradient and two moments), in float32
ENV_BYTES, PROCESS_BYTES, STEP_BYTES, WEIGHT_BYTES = 2**10, 8 * 2**20, 32, 16
AUTO = "auto"  # what `--resume` may be in place of a path


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
        "is one; envpool: C++ threads, with the extra of that name; torch: tensors on the device that trains; auto: "
        "torch for environments that are tensors, else native or the faster of sync and async",
    )
    check_spaces: bool = arg(
        False,
        "check the bounds of all observations at every step; off: those of integers, and of floats at resets",
        advanced=True,
    )
    info_keys: tuple[str, ...] = arg(
        (),
        "numbers in an environment's infos at the end of an episode to log the mean of, besides is_success",
        advanced=True,
    )
    num_envs: int = arg(1, "environments per rank")
    total_timesteps: int = arg(1_000_000, "environment steps over all environments and ranks, in whole iterations")
    seed: int = arg(1, "seed of parameters, environments, action noise and minibatches")
    seeds: int = arg(1, "number of runs, with seed, seed + 1, ...; several are compared at the end", advanced=True)
    jobs: int = arg(1, "with --seeds: runs at the same time", advanced=True)
    capture_video: bool = arg(False, "record environment 0 of rank 0 into the run folder")
    video_every: int = arg(100, "episodes of that environment between recordings", advanced=True)
    eval_every: int = arg(
        0, "environment steps between greedy evaluations on separate environments, which choose best.ckpt; 0: none"
    )
    eval_episodes: int = arg(10, "episodes of an evaluation; ranks share them", advanced=True)
    stop_at_return: float | None = arg(
        None, "end the run, with success, once the mean return of an evaluation reaches this", advanced=True
    )

    # --- run
    exp_name: str = arg(
        "",
        "name of the run; empty: the algorithm's, with what differs from the defaults",
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
    num_threads: int | None = arg(1, "PyTorch threads per rank; more than one slows small networks down")
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
        require(not clash, "accelerator", self.accelerator, "cuda, or left out, with --cuda")
        self._check_texts()

    def _check_stop(self) -> None:
        if self.stop_at_return is not None:
            require_between(self, -LARGEST, LARGEST, "stop_at_return")
            allowed = "left out, or given with --eval-every, as evaluations measure it"
            require(self.eval_every > 0, "stop_at_return", self.stop_at_return, allowed)

    def _check_texts(self) -> None:
        given, name = self.env_kwargs, self.exp_name
        allowed = """a JSON object such as '{"continuous": true}', in single quotes for the shell"""
        levels = itertools.accumulate((letter in "{[") - (letter in "}]") for letter in given)
        if len(given) > 100_000 or max(levels, default=0) > 50:
            allowed = "a JSON object of at most 100 000 characters and 50 levels"
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
        if (self.track or self.logger == "wandb") and importlib.util.find_spec("wandb") is None:
            raise missing("--track" if self.track else "--logger wandb", "wandb")
        if self.upload_model:
            if not is_installed():
                raise missing("--upload-model", "hub")
            require(self.save_model, "upload_model", "set", "left out beside --no-save-model, which leaves nothing")
        processors = os.cpu_count() or 1
        allowed = f"at most {processors}, the processors of this machine"
        require(self.num_threads is None or self.num_threads <= processors, "num_threads", self.num_threads, allowed)
        each = PROCESS_BYTES if self.vectorization == "async" else ENV_BYTES
        need = self.num_envs * (each if self.vectorization in ("sync", "async") else STEP_BYTES)
        require_memory("--num-envs", f"{self.num_envs} environments", need)
        self._check_log_dir()

    def _check_log_dir(self) -> None:
        allowed = "a writable folder, or one that can be created"
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
        "iterations that players may run ahead of the trainers; 0: wait for fresh weights",
        "decoupling",
    )
    players: int = arg(1, "ranks that play, each its share of the environments; the others train")
    weights_precision: Literal["fp32", "bf16"] = arg(
        "fp32", "precision in which weights are sent to players; bf16 halves the bytes by rounding", advanced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require(0 <= self.max_lag <= 100, "max_lag", self.max_lag, "between 0 and 100")
        given: Any = self
        require_counts(given, 10_000, "players")
        allowed = f"a multiple of {self.players}, the players"
        require(given.num_envs % self.players == 0, "num_envs", given.num_envs, allowed)


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


def require_images(args: Any) -> None:
    """Refuses sizes of images, stacks and encoders that make no sense."""
    require_counts(args, 64, "frame_stack")
    require_counts(args, 65_536, "cnn_features")
    allowed = "at least 36, at most 4096, or None"
    require(args.resize is None or 36 <= args.resize <= 4096, "resize", args.resize, allowed)


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
            f"{flags}: only {free / GIB:.2f} GiB of memory is free, too little for {what}: "
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
