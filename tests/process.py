"""Scripts run as a user runs them: real processes with a hard time limit, of which none may be left at the end."""

import atexit
import contextlib
import faulthandler
import importlib
import io
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fabricrl.algos.run import Run
from fabricrl.utils.signals import StopSignal

ROOT = Path(__file__).parent.parent
PPO = str(ROOT / "fabricrl/algos/ppo/ppo.py")
PPO_DECOUPLED = str(ROOT / "fabricrl/algos/ppo/ppo_decoupled.py")
SAC = str(ROOT / "fabricrl/algos/sac/sac.py")
SAC_DECOUPLED = str(ROOT / "fabricrl/algos/sac/sac_decoupled.py")
DROQ = str(ROOT / "fabricrl/algos/droq/droq.py")
EVALUATE = str(ROOT / "fabricrl/evaluate.py")
PYTHON = [sys.executable]
FORKED = ["forked"]  # a script after it starts in milliseconds, see `Forked`
LIMIT = 300  # seconds, after which something hangs, however busy the machine
# What a launcher around the tests would have set, and what would make our launchers believe that they run inside it
LAUNCHERS = re.compile(
    r"(LT|TORCHELASTIC|TORCH_NCCL|SLURM)_.*|(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE|NAME)|MASTER_.*"
)
MARK = "FABRICRL_TEST_RUN"  # a variable that all processes of a run inherit, also those that leave its process group


