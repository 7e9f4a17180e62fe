"""Starting and ending a script: Fabric under every launcher, signals, and errors that all ranks agree on."""

import contextlib
import ctypes
import ipaddress
import os
import random
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed import DebugLevel, TCPStore

from fabricrl.utils.errors import ConfigError, LostPeerError, RunError, from_here
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.ranks import all_gather, all_max
from fabricrl.utils.utils import require

PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915
SI_KERNEL = 0x80
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LOOPBACK = "127.0.0.1"
STARTED_BY = "FABRICRL_STARTED_BY"  # tells a rank that Fabric starts the process that does so
STORE_IS_KEPT = "TORCHELASTIC_USE_AGENT_STORE"  # tells PyTorch that the store where ranks meet is listening already


class _Place:
    """This process's knowledge of itself.

    Attributes:
        pid: its own.
        parent: the process that started it, also once that has ended.
        rank: among all, once they have met.
        store: where they meet, if this process keeps it.
    """

    def __init__(self) -> None:
        self.pid, self.parent = os.getpid(), os.getppid()
        self.rank: int | None = None
        self.store: TCPStore | None = None

    def forked(self) -> None:
        self.pid, self.parent = os.getpid(), self.pid


_place = _Place()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_place.forked)


def launch(args: Any) -> Fabric:
    """Builds Fabric from the launcher's environment and the arguments that the user set, and starts all ranks.

    `fabric run` and `lightning run model` hand their choices over in LT_* variables, torchrun in its own; both have
    started the processes already. Otherwise Fabric starts them: one for each of `--devices`, on each node.

    Raises:
        ConfigError: devices that do not exist, a port in use, a choice made twice, variables that make no sense.
        LostPeerError: another rank, or the launcher, has ended before all had met.
    """
    _check_launcher()
    _follow_launcher()
    keep_memory()
    options = _options(args)
    with _explaining(options):
        if "LT_CLI_USED" in os.environ:  # its constructor has the ranks meet, and it forbids `launch`
            prepare_network(os.environ["MASTER_ADDR"], os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"])
            fabric = Fabric(**options)
        else:
            fabric = Fabric(**options)
            if isinstance(fabric.strategy, DDPStrategy):
                _meet(fabric.strategy)
            fabric.launch()
    _place.rank = fabric.global_rank
    torch.set_num_threads(_threads(args, fabric))  # after launch(): launchers set it too, and wrongly
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)  # the same on every rank: parameters start equal
    random.seed(args.seed + fabric.global_rank)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed + fabric.global_rank)
    return fabric


def _options(args: Any) -> dict[str, Any]:
    """Arguments for Fabric's constructor: the user's choices, and the launcher's.

    Raises:
        ConfigError: a choice made twice, or that these scripts do not offer.
    """
    names = ("accelerator", "strategy", "devices", "num_nodes", "precision")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.cuda:
        options.setdefault("accelerator", "cuda")
    if "LT_CLI_USED" in os.environ:
        _refuse(options, [name for name in options if f"LT_{name.upper()}" in os.environ])
        _need("LT_CLI_USED", "TORCHELASTIC_RUN_ID")
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
    return options


def keep_memory() -> None:
    """Makes glibc keep freed memory instead of asking the kernel for it again, page by page.

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
    if not any(codes):
        return
    teller = next(rank for rank, code in enumerate(codes) if code)
    if fault is None or fabric.global_rank != teller:
        fault = RunError()  # without text: the first rank that failed says why
    fault.exit_code, fault.told_by = codes[teller], teller
    raise fault


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, reports a RunError in one line, and ends the process with the exit code that belongs to it."""
    if os.getpid() == 1:
        _go_on_in_child()
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
        report(f"rank {own_rank()} lost a peer: {one_line(error)}", code)
    if code and STARTED_BY in os.environ:
        _outlive_launcher(int(os.environ[STARTED_BY]))
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
    """This process's number among all ranks; before they have met, the one that its launcher gives it."""
    if _place.rank is not None:
        return _place.rank
    launcher = "RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID" if _under_srun() else "LOCAL_RANK"
    return _number(launcher) or 0


