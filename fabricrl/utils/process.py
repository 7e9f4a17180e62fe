"""This process among others: who has started it, its number among all ranks, and that it ends when they do."""

import contextlib
import ctypes
import gc
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from fabricrl.utils.errors import ConfigError, LostPeerError
from fabricrl.utils.peers import STARTED_BY, Peers

PR_SET_PDEATHSIG = 1
SI_KERNEL = 0x80
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
STORE_IS_KEPT = "TORCHELASTIC_USE_AGENT_STORE"  # tells PyTorch that the store where ranks meet is listening already


class _Place:
    """This process's knowledge of itself.

    Attributes:
        pid: its own.
        parent: the process that started it, also once that has ended.
        rank: among all, once they have met.
        store: where they meet, if this process keeps it.
        peers: the other ranks, if there are.
        gpu: the number of the one that this rank trains on, beside players on the CPU; None: it is where Fabric says.
    """

    def __init__(self) -> None:
        self.pid, self.parent = os.getpid(), os.getppid()
        self.rank: int | None = None
        self.store: TCPStore | None = None
        self.peers: Peers | None = None
        self.gpu: int | None = None

    def forked(self) -> None:
        self.pid, self.parent = os.getpid(), self.pid


PLACE = _Place()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PLACE.forked)


def own_rank() -> int:
    """This process's number among all ranks; before they have met, the one that its launcher gives it."""
    if PLACE.rank is not None:
        return PLACE.rank
    if PLACE.peers is not None:
        return PLACE.peers.rank
    launcher = "RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID" if under_srun() else "LOCAL_RANK"
    return environ_number(launcher) or 0


def under_srun() -> bool:
    """Tells if Slurm has started the ranks, as Fabric sees it."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and not interactive


def environ_number(name: str) -> int | None:
    """A variable of the environment as an integer of at least 0, if it is one."""
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def need(sign: str, *others: str) -> None:
    """Raises ConfigError unless these variables are there, too, which come with another one."""
    for name in others:
        if name not in os.environ:
            raise ConfigError(f"{sign} is set in the environment, but not {name}: unset it, or use a launcher")


def check_launcher() -> None:
    """Raises ConfigError if variables of a launcher are there but not all of them, or contradict each other."""
    needed: dict[str, tuple[str, ...]] = {"LOCAL_RANK": ("MASTER_PORT",)}
    needed["TORCHELASTIC_RUN_ID"] = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "MASTER_ADDR")
    if under_srun():
        needed["SLURM_NTASKS"] = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    there = {sign: others for sign, others in needed.items() if sign in os.environ}
    for sign, others in there.items():
        need(sign, *others)
    for name in {*there, *sum(there.values(), ())} - {"TORCHELASTIC_RUN_ID", "MASTER_ADDR"}:
        if environ_number(name) is None:
            raise ConfigError(f"{name} is {os.environ[name]!r} in the environment: it must be an integer of at least 0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, world, local_rank, local_world = (
            environ_number(name) or 0 for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        if not (local_rank < local_world and rank < world and world % local_world == 0):
            given = f"RANK is {rank}, WORLD_SIZE {world}, LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_world}"
            raise ConfigError(
                f"{given} in the environment: ranks must be below the size of their world, and all nodes of one size"
            )


def follow_launcher() -> None:
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
    _die_with(PLACE.parent)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # whoever takes in orphans is the parent now
        raise LostPeerError("the launcher has ended already")


def _check_store() -> None:
    """Raises LostPeerError unless torchrun listens: it may have ended before this process could note its parent."""
    if os.environ.get(STORE_IS_KEPT) != "True":
        return
    address, port = os.environ["MASTER_ADDR"], environ_number("MASTER_PORT")
    try:
        socket.create_connection((address, port), timeout=60).close()
    except OSError as error:
        raise LostPeerError(
            f"the launcher has ended already: nothing answers at {address}:{port}: {error.strerror or error}"
        ) from error


def go_on_in_child() -> None:
    """Goes on in a child, for which this process, number 1 of a container, does what such a one has to.

    The kernel keeps from it all signals that it does not handle: also SIGKILL, by which Fabric ends a run of which a
    rank has died. And it becomes the parent of all orphans, whose ends somebody has to take note of.
    """
    sys.stdout.flush()
    watched = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}
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


def keep_memory() -> None:
    """Makes glibc keep freed memory instead of asking the kernel for it again, page by page.

    Each minibatch of images frees and takes some hundred megabytes: this is a tenth to a fourth of its time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries have none
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def available_cores() -> float:
    """The cores that this process may use: what the system says, and no more than its container has."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each period
    if quota.exists() and not (text := quota.read_text()).startswith("max"):
        cores = min(cores, int(text.split()[0]) / int(text.split()[1]))
    return cores


def idle_cores() -> float:
    """The cores that this process may use and that were idle in the last minute; all where the system does not say."""
    load = 0.0
    with contextlib.suppress(AttributeError, OSError):
        load = os.getloadavg()[0]
    return available_cores() - load


def cores_of_others(seconds: float = 0.2) -> float:
    """Cores, of those that this process may use, that others keep busy, looked at for a moment (Linux; else 0)."""
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


def freeze_gc() -> None:
    """Freezes long-lived objects: to search them again and again costs 3 % of SAC's update."""
    gc.collect()
    gc.freeze()
