"""Environments in processes of their own: `--vectorization async`.

    script ── commands, one byte a step ──→ worker 0 … N − 1, and answers back
       └──── server, which forks the workers and outlives the script ────┘

Workers are not forked from the script, whose threads (torch's, OpenMP's) a fork would leave half dead, but from a
server that has imported Gymnasium and nothing that has threads. Observations, actions and the rest of a step lie in
shared memory. The server inherits what dying workers leave behind, notices how each of them ended, and, when the
script is gone, however that died, gives them a moment to close their environments and ends the rest.
"""

import contextlib
import importlib
import math
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fabricrl.envs.guard import (
    GRACE,
    LAST_WORDS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    Timeout,
    at_import_of_torch,
    children,
    close_problem,
    control_process,
    end_processes,
    is_stopped,
    reset_signals_in_children,
    seed_generators,
)
from fabricrl.utils import errors
from fabricrl.utils.errors import EnvError, RunError

STEP, DONE, MESSAGE = b"s", b".", b"m"
NOTE = struct.Struct("iii")  # of the server: what happened, the worker's index, its process or exit code
STARTED, ENDED = 0, 1
START_SERVER = "import sys; sys.path[:] = {path!r}; from fabricrl.envs.workers import serve; serve(*sys.argv[1:])"


class WorkerVectorEnv(VectorEnv):
    """Environments that step side by side and reset in the step that ends an episode (SAME_STEP).

    Args:
        makers: each builds one environment, in its worker.
        seeds: of the global generators of each worker while it builds.
        preload: a module that the server imports once for all workers; none if empty.
        threads: of torch in each worker.
        grace: seconds that environments have to close.

    Raises:
        ConfigError, EnvError: what a maker raised; later, from `reset` and `step`, what an environment did.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], gym.Env]],
        seeds: Sequence[int],
        preload: str = "",
        threads: int = 1,
        grace: float = GRACE,
    ) -> None:
        self.num_envs, self.grace = len(makers), grace
        self.problems: list[str] = []  # of closing
        self._gone: set[int] = set()  # workers that do not answer any more
        self._file = _shared_file()
        self._server = Server(preload, grace)
        self._pipes = [self._server.start(self._file) for _ in makers]
        try:
            for index, (maker, seed) in enumerate(zip(makers, seeds, strict=True)):
                self._tell(index, ("build", _Setup(index, cloudpickle.dumps(maker), seed, threads, grace)))
            self._take_over(self._collect("the constructor"))
        except BaseException:
            self.close()
            raise

    def _take_over(self, built: list[Any]) -> None:
        """Takes over the spaces and other properties that all environments share."""
        obs_space, action_space, metadata, self.render_mode, self._tells_lives, self._mask_size, num_keys = built[0]
        for index, (obs, actions, *_) in enumerate(built):
            if (obs, actions) != (obs_space, action_space):
                raise EnvError(f"environment {index} has {obs} and {actions}, 0 has {obs_space} and {action_space}")
        self.metadata = dict(metadata) | {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = obs_space, action_space
        self.observation_space = batch_space(obs_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        spaces = (obs_space.shape, obs_space.dtype), (action_space.shape, action_space.dtype)
        shared = Shared(self.num_envs, *spaces, self._mask_size, num_keys)
        shared.open(self._file)
        self._shared = shared
        for index in range(self.num_envs):
            self._tell(index, ("share", shared.layout))
        self._collect("the constructor")

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes; seeds also reset the global generators of each worker."""
        seeds = seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        for index, own in enumerate(seeds):
            self._tell(index, ("reset", (own, options)))
        self._collect("reset")
        return self._shared.obs, self._infos()

    def step(self, actions: Any) -> tuple:
        shared = self._shared
        shared.actions[:] = actions
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told below
                os.write(pipe.fileno(), STEP)
        self._collect("step")
        terminated, truncated = shared.terminated.copy(), shared.truncated.copy()
        infos = self._infos()
        if self._tells_lives:
            infos["life_lost"] = shared.life_lost.copy()
        ended = terminated | truncated
        if ended.any():
            finals = infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
            for index in np.flatnonzero(ended):
                finals[index] = shared.final_obs[index].copy()
            rows = np.where(ended[:, None], shared.episode_info, np.nan)
            if not np.isnan(rows).all():
                infos["final_info"] = {"episode_info": rows, "_episode_info": ended}
        return shared.obs, shared.rewards.copy(), terminated, truncated, infos

    def _infos(self) -> dict[str, Any]:
        """Infos of all steps, as Gymnasium has them."""
        return {"action_mask": self._shared.action_mask.copy()} if self._mask_size else {}

    def close_extras(self, **kwargs: Any) -> None:
        """Asks all workers to close their environments, and kills those that take too long."""
        waiting = [index for index in range(self.num_envs) if index not in self._gone]
        for index in waiting:
            self._tell(index, ("close", None))
        deadline = time.monotonic() + self.grace + LAST_WORDS + 1
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([self._pipes[index] for index in waiting], left)
            for index in [index for index in waiting if self._pipes[index] in ready]:
                kind, problem = _receive(self._pipes[index])
                if kind in ("closed", "gone"):  # not what it had to say before
                    waiting.remove(index)
                    self.problems += [f"environment {index} {problem}"] if problem else []
        self.problems += [f"environment {i} has not returned from close for {self.grace:g} seconds" for i in waiting]
        self.problems.sort(key=lambda problem: int(problem.split()[1]))
        for index in self._gone.union(waiting):
            self._server.kill(index)
        self._server.stop()
        for pipe in self._pipes:
            pipe.close()
        self._file.close()

    def _tell(self, index: int, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # reported when its answer is awaited
            _send(self._pipes[index], message)

    def _collect(self, call: str) -> list[Any]:
        """Collects the answers of all workers, and raises an error of one only after it has heard all."""
        answers: list[Any] = []
        faults: list[RunError] = []
        try:
            for index, pipe in enumerate(self._pipes):
                kind, content = _receive(pipe)
                if kind == "gone":
                    faults.append(self._death(index, call))
                elif kind == "error":
                    faults.append(getattr(errors, content[0], EnvError)(content[1]))
                answers.append(content)
        except Timeout as error:
            raise self._lateness(len(answers), call, error) from error
        if faults:
            raise faults[0]
        return answers

    def _lateness(self, heard: int, call: str, error: Timeout) -> EnvError:
        """Names the environments that have not answered."""
        late = [i for i in range(heard, self.num_envs) if not select.select([self._pipes[i]], [], [], 0)[0]]
        self._gone |= set(late)
        stopped = [index for index in late if is_stopped(self._server.pid(index))]
        names = f"environment {late[0]}" if len(late) == 1 else f"environments {', '.join(map(str, late))}"
        why = " (its process has been stopped)" if stopped else ""
        return EnvError(f"{names} failed in {call}: {error}{why}")

    def _death(self, index: int, call: str) -> EnvError:
        self._gone.add(index)
        code = self._server.exit_code(index)
        how = "" if code is None else f" ({signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"
        return EnvError(f"env worker {index} died in {call}{how}")


class Shared:
    """Observations, actions and the rest of a step of all environments, in memory that all processes share.

    Attributes:
        obs, final_obs, actions, rewards, terminated, truncated, life_lost: [N, ...]
        action_mask: [N, S]; episode_info: [N, K], at an episode's end, NaN where there is none.
    """

    obs: np.ndarray
    final_obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    life_lost: np.ndarray
    action_mask: np.ndarray
    episode_info: np.ndarray

    def __init__(
        self, num_envs: int, obs: tuple[tuple, Any], actions: tuple[tuple, Any], mask_size: int = 0, num_keys: int = 0
    ) -> None:
        self.layout = num_envs, obs, actions, mask_size, num_keys
        one: tuple[int, ...] = ()
        parts = {"obs": obs, "final_obs": obs, "actions": actions, "rewards": (one, np.float64)}
        parts |= dict.fromkeys(("terminated", "truncated", "life_lost"), (one, np.bool_))
        parts |= {"action_mask": ((mask_size,), np.bool_), "episode_info": ((num_keys,), np.float64)}
        self._parts = {name: ((num_envs, *shape), np.dtype(kind)) for name, (shape, kind) in parts.items()}

    def open(self, file: Any) -> None:
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in self._parts.values()]
        starts = np.cumsum([0, *(math.ceil(size / 64) * 64 for size in sizes)]).tolist()
        os.truncate(file.fileno(), max(os.fstat(file.fileno()).st_size, starts[-1]))
        memory = mmap.mmap(file.fileno(), starts[-1])
        for start, (name, (shape, kind)) in zip(starts, self._parts.items(), strict=False):
            setattr(self, name, np.frombuffer(memory, kind, math.prod(shape), start).reshape(shape))