def command(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes(mark: str, session: int = 0) -> dict[int, dict[str, str]]:
    """The environment variables of all living processes of a run, by process id.

    `session`: of a forked script, whose variables Linux does not show.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, of, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if state == "Z":
                continue  # has ended, its parent only has not noticed yet
            variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            pairs = dict(pair.split("=", 1) for pair in variables if "=" in pair)
            if pairs.get(MARK) == mark or of == str(session):
                found[int(entry.name)] = pairs
    return found


def listeners(pid: int) -> set[str]:
    """The addresses at which a process listens."""
    own = set()
    with contextlib.suppress(OSError):  # it may end meanwhile
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                own.add(os.readlink(descriptor))
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:  # LISTEN
                number = bytes.fromhex(words[1].partition(":")[0])
                parts = [number[at : at + 4][::-1] for at in range(0, len(number), 4)]  # words of this machine
                found.add(socket.inet_ntop(family, b"".join(parts)))
    return found


def parsed(line: str) -> dict[str, str]:
    """The fields of a result line; the last is a path, which may have spaces."""
    fields, _, checkpoint = line.partition(" checkpoint=")
    return dict(re.findall(r"(\w+)=(\S+)", fields)) | {"checkpoint": checkpoint}


# A process that has imported what scripts import and forks those that are asked for: they start in milliseconds
FORKSERVER = multiprocessing.get_context("forkserver")
TWINS = [f"fabricrl.algos.{algo}.{algo}_decoupled" for algo in ("ppo", "ppo_recurrent", "sac", "droq")]
FORKSERVER.set_forkserver_preload([*TWINS, "tensorboard"])


class Forked:
    """A script that runs as `python script.py` does, but in a process that has imported everything already.

    It has a session, arguments, variables, a folder and outputs of its own, and Python's handlers of signals; its exit
    code is seen by the process that forked it, which tells. Stands for `subprocess.Popen`, as far as tests need it.
    """

    def __init__(self, words: list[str], folder: Path, variables: dict[str, str]) -> None:
        pipes = [FORKSERVER.Pipe(duplex=False) for _ in range(2)]
        self._child = FORKSERVER.Process(target=_script, args=(words, folder, variables, *(ours for _, ours in pipes)))
        self._child.start()
        self.pid: int = self._child.pid or 0
        self._read = ["", ""]
        self._readers = [threading.Thread(target=self._drain, args=(i, pipes[i][0]), daemon=True) for i in range(2)]
        for (_, theirs), reader in zip(pipes, self._readers, strict=True):
            theirs.close()
            reader.start()

    def _drain(self, index: int, pipe: Any) -> None:
        with os.fdopen(os.dup(pipe.fileno())) as stream:
            self._read[index] = stream.read()
        pipe.close()

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        deadline = time.monotonic() + (LIMIT if timeout is None else timeout)
        for part in (*self._readers, self._child):
            part.join(max(deadline - time.monotonic(), 0))
        if self.returncode is None or any(reader.is_alive() for reader in self._readers):
            raise subprocess.TimeoutExpired("a forked script", timeout or LIMIT)
        return self._read[0], self._read[1]

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _script(words: list[str], folder: Path, variables: dict[str, str], out: Any, err: Any) -> None:
    """Becomes a script, in a forked process."""
    os.setsid()
    for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())):
        os.dup2(descriptor, stream)
    out.close()
    err.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


@dataclass
class Running:
    """A command in a process group of its own."""

    arguments: list[str]
    process: "subprocess.Popen[str] | Forked"
    mark: str
    code: int | None = None
    out: str = ""
    err: str = ""
    left: list[int] = field(default_factory=list)
    listened: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def result(self) -> dict[str, str]:
        """The fields of the result line."""
        lines = [line for line in self.out.splitlines() if line.startswith("result ")]
        assert len(lines) == 1, f"not one result line but {len(lines)}\n{self.report()}"
        return parsed(lines[0])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def processes(self) -> dict[int, dict[str, str]]:
        return processes(self.mark, self.process.pid)

    def rank_pid(self, rank: int) -> int:
        """The process of a rank that Fabric has started; that of rank 0 is the one that started them."""
        if rank == 0:
            return self.process.pid
        pids = [pid for pid, variables in self.processes().items() if variables.get("LOCAL_RANK") == str(rank)]
        assert len(pids) == 1, f"{len(pids)} processes of rank {rank}\n{self.report()}"
        return pids[0]

    def finish(self, limit: float = LIMIT) -> "Running":
        """Waits for the end, and for the end of all processes that the command has started; kills what is left."""
        try:
            self.out, self.err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill()
            self.out, self.err = self.process.communicate()
            raise AssertionError(f"still running after {limit} s\n{self.report()}") from None
        self.code = self.process.returncode
        deadline = time.monotonic() + 15  # those of other ranks may need a moment longer than the first
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.left = list(left)
        self.kill()
        assert not left, f"processes {self.left} are left\n{self.report()}"
        return self

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notes the addresses at which the command's processes listen, in `listened`, by process."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                for pid in self.processes():
                    self.listened[pid] |= listeners(pid)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def kill(self) -> None:
        for pid in {self.process.pid, *self.processes()} if self.process.poll() is None else self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def report(self) -> str:
        return f"$ {' '.join(self.arguments)}\ncode {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


def _opened(words: list[str], folder: Path, variables: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def started(*arguments: object, cwd: Path = ROOT, variables: dict[str, str] | None = None) -> Iterator[Running]:
    """Starts a command; on leaving, nothing of it is alive, whatever happened."""
    mark = uuid.uuid4().hex
    clean = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    words = [str(argument) for argument in arguments]
    own = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", MARK: mark}  # a crash outside of Python shows where
    everything = clean | own | (variables or {})
    process = Forked(words[1:], cwd, everything) if words[:1] == FORKED else _opened(words, cwd, everything)
    running = Running(words, process, mark)
    try:
        yield running
    finally:
        running.kill()
        if running.code is None:
            process.communicate()


def run(*arguments: object, cwd: Path = ROOT, variables: dict[str, str] | None = None) -> Running:
    """Runs a command to its end; fails if it hangs or leaves a process behind."""
    with started(*arguments, cwd=cwd, variables=variables) as running:
        return running.finish()


def wait_for(condition: Callable[[], Any], *running: Running) -> Any:
    """Waits until `condition` holds, and returns its value; fails if one of the commands has ended before."""
    deadline = time.monotonic() + LIMIT
    while not (value := condition()):
        if time.monotonic() > deadline or any(one.process.poll() is not None for one in running):
            for one in running:
                one.code = one.process.returncode
            for one in running:
                one.kill()
                one.out, one.err = one.process.communicate()
            reports = "\n".join(one.report() for one in running)
            raise AssertionError(f"ended too early, or waited in vain\n{reports}")
        time.sleep(0.02)
    return value


def catches(pid: int, number: int) -> bool:
    """Tells if a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def signal_again(process: Any, number: int) -> None:
    """Signals a process that has been signalled before until it ends.

    One that comes sooner than a second after the first was heard counts as the same, and a busy machine hears late.
    """
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(1.2)
        process.send_signal(number)  # nothing, if it has ended


@dataclass
class Finished:
    """A script's `main` that was called in this process."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, str]:
        return parsed(self.out.splitlines()[-1])

    @property
    def checkpoint(self) -> Path:
        return Path(self.result["checkpoint"])

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent.parent


class Team:
    """The ranks of a script, started as torchrun starts them but from a process that has imported everything.

    Starting two ranks takes a second instead of ten. What launchers do is tested elsewhere, with launchers.

    Args:
        script: the script's module; in its arguments {rank} stands for the rank's number.
        folder: for what the ranks print.
        prepare: called in each rank, with its number, before the script.
        variables: of the ranks' environment.
    """

    def __init__(
        self,
        script: str,
        *arguments: object,
        folder: Path,
        world_size: int = 2,
        prepare: Callable[[int], None] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.arguments, self.folder = [script, *map(str, arguments)], folder
        folder.mkdir(parents=True, exist_ok=True)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"}
        place |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
        shared = (self.arguments, folder, prepare, place | (variables or {}))
        self.ranks = [FORKSERVER.Process(target=_rank, args=(rank, *shared)) for rank in range(world_size)]
        for rank in self.ranks:
            rank.start()

    def finish(self) -> "Team":
        """Waits for the end of all ranks, which must have the same exit code."""
        deadline = time.monotonic() + LIMIT
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        hangs = [number for number, rank in enumerate(self.ranks) if rank.exitcode is None]
        self.kill()
        assert not hangs, f"ranks {hangs} are still running after {LIMIT} s\n{self.report()}"
        assert len({rank.exitcode for rank in self.ranks}) == 1, self.report()
        return self

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def printed(self, kind: str) -> str:
        """Output of all ranks, in rank order; kind is out or err."""
        return "".join((self.folder / f"{kind}.{rank}").read_text() for rank in range(len(self.ranks)))

    @property
    def code(self) -> int | None:
        return self.ranks[0].exitcode

    @property
    def result(self) -> dict[str, str]:
        lines = [line for line in self.printed("out").splitlines() if line.startswith("result ")]
        assert len(lines) == 1, f"not one result line but {len(lines)}\n{self.report()}"
        return parsed(lines[0])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.printed("err").splitlines() if line.startswith("error:")]

    def report(self) -> str:
        codes = [rank.exitcode for rank in self.ranks]
        return f"$ {' '.join(self.arguments)}\ncodes {codes}\n{self.printed('out')}\n{self.printed('err')}"


def _rank(
    rank: int, arguments: list[str], folder: Path, prepare: Callable[[int], None] | None, variables: dict[str, str]
) -> None:
    from fabricrl.utils.ending import run_script

    os.chdir(ROOT)
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / f"{kind}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if prepare is not None:
        prepare(rank)
    sys.argv = [word.replace("{rank}", str(rank)) for word in arguments]
    run_script(importlib.import_module(arguments[0]).main)


@contextlib.contextmanager
def team(script: str, *arguments: object, folder: Path, **options: Any) -> Iterator[Team]:
    """Starts ranks; on leaving, none of them is alive."""
    started = Team(script, *arguments, folder=folder, **options)
    try:
        yield started
    finally:
        started.kill()


def run_team(script: str, *arguments: object, folder: Path, code: int = 0, **options: Any) -> Team:
    """Runs ranks to their end, which must be with this exit code."""
    with team(script, *arguments, folder=folder, **options) as started:
        started.finish()
    assert started.code == code, started.report()
    return started


class Output(io.StringIO):
    """Keeps what is printed, as a file would whose encoding is known."""

    encoding = "utf-8"


def call(main: Callable[[], int], *arguments: object, encoding: str = "utf-8") -> Finished:
    """Calls `main` with a command line, in this process and without a terminal; for fixtures that tests share."""
    out, err = Output(), Output()
    out.encoding = err.encoding = encoding
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with (
            mock.patch.object(sys, "argv", ["script.py", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            return Finished(main(), out.getvalue(), err.getvalue())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signal_self(number: int) -> None:
    """Signals this process, and waits until the run in it has heard: a thread hears SIGUSR1, and may be late."""
    os.kill(os.getpid(), number)
    patience = time.monotonic() + 30
    while not StopSignal.newest.received:
        assert time.monotonic() < patience, "the run does not hear the signal"
        time.sleep(0.001)


@contextlib.contextmanager
def stopped_in(iteration: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Signals this process as soon as a run inside begins its n-th iteration, from 1, which is to be its last."""
    original = Run.iterations

    def signalled(run: Run, steps: int) -> Iterator[int]:
        for count, step in enumerate(original(run, steps), 1):
            if count == iteration:
                signal_self(number)
            yield step

    with mock.patch.object(Run, "iterations", signalled):
        yield


def run_folder(log_dir: Path) -> Path:
    """The only run folder under a log folder."""
    folders = list(log_dir.glob("*/*/*"))
    assert len(folders) == 1, folders
    return folders[0]


def files(folder: Path) -> set[str]:
    """All files under a folder, with what differs from run to run cut off."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"tfevents\..*", "tfevents", name) for name in names}


def saved_steps(folder: Path) -> list[int]:
    """The steps of a run folder's checkpoints, oldest first."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("checkpoints/step_*.ckpt"))


def load(path: Path | str) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """The names of all parts in which two nested states are not equal to the last bit; NaN equals NaN."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys(), key=str)
        missing = [f"{name}/{key}" for key in keys if key not in first or key not in second]
        return missing + [
            part for key in keys if key in first and key in second
            for part in differences(first[key], second[key], f"{name}/{key}")
        ]  # fmt: skip
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [part for i, (a, b) in pairs for part in differences(a, b, f"{name}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        return [] if same and first.cpu().numpy().tobytes() == second.cpu().numpy().tobytes() else [name]
    return [] if first == second or (first != first and second != second) else [name]


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a run folder's TensorBoard events, as TensorBoard shows them: tag → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard reads files by name, which holds second, process and a counter: two runs of one process in the same
    # second may come in the wrong order, as nobody's but a test's do. Hence names in the order of writing
    written = sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as ordered:
        for index, path in enumerate(written):
            shutil.copy(path, Path(ordered) / f"events.out.tfevents.{index:06d}")
        events = EventAccumulator(ordered, size_guidance={"scalars": 0})
        events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
