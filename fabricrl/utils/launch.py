"""Starting and ending a script: Fabric under every launcher, signals, and errors that all ranks agree on."""

import ctypes
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fabricrl.utils.errors import ConfigError, LostPeerError, RunError
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.ranks import all_gather, all_max
from fabricrl.utils.utils import require

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def launch(args: Any) -> Fabric:
    """Builds Fabric from the launcher's environment and the arguments that the user set, and starts all ranks.

    `fabric run` and `lightning run model` hand their choices over in LT_* variables, torchrun in its own; both have
    started the processes already. Otherwise Fabric starts them: one for each of `--devices`, on each node.

    Raises:
        ConfigError: devices that do not exist, a port in use, or a choice made twice.
    """
    _follow_launcher()
    keep_memory()
    names = ("accelerator", "strategy", "devices", "num_nodes", "precision")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.cuda:
        options.setdefault("accelerator", "cuda")
    if "LT_CLI_USED" in os.environ:
        _refuse(options, [name for name in options if f"LT_{name.upper()}" in os.environ])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _refuse(options, [name for name in options if name in ("devices", "num_nodes")])
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        options |= {"devices": local_world, "num_nodes": int(os.environ["WORLD_SIZE"]) // local_world}
    else:
        options.setdefault("devices", "1")
        _set_nodes(args)
    if "LT_ACCELERATOR" not in os.environ:
        options.setdefault("accelerator", "cpu")  # small networks train slower on a GPU
    _check_choice("precision", options, ("32-true", "32", "bf16-mixed", "bf16"))
    _check_choice("strategy", options, ("auto", "ddp"))
    try:
        fabric = Fabric(**options)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
        raise ConfigError(f"{given} cannot be had here: {one_line(error)}") from error
    if "LT_CLI_USED" not in os.environ:  # that launcher has done it, and forbids it
        fabric.launch()
    torch.set_num_threads(_threads(args, fabric))  # after launch(): launchers set it too, and wrongly
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)  # the same on every rank: parameters start equal
    random.seed(args.seed + fabric.global_rank)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed + fabric.global_rank)
    return fabric


