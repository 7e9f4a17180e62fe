"""Milliseconds of drawing 20 batches of 256 from a full replay buffer, and of copying as many bytes, for speed.py.

The only argument is JSON with the run's settings. The buffer holds 10^6 transitions of the size of HalfCheetah's. What
is copied is a stretch of its records, each time another one, so that neither side finds again what it has just read.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.data.replay import ReplayBuffer

TRANSITIONS, OBS, ACTIONS = 1_000_000, 17, 6
BATCHES, BATCH_SIZE = 20, 256
CALLS = 300


def full_buffer(implicit_next: bool) -> ReplayBuffer:
    """A single environment's episodes of 1 000 steps, until they fill the buffer."""
    rb = ReplayBuffer(TRANSITIONS, 1, Box(-np.inf, np.inf, (OBS,)), ACTIONS, implicit_next=implicit_next)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((1001, 1, OBS), dtype=np.float32)
    actions = rng.uniform(-1, 1, (1000, 1, ACTIONS)).astype(np.float32)
    rewards, never, always = np.ones(1), np.zeros(1, dtype=bool), np.ones(1, dtype=bool)
    rb.start(obs[0])
    while rb.size < TRANSITIONS:
        for t in range(999):
            rb.add(actions[t], obs[t + 1], rewards, never, never, {})
        rb.add(actions[999], obs[0], rewards, never, always, {"final_obs": obs[1000]})
    return rb


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # memory is to be measured, not how fast threads wake
    rb = full_buffer(settings["implicit_next"])
    rng = torch.Generator().manual_seed(settings["seed"])
    memory: Tensor = rb.state_dict()["records"]  # bytes, no copy
    size = sum(column.nbytes for column in rb.sample(BATCHES, BATCH_SIZE, rng).values())
    starts = torch.randint((len(memory) - size) // 64, (CALLS,), generator=rng).mul(64).tolist()
    sampling, copying = [], []
    for start in starts:
        sampling.append(milliseconds(lambda: rb.sample(BATCHES, BATCH_SIZE, rng)))
        copying.append(milliseconds(memory[start : start + size].clone))
    print(f"result sampling={statistics.median(sampling):.4f} copying={statistics.median(copying):.4f}")


if __name__ == "__main__":
    main()
