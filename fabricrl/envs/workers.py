"""Environments in processes of their own: `--vectorization async`.

    script ── commands, one byte a step ──→ worker 0 … N − 1, and answers back
       └──── server, which forks the workers and outlives the script ────┘

Workers are not forked from the script, whose threads (torch's, OpenMP's) a fork would leave half dead, but from a
server that has imported Gymnasium and nothing that has threads. Observations, actions and the rest of a step lie in
shared memory. The server inherits what dying workers leave behind, notices how each of them ended, and, when the
script is gone, however that died, gives them a moment to close their environments and ends the rest.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fabricrl.envs.exchange import STEP, Shared, receive, send, shared_file
from fabricrl.envs.guard import GRACE, LAST_WORDS, Timeout, is_stopped
from fabricrl.envs.server import Server
from fabricrl.envs.worker import Setup
from fabricrl.utils import errors
from fabricrl.utils.errors import EnvError, RunError


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
        self._file = shared_file()
        self._server = Server(preload, grace)
        self._pipes = [self._server.start(self._file) for _ in makers]
        try:
            for index, (maker, seed) in enumerate(zip(makers, seeds, strict=True)):
                self._tell(index, ("build", Setup(index, cloudpickle.dumps(maker), seed, threads, grace)))
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
                kind, problem = receive(self._pipes[index])
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
            send(self._pipes[index], message)

    def _collect(self, call: str) -> list[Any]:
        """Collects the answers of all workers, and raises an error of one only after it has heard all."""
        answers: list[Any] = []
        faults: list[RunError] = []
        try:
            for index, pipe in enumerate(self._pipes):
                kind, content = receive(pipe)
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