def report(message: str, code: int, told_by: int = 0) -> None:
    """One line on standard error; mistakes in arguments, which ranks make alike, are told by the first to make them.

    Before the ranks have met nobody knows whether another node has made it, too. There the first of each node tells;
    under srun, which shows the output of all nodes together, whoever asks first.
    """
    alike, srun = code in (2, 3), _place.rank is None and _under_srun() and (_number("SLURM_NTASKS") or 1) > 1
    if _place.rank is None and not srun:
        speaks = _number("LOCAL_RANK") in (None, told_by)
    else:
        speaks = _asks_first() if alike and srun else own_rank() == told_by
    if message and (speaks or not alike):
        print(f"error: {from_here(' '.join(message.split()))}", file=sys.stderr, flush=True)
    if alike and srun:
        _wait_for_askers()


def _asks_first() -> bool:
    """Tells if no other of srun's ranks has asked this, in the store where they would have met; in doubt none has.

    Rank 0 opens the store if it fails before it would have.
    """
    try:
        ranks = SLURMEnvironment()
        address = LOOPBACK if os.environ.get("SLURM_NNODES") == "1" else ranks.main_address
        port = ranks.main_port
        if own_rank() == 0:
            _place.store = _place.store or open_store(address, port, "MASTER_PORT")
        else:
            _place.store = TCPStore(address, port, None, False, timeout=timedelta(seconds=30))
        return _place.store.add("fabricrl/asked", 1) == 1
    except (RunError, RuntimeError, ValueError):  # there is no place to meet, of which the ranks will be told
        return True


def _wait_for_askers() -> None:
    """Has rank 0, whose store it is, stay until all others have asked, or for some seconds: not all may have failed."""
    deadline = time.monotonic() + 5
    if own_rank() == 0 and _place.store is not None:
        while _place.store.add("fabricrl/asked", 0) < int(os.environ["SLURM_NTASKS"]) and time.monotonic() < deadline:
            time.sleep(0.05)


def _under_srun() -> bool:
    """Tells if Slurm has started the ranks, as Fabric sees it."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and not interactive


def _number(name: str) -> int | None:
    """A variable of the environment as an integer of at least 0, if it is one."""
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def _need(sign: str, *others: str) -> None:
    """Raises ConfigError unless these variables are there, too, which come with another one."""
    for name in others:
        if name not in os.environ:
            raise ConfigError(f"{sign} is set in the environment, but not {name}: unset it, or use a launcher")


def _check_launcher() -> None:
    """Raises ConfigError if variables of a launcher are there but not all of them, or contradict each other."""
    needed: dict[str, tuple[str, ...]] = {"LOCAL_RANK": ("MASTER_PORT",)}
    needed["TORCHELASTIC_RUN_ID"] = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "MASTER_ADDR")
    if _under_srun():
        needed["SLURM_NTASKS"] = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    there = {sign: others for sign, others in needed.items() if sign in os.environ}
    for sign, others in there.items():
        _need(sign, *others)
    for name in {*there, *sum(there.values(), ())} - {"TORCHELASTIC_RUN_ID", "MASTER_ADDR"}:
        if _number(name) is None:
            raise ConfigError(f"{name} is {os.environ[name]!r} in the environment: it must be an integer of at least 0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, world, local_rank, local_world = (
            _number(name) or 0 for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        if not (local_rank < local_world and rank < world and world % local_world == 0):
            given = f"RANK is {rank}, WORLD_SIZE {world}, LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_world}"
            raise ConfigError(
                f"{given} in the environment: ranks must be below the size of their world, and all nodes of one size"
            )


def _follow_launcher() -> None:
    """A rank that a launcher has started ends with it, however that died (Linux); what it leaves waits for nobody.

    Raises:
        LostPeerError: it has ended already.
    """
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    if STARTED_BY in os.environ:
        _die_with(int(os.environ[STARTED_BY]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
        _check_store()


def die_with_parent() -> None:
    """Asks the kernel (Linux) to kill this process as soon as the one that started it has ended."""
    _die_with(_place.parent)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # whoever takes in orphans is the parent now
        raise LostPeerError("the launcher has ended already")


def _check_store() -> None:
    """Raises LostPeerError unless torchrun listens: it may have ended before this process could note its parent."""
    if os.environ.get(STORE_IS_KEPT) != "True":
        return
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    try:
        socket.create_connection((address, port), timeout=60).close()
    except OSError as error:
        raise LostPeerError(
            f"the launcher has ended already: nothing answers at {address}:{port}: {error.strerror or error}"
        ) from error


def _go_on_in_child() -> None:
    """Goes on in a child, for which this process, number 1 of a container, does what such a one has to.

    The kernel keeps from it all signals that it does not handle: also SIGKILL, by which Fabric ends a run of which a
    rank has died. And it becomes the parent of all orphans, whose ends somebody has to take note of.
    """
    sys.stdout.flush()
    watched = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return
    while True:
        came = signal.sigwaitinfo(watched)
        if came.si_signo != signal.SIGCHLD and came.si_code != SI_KERNEL:  # the terminal's reach the child as well
            os.kill(child, came.si_signo)
        ended, status = os.waitpid(-1, os.WNOHANG)  # the child's own end leaves at least itself to wait for
        while ended:
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
            ended, status = os.waitpid(-1, os.WNOHANG)


def _outlive_launcher(launcher: int) -> None:
    """Lets a rank that Fabric started end after the first of its node, which has started it.

    Fabric's observer kills that process as soon as it sees a child gone with an exit code other than 0, even while it
    is about to end with the very same code.
    """
    deadline = time.monotonic() + 10
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.05)


def is_communication_error(error: RuntimeError) -> bool:
    """Tells if a collective has failed because another rank is gone or late."""
    return torch.distributed.is_initialized() and _is_of_peers(error)


def _is_of_peers(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("gloo", "Connection", "NCCL", "Timed out", "peer"))
    )


@contextmanager
def _explaining(options: dict[str, Any]) -> Iterator[None]:
    """Makes an error of ours of what Fabric and PyTorch raise until all ranks have met."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        if _is_of_peers(error):
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LostPeerError(f"rank {own_rank()} has not met the others at {place}: {one_line(error)}") from error
        given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
        raise ConfigError(f"{given} cannot be had here: {one_line(error)}") from error


