"""Steps and messages between the script and its workers: the former in shared memory, the latter through pipes."""

import contextlib
import math
import mmap
import os
import pickle
import tempfile
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

STEP, DONE, MESSAGE = b"s", b".", b"m"


class Shared:
    """Observations, actions and the rest of a step of all environments, in memory that all processes share.

    Attributes:
        obs, final_obs, actions, rewards, terminated, truncated, life_lost: [N, ...]
        action_mask: [N, L]; episode_info: [N, K], at an episode's end, NaN where there is none.
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


def shared_file() -> Any:
    """Opens an unnamed file in memory; on systems other than Linux, a temporary file."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fabricrl"), "r+b")
    return tempfile.TemporaryFile()


def send(pipe: Connection, message: Any) -> None:
    os.write(pipe.fileno(), MESSAGE)
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe: Connection) -> tuple[str, Any]:
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
