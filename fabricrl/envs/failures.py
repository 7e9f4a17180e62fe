"""Failures of environments: a run hears of them in time, by name, and nothing that they have started stays behind."""

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from fabricrl.envs.episode_infos import episode_infos
from fabricrl.envs.guard import (
    GRACE,
    Keeper,
    Process,
    Timeout,
    Watch,
    children,
    close_problem,
    end_processes,
    seed_generators,
    warn,
)
from fabricrl.envs.options import TIMEOUT
from fabricrl.envs.rows import floats_in
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.envs.wrappers import NameFailures
from fabricrl.utils.errors import EnvError, RunError

HASTE = 0.5  # seconds that an environment has to close once another has hung


class ReportFailures(gym.vector.VectorWrapper):
    """Stands between a script and environments that may fail.

    Their exceptions become EnvErrors, and so does a call that does not return in time. `close` ends them in any state,
    with the processes that they have started; a failure there costs only a warning.

    Args:
        timeout: minutes for a call; 0: no limit.
        rank: rank 0 warns of equal first observations.
        resumed: torch's global generator has been restored, and is not seeded again.
        grace: seconds for an environment's `close`.
        started: processes that building the environments has started.
        told: warnings printed before; none is printed twice.
        keys: names of the numbers that environments tell at the ends of episodes.
    """

    def __init__(
        self,
        env: VectorEnv,
        timeout: float = TIMEOUT,
        rank: int = 0,
        resumed: bool = False,
        grace: float = GRACE,
        started: Iterable[Process] = (),
        told: set[str] | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        super().__init__(env)
        self.keys = keys
        self._episode_infos: list[np.ndarray] = []
        self._rank, self._resumed, self._grace = rank, resumed, grace
        self._started, self.told = set(started), set() if told is None else told
        self._watch = Watch(60 * timeout, self._where, self._end_processes)
        self._apart = isinstance(env, WorkerVectorEnv)
        self._keeper: Keeper | None = None
        _close_at_exit(self)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new episodes; seeds also reset the global generators, from which some environments draw."""
        before = set() if self._apart else children()
        if seed is not None:  # also where environments are elsewhere: a run is the same however they are stepped
            seed_generators(seed, torch_too=not self._resumed)
        try:
            with self._watch:
                obs, infos = self.env.reset(seed=seed, options=options)
        except (Exception, Timeout) as error:
            raise self._failure("reset", error) from error
        finally:
            self._keep(set() if self._apart else children() - before)
        if seed is not None:
            self._compare(obs)
        return obs, infos

    def step(self, actions: Any) -> tuple:
        try:
            with self._watch:
                answer = self.env.step(actions)
        except (Exception, Timeout) as error:
            raise self._failure("step", error) from error
        if (found := episode_infos(answer[-1])) is not None:
            self._episode_infos.append(found[~np.isnan(found).all(1)])
        return answer

    def take_episode_infos(self) -> np.ndarray:
        """The numbers that environments have told at the ends of episodes since the last call: [E, K], NaN if missing.

        E counts the episodes in which one of the K keys was there.
        """
        rows = np.concatenate((np.empty((0, len(self.keys))), *self._episode_infos))
        self._episode_infos.clear()
        return rows

    def close(self, **kwargs: Any) -> None:
        """Closes all environments; also at the end of a process that has failed."""
        _OPEN.discard(self)
        self._watch.stop()
        if self.env.closed:
            return
        if isinstance(self.env, WorkerVectorEnv):
            self.env.close()
            problems = self.env.problems
        else:
            envs = {f"environment {index}": env.close for index, env in enumerate(getattr(self.env, "envs", ()))}
            envs = envs or {"environments": self.env.close}
            problems, grace = [], self._grace
            for name, close in envs.items():
                started = time.monotonic()
                if problem := close_problem(close, grace):
                    problems.append(f"{name} {problem}")
                if time.monotonic() - started >= grace:
                    grace = min(grace, HASTE)
            self.env.closed = True
            self._end_processes()
        if problems and problems[0] not in self.told:
            self.told.add(problems[0])
            warn(problems[0] + (f" ({len(problems) - 1} more likewise)" if problems[1:] else ""))

    def _keep(self, started: set[Process]) -> None:
        """Ends the processes that environments have started if this process dies."""
        if (self._started or started) and not (self._keeper and started <= self._started):
            self._started |= started
            if self._keeper is not None:
                self._keeper.stop()
            self._keeper = Keeper(self._started)

    def _end_processes(self) -> None:
        end_processes(self._started)
        if self._keeper is not None:
            self._keeper.stop()

    def _compare(self, obs: Any) -> None:
        """Warns if environments start from equal observations: they may stay equal, and count as one."""
        first: dict[bytes, int] = {}
        rows = obs.cpu().numpy() if hasattr(obs, "cpu") else obs
        numbers = floats_in(rows, self.single_observation_space)
        if numbers.dtype == np.uint8 or not numbers.size:  # frames alone: games start alike
            return
        for index, row in enumerate(rows):
            other = first.setdefault(row.tobytes(), index)
            if other != index:
                text = (
                    f"environments {other} and {index} start from equal observations: right if every episode begins "
                    "alike; if not, does reset use its seed?"
                )
                if self._rank == 0 and text not in self.told:
                    warn(text)
                self.told.add(text)
                return

    def _where(self) -> str:
        """Names the environment that the main thread is in."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if isinstance(env := frame.f_locals.get("self"), NameFailures):
                return f"environment {env.index} failed in {frame.f_code.co_name}"
            frame = frame.f_back
        return "environments"

    def _failure(self, call: str, error: BaseException) -> RunError:
        if isinstance(error, RunError):
            return error
        return EnvError(f"environments failed in {call}: {type(error).__name__}: {error}")


_OPEN: set[ReportFailures] = set()


def _close_at_exit(envs: ReportFailures) -> None:
    """Closes environments at the end of the script, before Python waits for threads that they have started."""
    if not _CLOSES:
        _CLOSES.append(True)
        threading._register_atexit(_close_all)  # type: ignore[attr-defined]
    _OPEN.add(envs)


def _close_all() -> None:
    for envs in list(_OPEN):
        envs.close()


_CLOSES: list[bool] = []
