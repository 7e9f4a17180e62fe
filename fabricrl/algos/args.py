"""The arguments that every script accepts, and how a command line becomes a frozen dataclass."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from fabricrl.utils.checkpoint import load_checkpoint, reading
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.utils import require

Args = TypeVar("Args", bound="StandardArgs")


def arg(default: Any, help: str, group: str | None = None) -> Any:
    """A dataclass field with its help; `group` opens a section of `--help` that the fields after it join."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class StandardArgs:
    """What every script accepts. Checked when it is made: see `__post_init__`."""

    # --- environment
    env_id: str = arg("CartPole-v1", "Gymnasium id, or module:Id-v0 for an environment of your own", "environment")
    env_kwargs: str = arg("{}", "arguments of the environment's constructor, as a JSON object")
    mask_velocities: bool = arg(
        False, "zero velocities in observations: CartPole, MountainCar, MountainCarContinuous, Pendulum, LunarLander"
    )
    obs_keys: tuple[str, ...] = arg((), "parts of a Dict observation to use; none: all")
    action_repeat: int = arg(1, "times that each action is taken; of the last two frames of an Atari game the maximum")
    vectorization: Literal["auto", "sync", "async", "native", "envpool"] = arg(
        "auto",
        "sync: one process steps all; async: a process each; native: Gymnasium's vector form, where there is one; "
        "envpool: C++ threads, by the extra of that name; auto: native or the faster of sync and async",
    )
    num_envs: int = arg(1, "environments per rank")
    total_timesteps: int = arg(1_000_000, "environment steps over all environments and ranks, in whole iterations")
    seed: int = arg(1, "seed of parameters, environments, action noise and minibatches")
    capture_video: bool = arg(False, "record environment 0 of rank 0 into the run folder")
    video_every: int = arg(100, "record every so many episodes of that environment")

    # --- run
    exp_name: str = arg("", "name of the run; empty: that of the algorithm", "run, logging and checkpoints")
    log_dir: str = arg("logs", "folder of all runs")
    logger: Literal["tensorboard", "csv", "wandb"] = arg(
        "tensorboard", "where metrics go; wandb needs the extra of that name"
    )
    log_every: int = arg(2_000, "environment steps between log entries, rounded up to whole iterations")
    track: bool = arg(False, "the same as --logger wandb")
    wandb_project_name: str = arg("fabricrl", "project on Weights & Biases")
    wandb_entity: str | None = arg(None, "user or team on Weights & Biases")
    save_model: bool = arg(True, "write checkpoints, the last at the end or when the run is stopped")
    checkpoint_every: int = arg(100_000, "environment steps between checkpoints; 0: only the last")
    keep_checkpoints: int = arg(3, "newest checkpoints to keep, besides the best")
    upload_model: bool = arg(False, "upload the run's folder to the Hugging Face Hub at the end; needs huggingface_hub")
    hf_entity: str | None = arg(None, "user or organisation on the Hugging Face Hub; None: whose token it is")
    resume: str | None = arg(
        None, "checkpoint or run folder to go on from, with its arguments; flags given beside it win"
    )

    # --- hardware
    accelerator: str | None = arg(
        None, "cpu, cuda or auto; None: cpu, which is faster for small networks", "hardware and launching"
    )
    cuda: bool = arg(False, "the same as --accelerator cuda")
    devices: str | None = arg(None, "processes per node, or a list of GPUs such as 0,2; None: 1")
    strategy: str | None = arg(None, "auto or ddp; None: ddp with several devices")
    num_nodes: int | None = arg(None, "machines; None: 1")
    node_rank: int = arg(0, "number of this machine, from 0")
    main_address: str = arg("127.0.0.1", "address of machine 0")
    main_port: int = arg(29400, "port on machine 0 that the ranks meet at; used with several machines")
    precision: Literal["32-true", "bf16-mixed"] | None = arg(None, "Fabric precision; None: 32-true")
    num_threads: int | None = arg(1, "threads of PyTorch per rank; small networks are slower with more than one")
    matmul_precision: Literal["highest", "high", "medium"] = arg(
        "highest", "float32 products: medium is faster for wide networks on some processors, slower for narrow ones"
    )
    compile: bool = arg(
        False, "compile the whole update: several times faster for small networks, after up to a minute's wait"
    )
    cuda_graphs: bool = arg(True, "capture updates as CUDA graphs; on a GPU only")
    player_device: Literal["auto", "cpu", "cuda"] = arg(
        "auto", "where the policy acts; auto: the faster of the CPU and the GPU that trains"
    )
    torch_deterministic: bool = arg(True, "deterministic cuDNN kernels")

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the argument, what was given, and what is allowed."""
        counts = ("num_envs", "total_timesteps", "action_repeat", "video_every", "log_every", "keep_checkpoints")
        for name in (*counts, "num_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "an integer of at least 1")
        require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        require(0 <= self.seed < 2**31, "seed", self.seed, "between 0 and 2^31 - 1")
        require(
            bool(re.fullmatch(r"[\w.-]*", self.exp_name)), "exp_name", repr(self.exp_name), "letters, digits, . _ or -"
        )
        require(self.num_nodes is None or self.num_nodes >= 1, "num_nodes", self.num_nodes, "an integer of at least 1")
        require(0 <= self.node_rank < (self.num_nodes or 1), "node_rank", self.node_rank, "from 0 to num-nodes - 1")
        require(0 < self.main_port < 65536, "main_port", self.main_port, "between 1 and 65535")
        clash = self.cuda and self.accelerator not in (None, "cuda", "gpu")
        require(not clash, "accelerator", self.accelerator, "cuda, or left out, beside --cuda")
        if self.track or self.logger == "wandb":
            there = importlib.util.find_spec("wandb") is not None
            require(there, "logger", "wandb", "another one, or wandb after: pip install -e '.[wandb]'")
        if self.upload_model:
            there = importlib.util.find_spec("huggingface_hub") is not None
            require(there, "upload_model", "set", "left out, or set after: pip install huggingface_hub")
        self._check_json()
        self._check_log_dir()

    def _check_json(self) -> None:
        try:
            valid = isinstance(json.loads(self.env_kwargs), dict)
        except json.JSONDecodeError:
            valid = False
        require(valid, "env_kwargs", repr(self.env_kwargs), """a JSON object such as '{"continuous": true}'""")

    def _check_log_dir(self) -> None:
        folder = Path(self.log_dir).expanduser().absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        require(writable, "log_dir", self.log_dir, f"a folder that can be written or made, and {folder} is not")


@dataclass(frozen=True)
class DecoupledArgs:
    """What a decoupled script accepts besides what its coupled one does; its arguments extend both."""

    max_lag: int = arg(
        1,
        "iterations that playing is ahead of training: 0 waits for fresh weights, 1 plays the next rollout meanwhile",
        "decoupling",
    )
    timeout: float = arg(5.0, "minutes that a rank waits for a message of another before all of them end")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require(0 <= self.max_lag <= 100, "max_lag", self.max_lag, "between 0 and 100")
        require(0 < self.timeout < float("inf"), "timeout", self.timeout, "a number of minutes above 0")


def require_between(args: StandardArgs, low: float, high: float, *names: str) -> None:
    """Raises ConfigError unless each of the named arguments is a number in [low, high]."""
    for name in names:
        value = getattr(args, name)
        require(math.isfinite(value) and low <= value <= high, name, value, f"between {low:g} and {high:g}")


def parse(kind: type[Args], algo: str, presets: dict[str, dict[str, Any]] | None = None) -> Args:
    """The arguments of a command line: flags given win over `--resume`'s, those over `--preset`'s, those over defaults.

    Raises:
        ConfigError: an unknown flag, or a value that is not allowed.
        CheckpointError: `--resume` names something that cannot be resumed.
    """
    defaults: dict[str, Any] = {}
    preset = _early("--preset")
    if (resume := _early("--resume")) is not None:
        if preset is not None:
            raise ConfigError(f"--preset {preset} beside --resume: a run that is resumed keeps the arguments it has")
        state, _ = load_checkpoint(resume, algo)
        inherited = {field.name for field in dataclasses.fields(kind)} - _not_resumed()
        if ("max_lag" in state["args"]) != issubclass(kind, DecoupledArgs):
            inherited -= {"devices", "num_nodes", "exp_name"}  # one rank more plays there, or here
        defaults = {name: value for name, value in state["args"].items() if name in inherited}
        defaults["player_device"] = defaults.get("player_device") or "auto"  # which decoupled scripts called None
        with reading(resume):
            kind(**defaults | {"log_dir": tempfile.gettempdir()})  # where it writes now is another matter
    elif preset is not None:
        require(preset in (presets or {}), "preset", preset, f"one of {', '.join(presets or {})}")
        defaults = {"preset": preset, **(presets or {})[preset]}
    return kind(**_parse_flags(kind, defaults))


def _early(flag: str) -> str | None:
    """What is given for a flag that the defaults of the others depend on."""
    words = sys.argv[1:]
    given = [after for word, after in itertools.pairwise(words) if word == flag]
    given += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return given[-1] if given and given[-1] != "None" else None


def _not_resumed() -> set[str]:
    """Arguments that say where this process stands, not what the run is; another launcher brings its own."""
    if "LT_CLI_USED" in os.environ:
        choices = {"accelerator", "cuda", "devices", "strategy", "num_nodes", "precision"}
    else:
        choices = {"devices", "num_nodes"} if "TORCHELASTIC_RUN_ID" in os.environ else set()
    return {"resume", "node_rank", "main_address", "main_port", "allow_empty_buffer"} | choices


def _parse_flags(kind: type[StandardArgs], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. tyro draws a box of help for each nested dataclass, so each section becomes one."""
    sections = _sections(kind, defaults)
    boxes = []
    for title, fields in sections.items():
        box = dataclasses.make_dataclass(title, fields, frozen=True)
        box.__doc__ = ""  # tyro would print the one that is made up
        boxes.append((title, Annotated[box, tyro.conf.OmitArgPrefixes], dataclasses.field(default=box())))
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed: Any = tyro.cli(dataclasses.make_dataclass("Arguments", boxes, frozen=True), description=description)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        _complain(errors.getvalue())
    return {name: getattr(getattr(parsed, title), name) for title, fields in sections.items() for name, *_ in fields}


