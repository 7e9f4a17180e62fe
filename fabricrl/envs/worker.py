"""One environment in a process of its own, and the commands that it obeys."""

import contextlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from fabricrl.envs.exchange import DONE, Shared, receive, send
from fabricrl.envs.guard import (
    GRACE,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    at_import_of_torch,
    close_problem,
    control_process,
    reset_signals_in_children,
    seed_generators,
)
from fabricrl.utils.errors import EnvError, RunError


class Setup:
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


def become_worker(pipe: int, file: int, out: int, err: int) -> NoReturn:
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
        Worker(Connection(pipe), os.fdopen(file, "r+b")).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


class Worker:
    """One environment and the commands that it obeys."""

    def __init__(self, pipe: Connection, file: Any) -> None:
        self.pipe, self.file = pipe, file
        self.env: gym.Env | None = None
        self.grace = GRACE

    def run(self) -> None:
        tasks: dict[str, Callable[[Any], Any]] = {"build": self.build, "share": self.share, "reset": self.reset}
        while True:
            name, content = receive(self.pipe)
            if name in ("close", "gone"):
                break
            try:
                if name == "step":
                    self.step()
                    os.write(self.pipe.fileno(), DONE)
                else:
                    send(self.pipe, ("done", tasks[name](content)))
            except BrokenPipeError:  # the script has gone
                break
            except Exception as error:
                send(self.pipe, ("error", (type(error).__name__, _text(error))))
        self.close()

    def build(self, setup: Setup) -> Any:
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
            send(self.pipe, ("closed", problem))


def _text(error: Exception) -> str:
    if isinstance(error, RunError):
        return str(error)
    return f"{type(error).__name__}: {error}"