def _shared_file() -> Any:
    """Opens an unnamed file in memory; on systems other than Linux, a temporary file."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fabricrl"), "r+b")
    return tempfile.TemporaryFile()


def _send(pipe: Connection, message: Any) -> None:
    os.write(pipe.fileno(), MESSAGE)
    pipe.send_bytes(pickle.dumps(message))


def _receive(pipe: Connection) -> tuple[str, Any]:
    """Receives a message, as its kind and content; the kind is "gone" if the other end has closed."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        word = os.read(pipe.fileno(), 1)
        if word == DONE:
            return "done", None
        if word == STEP:
            return "step", None
        if word == MESSAGE:
            return pickle.loads(pipe.recv_bytes())
    return "gone", ""


# --- The server


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
    while os.getppid() == parent:
        ready = select.select([control, awake], [], [], 1.0)[0]
        if awake in ready:
            awake.recv(4096)
            _reap(workers, control)
        if control in ready:
            fds = _request(control)
            if not fds:
                break
            index = len(_INDICES)
            _INDICES.append(index)
            pid = _fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for end in (control, awake, wake):
                    end.close()
                _become_worker(*fds)
            for fd in fds:
                os.close(fd)
            workers[pid] = index
            _note(control, STARTED, index, pid)
    _wind_up(workers, control, float(grace))


