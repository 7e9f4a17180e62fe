"""An environment whose module starts a thread when it is imported, without which no step returns."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np

from tests.process_envs import Simulated

POOL = ThreadPoolExecutor(1)
POOL.submit(int, "7").result()


class Pooled(Simulated):
    """Asks the thread in every step."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert POOL.submit(int, "7").result(20) == 7
        return super().step(action)


gym.register("Pooled-v0", entry_point=Pooled)
