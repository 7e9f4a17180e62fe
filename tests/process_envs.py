"""Environments with processes, threads and generators of their own, and calls that never return."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


def simulate(stubborn: bool) -> None:
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


class Simulated(gym.Env):
    """Starts a simulator when it is made, and writes its process, and whether `close()` was called, into a folder.

    Args:
        folder: for files `<process>.started` and `<process>.closed`; empty: nothing is written.
        start: what is started: process or stubborn (multiprocessing; one ignores SIGTERM), command, thread, or nothing;
            elsewhere: the constructor makes `folder` the current one.
        close: what `close()` does: end (and wait for the end), leave (what was started as it is), raise, or hang.
        hang: which call never returns: init, reset, step, stubborn (a step, whatever interrupts it), or none.
        only: of `reset` and `step`, only those of the environment whose seed was this; None: of all.
        fails: whether the second step raises.
        sleep: seconds that a step takes.
    """

    observation_space, action_space = Box(-1.0, 1.0, (3,), np.float32), Discrete(2)

    def __init__(
        self,
        folder: str = "",
        start: str = "nothing",
        close: str = "end",
        hang: str = "none",
        only: int | None = None,
        fails: bool = False,
        sleep: float = 0.0,
    ) -> None:
        self.how, self.fails, self.sleep, self.folder = close, fails, sleep, folder
        self.hang, self.only, self.seed = hang, only, -1
        self.simulator: Any = None
        if self.hang == "init":
            time.sleep(1000)
        if start in ("process", "stubborn"):
            self.simulator = multiprocessing.Process(target=simulate, args=(start == "stubborn",))
            self.simulator.start()
        elif start == "command":
            self.simulator = subprocess.Popen(["sleep", "1000"])
        elif start == "thread":
            self.thread = threading.Thread(target=time.sleep, args=(1000,))
            self.thread.start()
        elif start == "elsewhere":
            os.chdir(folder)
        self.note("started")

    def note(self, what: str) -> None:
        if self.folder:
            number = self.simulator.pid if self.simulator else f"{os.getpid()}-{id(self)}"
            (Path(self.folder) / f"{number}.{what}").touch()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        self.seed = self.seed if seed is None else seed
        if self.hangs("reset"):
            time.sleep(1000)
        return self.obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self.sleep)
        self.steps += 1
        if self.hangs("step"):
            self.note("hanging")
            time.sleep(1000)
        while self.hangs("stubborn"):  # as in a library that never comes back
            with contextlib.suppress(BaseException):
                self.note("hanging")
                time.sleep(1000)
        if self.fails and self.steps == 2:
            raise RuntimeError("out of order")
        return self.obs(), 1.0, self.steps == 5, False, {}

    def hangs(self, call: str) -> bool:
        return self.hang == call and self.only in (None, self.seed)

    def obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def close(self) -> None:
        self.note("closed")
        if self.how == "raise":
            raise RuntimeError("not connected")
        if self.how == "hang":
            time.sleep(1000)
        if self.how == "end" and self.simulator is not None:
            self.simulator.terminate()
            self.simulator.join() if isinstance(self.simulator, multiprocessing.Process) else self.simulator.wait()


class Drawing(gym.Env):
    """Observations (of NumPy, of Python, of torch) drawn from the global generators, whatever the seed."""

    observation_space, action_space = Box(-1.0, 1.0, (3,), np.float32), Discrete(2)

    def __init__(self) -> None:
        self.layout = np.random.uniform()  # drawn before any seed is known

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(0.001)
        self.steps += 1
        return self.obs(), self.layout, self.steps == 8, False, {}

    def obs(self) -> np.ndarray:
        import torch  # late, as in what loads a model when it needs one

        return np.array([np.random.uniform(-1, 1), random.uniform(-1, 1), torch.rand(1).item()], np.float32)


class Computing(Simulated):
    """Multiplies matrices with torch in every step, on two threads."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        multiply()
        return super().step(action)


def multiply() -> None:
    import torch

    torch.set_num_threads(2)
    matrix = torch.ones(512, 512)
    assert (matrix @ matrix)[0, 0] == 512


class Endless(VectorEnv):
    """A native vector environment whose step does not return."""

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = Simulated.observation_space, Simulated.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros((self.num_envs, 3), np.float32), {}

    def step(self, actions: Any) -> tuple:
        time.sleep(1000)
        raise AssertionError


gym.register("Simulated-v0", entry_point=Simulated)
gym.register("Drawing-v0", entry_point=Drawing)
gym.register("Computing-v0", entry_point=Computing)
gym.register("Endless-v0", entry_point=Simulated, vector_entry_point=Endless)
