"""Protection of a run from its environments: calls that never return, processes they leave, generators they share."""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fabricrl.utils.errors import EnvError

GRACE = 10.0  # seconds for an environment's `close()`
VIDEO_GRACE = 60.0  # where it has to write a video first
LAST_WORDS = 2.0  # seconds between SIGTERM and SIGKILL for what an environment has left behind
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ALARM = getattr(signal, "SIGRTMAX", signal.SIGUSR2)  # one that neither environments nor schedulers use

Process = tuple[int, int]  # a process's number, and when it has started: numbers are used again


# --- Calls that never return


class Timeout(BaseException):
    """A call of an environment has taken too long. Not an Exception, which environments might catch."""


class Watch:
    """Raises `Timeout` in the main thread if a call inside `with` takes too long.

    A signal interrupts the call, so that a step costs only two readings of the clock. If the call does not return to
    Python, so that the signal cannot interrupt it, the process ends a moment later with one line.

    Args:
        seconds: most that a call may take; 0: no limit.
        name: names the call in that line.
        last: called before the process ends.
    """

    open: list["Watch"] = []  # noqa: RUF012

    def __init__(
        self,
        seconds: float,
        name: Callable[[], str] = lambda: "an environment",
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self.seconds, self.name, self.last = seconds, name, last
        self.began = self.late = 0.0  # when the call has begun that is under way; the one that was told of
        self._main = threading.main_thread()
        if seconds > 0 and threading.current_thread() is self._main:  # signals interrupt the main thread only
            signal.signal(ALARM, _interrupt)
            Watch.open.append(self)
            if "watch" not in {thread.name for thread in threading.enumerate()}:
                threading.Thread(target=_look, name="watch", daemon=True).start()

    def __enter__(self) -> "Watch":
        self._main._daemonic = True  # type: ignore[attr-defined]  # threads that a call starts do not keep Python alive
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.began = 0.0
        self._main._daemonic = False  # type: ignore[attr-defined]

    def stop(self) -> None:
        if self in Watch.open:
            Watch.open.remove(self)

    @property
    def text(self) -> str:
        long = f"{self.seconds / 60:g} minutes" if self.seconds >= 60 else f"{self.seconds:g} seconds"
        return f"it has not returned for {long} (see --timeout)"

    def look(self) -> None:
        """Interrupts a call that has taken too long, or, if that did not help, ends the process."""
        began, now = self.began, time.monotonic()
        if not began or now - began <= self.seconds:
            return
        if self.late != began:
            self.late = began
            signal.pthread_kill(self._main.ident or 0, ALARM)
        elif now - began > self.seconds + GRACE:
            print(f"error: {self.name()}: {self.text}", file=sys.stderr, flush=True)
            self.last()
            os._exit(EnvError.exit_code)


def _look() -> None:
    """Checks all watches several times within the shortest limit, or once a second."""
    while True:
        time.sleep(min([1.0, *(watch.seconds / 4 for watch in Watch.open)]))
        for watch in list(Watch.open):
            watch.look()


@contextlib.contextmanager
def watched(seconds: float, what: str) -> Iterator[None]:
    """Raises EnvError, which begins with `what`, if the block takes too long."""
    watch = Watch(seconds, lambda: what)
    try:
        with watch:
            yield
    except Timeout as error:
        raise EnvError(f"{what}: {error}") from error
    finally:
        watch.stop()


def _interrupt(number: int, frame: object) -> None:
    for watch in Watch.open:
        if watch.began and watch.late == watch.began:
            raise Timeout(watch.text)


def close_problem(close: Callable[[], None], seconds: float = GRACE) -> str:
    """Closes an environment within a time limit; returns what went wrong, or an empty string."""
    watch = Watch(seconds)
    try:
        with watch:
            close()
    except Timeout:
        return f"has not returned from close for {seconds:g} seconds"
    except (Exception, SystemExit) as error:
        return f"failed in close: {type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        watch.stop()
    return ""


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --- Processes that an environment starts


def reset_signals_in_children() -> None:
    """Gives later forks the default handlers of SIGINT and SIGTERM, so that `terminate()` ends them."""
    if not _FORKS_RESET:
        _FORKS_RESET.append(True)
        os.register_at_fork(after_in_child=_begin_afresh)


_FORKS_RESET: list[bool] = []


def _begin_afresh() -> None:
    threading.main_thread()._daemonic = False  # type: ignore[attr-defined]  # as `Watch` may have left it
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) != default:
            signal.signal(number, default)


