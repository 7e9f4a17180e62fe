"""Seeds and generators: unrelated streams for acting, training, environments and evaluation, on every rank."""

import numpy as np
import torch

ACT_STREAM, TRAIN_STREAM, ENV_STREAM, EVAL_STREAM = 0, 1, 2, 4  # 3 is that of vector.py
FIRST_TRAINING_SEED = 2**30  # seeds of environments in training start here, so that those below are for evaluation


def stream_seed(*keys: int) -> int:
    """One seed out of several integers, such that neighbouring keys give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def generators(seed: int, rank: int, global_step: int = 0) -> tuple[torch.Generator, torch.Generator]:
    """The generators that draw action noise and minibatches: separate, and different on every rank."""
    act, train = (
        torch.Generator().manual_seed(stream_seed(seed, rank, stream, global_step))
        for stream in (ACT_STREAM, TRAIN_STREAM)
    )
    return act, train


def env_seeds(seed: int, rank: int, num_envs: int, global_step: int = 0) -> list[int]:
    """Seeds of a rank's environments, in [2^30, 2^31): those of a run differ, and rarely coincide with another's.

    They step through that half by a stride of the run's own. A resumed run moves on to unused ones.
    """
    first, stride = map(int, np.random.SeedSequence((seed, ENV_STREAM, global_step)).generate_state(2))
    indices = range(rank * num_envs, (rank + 1) * num_envs)
    return [FIRST_TRAINING_SEED + (first + i * (stride | 1)) % FIRST_TRAINING_SEED for i in indices]