def keep_memory() -> None:
    """Has glibc keep what is freed, instead of asking the kernel for it page by page again.

    Each minibatch of images frees and takes some hundred megabytes: this is a tenth to a fourth of its time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries have none
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_ranks(fabric: Fabric, module: nn.Module, obs: Tensor) -> None:
    """At start, parameters must be equal on all ranks and first observations different; warns about equal ones.

    Raises:
        RunError: the ranks start from different parameters.
    """
    if fabric.world_size == 1:
        return
    check_parameters(fabric, module)
    firsts = all_gather(fabric, obs.flatten())  # [W, ...]
    if fabric.global_rank == 0 and len(firsts.unique(dim=0)) < len(firsts):
        print("warning: some ranks start from equal observations; is the environment seeded?", file=sys.stderr)


def check_parameters(fabric: Fabric, module: nn.Module) -> None:
    """Raises RunError unless the module has the same parameters on all ranks."""
    hashes = all_gather(fabric, parameter_hash(module)).tolist()
    if len(set(hashes)) > 1:
        raise RunError(f"ranks start from different parameters: hashes by rank are {hashes}")


class StopSignal:
    """SIGINT and SIGTERM ask for a stop at the end of the iteration; another, a second later or more, stops at once.

    Not sooner: on Ctrl-C a rank hears from the terminal and, a moment later, from the launcher that heard it too.
    """

    def __init__(self) -> None:
        self.received, self._when = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.received and time.monotonic() - self._when >= 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self._when = number, time.monotonic()

    @property
    def code(self) -> int:
        """130 or 143 if this rank was asked to stop, else 0."""
        return 128 + self.received if self.received else 0

    def exit_code(self, fabric: Fabric) -> int:
        """The largest `code` of all ranks, which call it together."""
        return all_max(fabric, self.code)


@contextmanager
def failing_together(fabric: Fabric) -> Iterator[None]:
    """A RunError inside ends all ranks with its exit code, rather than leave the others waiting for this one."""
    fault: RunError | None = None
    try:
        yield
    except RunError as error:
        fault = error
    if fault is None and fabric.world_size == 1:
        return
    codes = all_gather(fabric, torch.tensor(fault.exit_code if fault else 0)).tolist()  # [W]
    if fault is None and any(codes):
        fault = RunError()  # the rank that failed says why
        fault.exit_code = max(codes)
    if fault is not None:
        fault.told_by = next(rank for rank, code in enumerate(codes) if code)
        raise fault


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, reports a RunError in one line, and ends the process with the exit code that belongs to it."""
    parent = os.getppid()
    try:
        code = main()
        _part()
    except RunError as error:
        code = error.exit_code
        report(str(error), code, error.told_by)
    except KeyboardInterrupt:  # before StopSignal took over
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        code = LostPeerError.exit_code
        report(f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} lost a peer: {one_line(error)}", code)
    if code and "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        _outlive_launcher(parent)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _part() -> None:
    """All ranks let go of each other at the same time: one that is gone early looks like a fault to the others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def own_rank() -> int:
    """This process's, as its launcher says; also where there is no Fabric yet."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def report(message: str, code: int, told_by: int = 0) -> None:
    """One line on standard error; mistakes in arguments, which ranks make alike, are told by the first to make them."""
    rank = own_rank()
    if message and (code not in (2, 3) or rank == told_by):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _follow_launcher() -> None:
    """A rank that a launcher has started ends with it, however that died (Linux); what it leaves waits for nobody.

    Raises:
        ConfigError: variables of a launcher that is not there.
    """
    needed = {"TORCHELASTIC_RUN_ID": ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"), "LOCAL_RANK": ("MASTER_PORT",)}
    for sign, others in needed.items():
        missing = [name for name in others if name not in os.environ]
        if sign in os.environ and missing:
            raise ConfigError(f"{sign} is set in the environment, but not {missing[0]}: unset it, or use a launcher")
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ and _is_launched():
        die_with_parent()


def _is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_RANK") != "0"


def die_with_parent() -> None:
    """Asks the kernel (Linux) to kill this process as soon as the one that started it has ended."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent == 1:
        raise LostPeerError("the launcher has ended already")


def _outlive_launcher(launcher: int) -> None:
    """Lets a rank that Fabric started end after rank 0 of its node.

    Fabric's observer kills that process as soon as it sees a child gone with an exit code other than 0, even while it
    is about to end with the very same code.
    """
    if os.environ["LOCAL_RANK"] == "0":
        return
    deadline = time.monotonic() + 10
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.05)


def is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective has failed because another rank is gone or late."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection", "NCCL", "Timed out", "peer")
    )


def _check_choice(name: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Launchers offer more than these scripts do: parameters and observations are whole on every rank, in 32 bits."""
    given = options.get(name, os.environ.get(f"LT_{name.upper()}", allowed[0]))
    require(given in allowed, name, given, f"one of {', '.join(allowed)}")


def _threads(args: Any, fabric: Fabric) -> int:
    """Those asked for, else two if each rank here can have two cores: threads that share one spend it waiting."""
    if args.num_threads is not None:
        return args.num_threads
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each period
    if quota.exists() and not (text := quota.read_text()).startswith("max"):
        cores = min(cores, int(text.split()[0]) / int(text.split()[1]))
    return 2 if cores >= 2 * ranks_here(fabric) else 1


def ranks_here(fabric: Fabric) -> int:
    """Ranks on this machine."""
    if fabric.world_size == 1:
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    return int(local) if local else fabric.world_size // getattr(fabric.strategy, "num_nodes", 1)


def _refuse(options: dict[str, Any], names: list[str]) -> None:
    if names:
        flag = f"--{names[0].replace('_', '-')}"
        raise ConfigError(
            f"{flag} {options[names[0]]} stands after the script, but the launcher has set it; give it once"
        )


def _set_nodes(args: Any) -> None:
    """Tells Fabric's launcher where this node stands; on one node it finds a free port by itself."""
    if args.num_nodes is None or args.num_nodes == 1 or "SLURM_NTASKS" in os.environ:
        return
    os.environ["NODE_RANK"] = str(args.node_rank)
    os.environ["MASTER_ADDR"] = args.main_address
    os.environ["MASTER_PORT"] = str(args.main_port)
    if args.node_rank == 0 and "LOCAL_RANK" not in os.environ:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((args.main_address, args.main_port))
            except OSError as error:
                raise ConfigError(
                    f"--main-port {args.main_port} on {args.main_address} cannot be used: {error.strerror}; try another"
                ) from error