def control_process(option: int, value: int) -> None:
    """Calls prctl on Linux; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _processes() -> dict[int, tuple[str, int, int]]:
    """State, parent and start time of all living processes; empty on systems other than Linux."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(entry.name)] = fields[0], int(fields[1]), int(fields[19])
    return found


def children() -> set[Process]:
    """Child processes, started or inherited."""
    return {(pid, start) for pid, (_, parent, start) in _processes().items() if parent == os.getpid()}


def is_stopped(pid: int) -> bool:
    """Returns True if a process is stopped, as by SIGSTOP."""
    return _processes().get(pid, ("", 0, 0))[0] in ("T", "t")


def end_processes(roots: Iterable[Process]) -> None:
    """Ends processes and their descendants with SIGTERM, and a moment later with SIGKILL."""
    left = _with_descendants(set(roots))
    for number, seconds in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, 1.0)):
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = _with_descendants(left)


class Keeper:
    """A process that waits for this one to end, however that happens, and then ends others."""

    def __init__(self, processes: Iterable[Process]) -> None:
        numbers = [str(number) for process in processes for number in process]
        code = "import sys; sys.path[:] = {!r}; from fabricrl.envs.guard import keep; keep(*map(int, sys.argv[1:]))"
        command = [sys.executable, "-c", code.format(sys.path), str(os.getpid()), *numbers]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def keep(parent: int, *numbers: int) -> None:
    """Runs the process of a `Keeper`."""
    while os.getppid() == parent:
        time.sleep(0.5)
    end_processes(set(zip(numbers[::2], numbers[1::2], strict=True)))


def _with_descendants(roots: set[Process]) -> set[Process]:
    """Adds their descendants, and leaves out those that have ended."""
    there = _processes() if roots else {}
    found = {(pid, start) for pid, start in roots if pid in there and there[pid][2] == start}
    more = found
    while more:
        parents = {pid for pid, _ in more}
        more = {(pid, start) for pid, (_, parent, start) in there.items() if parent in parents} - found
        found = found | more
    return found


# --- Generators that all environments of a process share


def seed_generators(seed: int | list[int], torch_too: bool = True) -> None:
    """Seeds the global generators of Python, NumPy and, as soon as it is imported, torch."""
    python, numpy, torch = map(int, np.random.SeedSequence(seed).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    if torch_too and "torch" in sys.modules:
        sys.modules["torch"].manual_seed(torch)
    elif torch_too:
        at_import_of_torch("seed", lambda module: module.manual_seed(torch))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the global generators after the block."""
    torch: Any = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state(), torch and torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch:
            torch.set_rng_state(states[2])


@contextlib.contextmanager
def folder_kept() -> Iterator[None]:
    """Goes back to the current folder after the block: some environments leave it for that of their files."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it has been removed
        folder = ""
    try:
        yield
    finally:
        if folder:
            with contextlib.suppress(OSError):
                os.chdir(folder)


def at_import_of_torch(key: str, task: Callable[[Any], None]) -> None:
    """Runs a task once torch has been imported, which takes a second that most environments save."""
    _AFTER_TORCH.tasks[key] = task
    if _AFTER_TORCH not in sys.meta_path:
        sys.meta_path.insert(0, _AFTER_TORCH)  # type: ignore[arg-type]


class _AfterTorch:
    """Finds torch as the other finders do, and runs the tasks once it has been loaded."""

    def __init__(self) -> None:
        self.tasks: dict[str, Callable[[Any], None]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                for task in self.tasks.values():
                    task(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_AFTER_TORCH = _AfterTorch()