def _check_choice(name: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Launchers offer more than these scripts do: parameters and observations are whole on every rank, in 32 bits."""
    given = options.get(name, os.environ.get(f"LT_{name.upper()}", allowed[0]))
    require(given in allowed, name, given, f"one of {', '.join(allowed)}")


def _threads(args: Any, fabric: Fabric) -> int:
    """Those asked for, else two if each rank here can have two cores: threads that share one spend it waiting."""
    if args.num_threads is not None:
        return args.num_threads
    cores, ranks = available_cores(), ranks_here(fabric)
    if cores < 2 * ranks:
        return 1
    if fabric.global_rank == 0 and (busy := _cores_of_others()) > cores - 2 * ranks + (ranks - 1) + 0.5:
        text = f"other processes keep {busy:.1f} of {cores:g} cores busy, and threads wait for each other"
        print(f"warning: {text}: runs side by side are faster with --num-threads 1", file=sys.stderr, flush=True)
    return 2


def _cores_of_others(seconds: float = 0.2) -> float:
    """How many of the cores that this process may use are busy with others, looked at for a moment (Linux; else 0)."""
    if not (table := Path("/proc/stat")).exists():
        return 0.0

    def busy() -> float:
        lines = [line.split() for line in table.read_text().splitlines() if re.match(r"cpu\d", line)]
        own = [line for line in lines if int(line[0][3:]) in os.sched_getaffinity(0)]
        ticks = sum(sum(map(int, line[1:4] + line[6:8])) for line in own)  # in programs, the kernel and interrupts
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    before, started = busy(), time.monotonic()
    time.sleep(seconds)
    return (busy() - before) / (time.monotonic() - started)


def available_cores() -> float:
    """The cores that this process may use: what the system says, and no more than its container has."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each period
    if quota.exists() and not (text := quota.read_text()).startswith("max"):
        cores = min(cores, int(text.split()[0]) / int(text.split()[1]))
    return cores


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
    """Tells Fabric's launcher where this node stands among several."""
    if args.num_nodes is None or args.num_nodes == 1 or _under_srun():
        return
    os.environ["NODE_RANK"] = str(args.node_rank)
    os.environ["MASTER_ADDR"] = args.main_address
    os.environ["MASTER_PORT"] = str(args.main_port)
    check_address(args.main_address, "--main-address")


def check_address(address: str, name: str) -> None:
    """Raises ConfigError unless the address is known here, and one that other machines may know, too."""
    try:
        found = ipaddress.ip_address(socket.getaddrinfo(address, None)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} {address} is not known here: {reason}") from error
    if found.is_loopback and not _means_loopback(address):  # some machines' names stand for it
        raise ConfigError(f"{name} {address} is {found} here: give the address by which other machines know it")


def _means_loopback(address: str) -> bool:
    """Tells if an address means this machine wherever it is read."""
    return address == "localhost" or address == "::1" or address.startswith("127.")


def _meet(strategy: DDPStrategy) -> None:
    """Prepares how the ranks find each other: the first of all listens for them, before it starts any other.

    Raises:
        ConfigError: the port is in use, the address is not this machine's, or variables for PyTorch make no sense.
    """
    ranks, one_node = strategy.cluster_environment, strategy.num_nodes == 1
    assert ranks is not None
    launched = STARTED_BY in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not (launched and os.environ.get(STORE_IS_KEPT) == "True"):
        _open_store(ranks, one_node)
    if isinstance(ranks, LightningEnvironment) and not ranks.creates_processes_externally:
        os.environ[STARTED_BY] = str(os.getpid())
    prepare_network(ranks.main_address, one_node)


def _open_store(ranks: ClusterEnvironment, one_node: bool) -> None:
    """Opens the store in which the ranks note where they are, if this is the first; all others are to look for it."""
    named, port = "MASTER_PORT", 0  # 0: any that is free
    if not isinstance(ranks, LightningEnvironment):
        first, port = ranks.global_rank() == 0, ranks.main_port
    else:
        if one_node:
            os.environ["NODE_RANK"] = "0"
        first = ranks.node_rank() == ranks.local_rank() == 0
        given = [name for name in ("MASTER_PORT", "STANDALONE_PORT") if name in os.environ]
        if given:
            named, number = "--main-port" if not one_node else given[0], _number(given[0])
            if number is None or number >= 2**16:
                raise ConfigError(f"{named} is {os.environ[given[0]]!r}: it must be a port, from 0 to 65535")
            port = number
    address = LOOPBACK if one_node else ranks.main_address
    if isinstance(ranks, SLURMEnvironment) and not one_node:
        check_address(address, "MASTER_ADDR")
    if first:
        _place.store = open_store(address, port, named)
        port = _place.store.port
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), STORE_IS_KEPT: "True"}


