"""Arithmetic and seeding that every script shares."""

import gc

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.errors import ConfigError
from fabricrl.utils.ranks import all_mean, all_sum

ACT_STREAM, TRAIN_STREAM, ENV_STREAM = 0, 1, 2
HALF = 2**30  # seeds of environments in training start here, so that those below are for evaluation


def gae(
    rewards: Tensor, values: Tensor, dones: Tensor, next_values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438v6, Eq. 11 and 16).

        δ_t = r_t + γ (1 − done_t) V(s_{t+1}) − V(s_t)
        A_t = δ_t + γ λ (1 − done_t) A_{t+1}
        R_t = A_t + V(s_t)

    `done_t` belongs to the step that earned `r_t`, so an episode that ended by a time limit is cut like any other;
    its remaining value, γ V(final observation), has to be in `r_t` already.

    Args:
        rewards, values, dones: [T, N], on the CPU; dones is 1 where an episode ended with that step.
        next_values: [N], the value of the observation after the last step.

    Returns:
        advantages and returns, both [T, N].
    """
    not_dones = 1.0 - dones.float()
    bootstrap = torch.cat((values[1:], next_values[None]))  # [T, N]
    deltas = (rewards + gamma * not_dones * bootstrap - values).numpy()
    decay = (gamma * gae_lambda * not_dones).numpy()
    advantages = np.empty_like(deltas)
    advantage = np.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):  # NumPy: a step costs a third of what it costs in torch at this size
        advantage = deltas[t] + decay[t] * advantage
        advantages[t] = advantage
    result = torch.from_numpy(advantages)
    return result, result + values


def discounted_sums(rewards: Tensor, dones: Tensor, carry: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted reward G_t = r_t + γ G_{t−1}, restarted after every episode.

    Args:
        rewards, dones: [T, N].
        carry: [N], γ-discounted sum up to the step before the first (0 after an episode's end).

    Returns:
        the sums [T, N] and the carry [N] for the next rollout.
    """
    steps, cut = rewards.numpy(), 1.0 - dones.float().numpy()
    running, sums = carry.numpy(), np.empty_like(steps)
    for t in range(len(steps)):
        sums[t] = running = steps[t] + gamma * running
        running = running * cut[t]
    return torch.from_numpy(sums), torch.from_numpy(running)


def normalize_rows(fabric: Fabric, rows: Tensor) -> Tensor:
    """Each row [M, B] minus its mean, over its standard deviation, with the moments of that row on all ranks.

    The moments are global so that W ranks with B elements each do what one rank with W B elements does.
    """
    count = rows.shape[1] * fabric.world_size
    mean = all_mean(fabric, rows.mean(1, keepdim=True))
    square = all_sum(fabric, (rows - mean).square().sum(1, keepdim=True))
    return (rows - mean) / ((square / (count - 1)).sqrt() + 1e-8)


def anneal(initial: float, progress: float, enabled: bool) -> float:
    """`initial` scaled linearly to zero as `progress` goes from 0 to 1, or left alone."""
    return initial * (1.0 - progress) if enabled else initial


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var[returns − values] / Var[returns]: 1 is a perfect critic, 0 predicts the mean. NaN if they are equal."""
    variance = returns.var(correction=0)
    return torch.where(variance == 0, torch.nan, 1 - (returns - values).var(correction=0) / variance)


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
    """Seeds of a rank's environments, in [2^30, 2^31): those of a run differ, and share none with other runs.

    They step through that half by a stride of the run's own. A resumed run moves on to unused ones.
    """
    first, stride = map(int, np.random.SeedSequence((seed, ENV_STREAM, global_step)).generate_state(2))
    return [HALF + (first + (rank * num_envs + i) * (stride | 1)) % HALF for i in range(num_envs)]


def keep_what_is_here() -> None:
    """Spares Python's garbage collector what stays for good; to search it again and again costs 3 % of SAC's update."""
    gc.collect()
    gc.freeze()


def require(condition: bool, flag: str, given: object, allowed: str) -> None:
    """Raises ConfigError naming the flag, what was given and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"--{flag.replace('_', '-')} is {given}: it must be {allowed}")
