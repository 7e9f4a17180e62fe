"""The server that forks the workers of `workers.py`, tells how they end, and leaves nothing of them behind."""

import contextlib
import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fabricrl.envs.guard import LAST_WORDS, PR_SET_CHILD_SUBREAPER, children, control_process, end_processes
from fabricrl.envs.worker import become_worker

NOTE = struct.Struct("iii")  # of the server: what happened, the worker's index, its process or exit code
STARTED, ENDED = 0, 1
START_SERVER = "import sys; sys.path[:] = {path!r}; from fabricrl.envs.server import serve; serve(*sys.argv[1:])"


class Server:
    """The script's handle on the server."""

    def __init__(self, preload: str, grace: float) -> None:
        self._pids: dict[int, int] = {}
        self._exit_codes: dict[int, int] = {}
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", START_SERVER.format(path=sys.path)]
            command += [str(theirs.fileno()), str(grace), preload]  # the last may be left out, see `_import_cleanly`
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, start_new_session=True
            )

    def start(self, file: Any) -> Connection:
        """Starts a worker and returns the pipe to it."""
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "w") as nowhere:
            out, err = (number if _is_open(number) else nowhere.fileno() for number in (1, 2))
            with contextlib.suppress(BrokenPipeError):  # the server is gone, and so is the worker
                socket.send_fds(self._control, [b"w"], [theirs.fileno(), file.fileno(), out, err])
        return Connection(ours.detach())

    def pid(self, index: int) -> int:
        """The process of a worker; 0 if it has ended, or never began."""
        while self._read(0.0 if index in self._pids else 1.0):
            pass
        return 0 if index in self._exit_codes else self._pids.get(index, 0)

    def exit_code(self, index: int) -> int | None:
        """Exit code of a worker; None if it is not known within a second."""
        while index not in self._exit_codes and self._read(1.0):
            pass
        return self._exit_codes.get(index)

    def kill(self, index: int) -> None:
        if pid := self.pid(index):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Waits until all workers have ended, and what they have left behind."""
        with contextlib.suppress(OSError):  # it is gone already
            self._control.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(LAST_WORDS + 3)
        except subprocess.TimeoutExpired:  # it has been stopped, too
            self._process.kill()
            self._process.wait()
        self._control.close()

    def _read(self, seconds: float) -> bool:
        """Reads a note of the server, if one arrives in time."""
        if not select.select([self._control], [], [], seconds)[0]:
            return False
        note = self._control.recv(NOTE.size, socket.MSG_WAITALL)
        if len(note) < NOTE.size:
            return False
        kind, index, value = NOTE.unpack(note)
        if kind == STARTED:
            self._pids[index] = value
        else:
            self._exit_codes[index] = value
        return True


def _is_open(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


def serve(descriptor: str, grace: str, preload: str = "") -> None:
    """Runs the server: it forks workers, reports how they end, and leaves nothing of them behind."""
    if preload:
        _import_cleanly(preload)
    control, parent = socket.socket(fileno=int(descriptor)), os.getppid()
    control_process(PR_SET_CHILD_SUBREAPER, 1)  # what a dead worker leaves becomes a child of the server
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, _ignore)
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    workers: dict[int, int] = {}  # process → index
    started = 0
    while os.getppid() == parent:
        ready = select.select([control, awake], [], [], 1.0)[0]
        if awake in ready:
            awake.recv(4096)
            _reap(workers, control)
        if control in ready:
            fds = _request(control)
            if not fds:
                break
            pid = _fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for end in (control, awake, wake):
                    end.close()
                become_worker(*fds)
            for fd in fds:
                os.close(fd)
            workers[pid] = started
            _note(control, STARTED, started, pid)
            started += 1
    _wind_up(workers, control, float(grace))


def _request(control: socket.socket) -> list[int]:
    """The file descriptors of the next worker; none if the script wants no more."""
    with contextlib.suppress(ConnectionResetError):
        return socket.recv_fds(control, 1, 4)[1]
    return []


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's threads, which know how to survive it
        return os.fork()


def _wind_up(workers: dict[int, int], control: socket.socket, grace: float) -> None:
    """Waits for the workers, which know of the end, and then kills what is left."""
    deadline = time.monotonic() + grace + LAST_WORDS + 1
    while workers and time.monotonic() < deadline:
        time.sleep(0.01)
        _reap(workers, control)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    while workers or children():
        _reap(workers, control)
        time.sleep(0.01)


def _reap(workers: dict[int, int], control: socket.socket) -> None:
    """Reports workers that have ended, and ends the processes that they left behind, now children of the server."""
    ended = False
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            if pid in workers:
                ended = True
                _note(control, ENDED, workers.pop(pid), os.waitstatus_to_exitcode(status))
    if ended or not workers:
        end_processes({(pid, start) for pid, start in children() if pid not in workers})


def _note(control: socket.socket, *note: int) -> None:
    with contextlib.suppress(OSError):  # the script has gone
        control.sendall(NOTE.pack(*note))


def _import_cleanly(module: str) -> None:
    """Imports a module that all workers need, unless that starts threads: then each worker imports it itself.

    NumPy's and SciPy's linear algebra (OpenBLAS) starts threads, too, but lets them survive a fork.
    """
    libraries, threads = _blas_and_threads()
    with contextlib.suppress(BaseException):  # workers will fail in the same way, and say why
        importlib.import_module(module)
    more, now = _blas_and_threads()
    if now - 1 > (threads - 1) / max(libraries, 1) * more:
        os.execv(sys.executable, [*sys.orig_argv[:-1], ""])


def _blas_and_threads() -> tuple[int, int]:
    """Counts the loaded libraries for linear algebra and the threads of this process, on Linux."""
    if sys.platform != "linux":
        return 0, 1
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line}
    return len(mapped), len(os.listdir("/proc/self/task"))


def _ignore(number: int, frame: object) -> None:
    """Leaves signals that stop a whole job to the script.

    A function rather than SIG_IGN, which processes started later would inherit.
    """