_INDICES: list[int] = []


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


# --- A worker


class _Setup:
    """State of the script that a worker takes over before it builds its environment."""

    def __init__(self, index: int, maker: bytes, seed: int, threads: int, grace: float) -> None:
        self.index, self.maker, self.seed, self.threads, self.grace = index, maker, seed, threads, grace
        self.folder, self.environ, self.path = os.getcwd(), dict(os.environ), list(sys.path)

    def apply(self) -> None:
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environ)
        sys.path[:] = self.path
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self.threads)
        else:
            threads = self.threads
            at_import_of_torch("threads", lambda module: module.set_num_threads(threads))
        seed_generators(self.seed)


def _become_worker(pipe: int, file: int, out: int, err: int) -> NoReturn:
    """Turns a forked process into a worker, which obeys the pipe until it closes."""
    code = 1
    try:
        os.setsid()  # Ctrl-C is for the script
        control_process(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the server be killed
        control_process(PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reset_signals_in_children()
        os.dup2(out, 1)
        os.dup2(err, 2)
        _Worker(Connection(pipe), os.fdopen(file, "r+b")).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


class _Worker:
    """One environment and the commands that it obeys."""

    def __init__(self, pipe: Connection, file: Any) -> None:
        self.pipe, self.file = pipe, file
        self.env: gym.Env | None = None
        self.grace = GRACE

    def run(self) -> None:
        tasks: dict[str, Callable[[Any], Any]] = {"build": self.build, "share": self.share, "reset": self.reset}
        while True:
            name, content = _receive(self.pipe)
            if name in ("close", "gone"):
                break
            try:
                if name == "step":
                    self.step()
                    os.write(self.pipe.fileno(), DONE)
                else:
                    _send(self.pipe, ("done", tasks[name](content)))
            except BrokenPipeError:  # the script has gone
                break
            except Exception as error:
                _send(self.pipe, ("error", (type(error).__name__, _text(error))))
        self.close()

    def build(self, setup: _Setup) -> Any:
        setup.apply()
        self.index, self.grace = setup.index, setup.grace
        try:
            maker = pickle.loads(setup.maker)
        except Exception as error:
            raise EnvError(f"environment {self.index} cannot be built in its process: {_text(error)}") from error
        env = self.env = maker()
        self.lives = env.has_wrapper_attr("tells_lives")
        self.masked = getattr(env, "mask_size", 0) > 0  # of our outermost wrapper
        told = self.lives, getattr(env, "mask_size", 0), len(getattr(env, "keys", ()))
        return env.observation_space, env.action_space, dict(env.metadata), env.render_mode, *told

    def share(self, layout: tuple) -> None:
        self.shared = Shared(*layout)
        self.shared.open(self.file)

    def reset(self, given: tuple[int | None, dict[str, Any] | None]) -> None:
        seed, options = given
        if seed is not None:
            seed_generators(seed)
        assert self.env is not None
        self.shared.obs[self.index], info = self.env.reset(seed=seed, options=options)
        if self.masked:
            self.shared.action_mask[self.index] = info["action_mask"]

    def step(self) -> None:
        shared, index, env = self.shared, self.index, self.env
        assert env is not None
        action = shared.actions[index]
        if isinstance(action, np.ndarray):
            action = action.copy()  # it is the environment's to change
        obs, reward, terminated, truncated, info = env.step(action)
        ended, life_lost = terminated or truncated, self.lives and info["life_lost"]
        if ended:
            shared.final_obs[index] = obs
            shared.episode_info[index] = info.get("episode_info", np.nan)
            obs, info = env.reset()
        if self.masked:
            shared.action_mask[index] = info["action_mask"]
        shared.obs[index] = obs
        shared.rewards[index], shared.terminated[index], shared.truncated[index] = reward, terminated, truncated
        if self.lives:
            shared.life_lost[index] = not ended and life_lost

    def close(self) -> None:
        """Closes the environment and reports what went wrong; the server ends what it leaves behind."""
        problem = "" if self.env is None else close_problem(self.env.close, self.grace)
        with contextlib.suppress(OSError):  # the script has gone
            _send(self.pipe, ("closed", problem))


def _text(error: Exception) -> str:
    if isinstance(error, RunError):
        return str(error)
    return f"{type(error).__name__}: {error}"