def _sections(kind: type[StandardArgs], defaults: dict[str, Any]) -> dict[str, list[tuple]]:
    """Title → fields (name, type, default): the environment, then what the algorithm adds, then the rest."""
    sections: dict[str, list[tuple]] = {}
    title = ""
    for field in dataclasses.fields(kind):
        title = re.sub(r"\W+", "_", field.metadata["group"] or title)
        kind_and_help = Annotated[field.type, tyro.conf.arg(help=field.metadata["help"])]
        default = dataclasses.field(default=defaults.get(field.name, field.default))
        sections.setdefault(title, []).append((field.name, kind_and_help, default))
    standard = [
        re.sub(r"\W+", "_", f.metadata["group"]) for f in dataclasses.fields(StandardArgs) if f.metadata["group"]
    ]
    rank = {title: len(sections) + i if i else -1 for i, title in enumerate(standard)}
    return dict(sorted(sections.items(), key=lambda item: rank.get(item[0], 0)))


def _complain(text: str) -> NoReturn:
    """One line out of tyro's box: what is wrong, and the flag that was probably meant."""
    boxed = "╭" in text  # elsewhere, on terminals without such characters, a title and a rule come first
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    lines = lines if boxed else lines[2:]
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}]
    head = " ".join(lines[: rules[0] if rules else len(lines)])
    meant = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")]
    hint = f"; did you mean {meant[0].split(' ')[0].rstrip(',')}?" if meant else "; see --help"
    raise ConfigError(head + hint)