def open_store(address: str, port: int, named: str) -> TCPStore:
    """A store that listens on this address only, where PyTorch's own would on all that the machine has.

    Raises:
        ConfigError: port or address cannot be had; `named` is what the user knows the port as.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(2048)
            port = listener.getsockname()[1]
            return TCPStore(address, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
    except OSError as error:
        raise ConfigError(f"{named} {port} on {address} cannot be used: {error.strerror}; try another") from error


def prepare_network(address: str, one_node: bool) -> None:
    """Has Gloo and NCCL listen at one interface: loopback if all ranks are here, else the one towards the address.

    Left to themselves they take what the machine's name stands for, or any. What the user has chosen is kept.

    Raises:
        ConfigError: the user's choice is not there, or PyTorch is told to do what crashes it.
    """
    if torch.distributed.get_debug_level() == DebugLevel.DETAIL:
        raise ConfigError(
            "TORCH_DISTRIBUTED_DEBUG is DETAIL, with which PyTorch crashes when it averages gradients: it must be INFO "
            "or OFF with several ranks"
        )
    if sys.platform != "linux":
        return
    interfaces = _interfaces()
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        usable = [name for name, addresses in interfaces.items() if addresses]
        for name in chosen.split(","):
            if name not in usable:
                raise ConfigError(f"GLOO_SOCKET_IFNAME is {chosen}: {name} must be one of {', '.join(usable)}")
        return
    own = LOOPBACK if one_node else _own_address(address)
    if not one_node and ipaddress.ip_address(own).is_loopback and not _means_loopback(address):
        return  # where other machines cannot reach this one
    for name, addresses in interfaces.items():
        if own in addresses:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # =: this one, not all that begin so
            return


def _interfaces() -> dict[str, set[str]]:
    """The addresses of each network interface (Linux)."""
    import fcntl

    found: dict[str, set[str]] = {name: set() for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in found:
            with contextlib.suppress(OSError):  # it has none of this kind
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name].add(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        number, *_, name = line.split()
        found.setdefault(name, set()).add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number)))
    return found


def _own_address(address: str) -> str:
    """This machine's address on the way to another one.

    Raises:
        ConfigError: there is no way.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"the main address {address} cannot be reached from here: {error.strerror}") from error
