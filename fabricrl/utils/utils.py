"""Arithmetic and seeding that every script shares."""

import gc

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.device import to_host
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.ranks import all_gather

ACT_STREAM, TRAIN_STREAM, ENV_STREAM, EVAL_STREAM = 0, 1, 2, 4  # 3 is that of vector.py
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
        rewards, values, dones: [T, N]; dones is 1 where an episode ended with that step.
        next_values: [N], the value of the observation after the last step.

    Returns:
        advantages and returns, both [T, N].
    """
    not_dones = 1.0 - dones.float()
    bootstrap = torch.cat((values[1:], next_values[None]))  # [T, N]
    deltas = rewards + gamma * not_dones * bootstrap - values
    advantages = discounted_sums(deltas, gamma * gae_lambda * not_dones)
    return advantages, advantages + values


def discounted_sums(deltas: Tensor, decay: Tensor) -> Tensor:
    """A_t = δ_t + c_t A_{t+1} for δ and c [T, N], from A_T = 0; [T, N]."""
    return _sums_by_steps(deltas, decay) if _in_memory(deltas) else _sums_by_doubling(deltas, decay)


def _in_memory(tensor: Tensor) -> bool:
    """Tells if NumPy can read it."""
    return tensor.device.type == "cpu"


def _sums_by_steps(deltas: Tensor, decay: Tensor) -> Tensor:
    """In NumPy, where a step costs a third of what it costs in torch at this size."""
    steps, factors = deltas.numpy(), decay.numpy()
    sums, running = np.empty_like(steps), np.zeros_like(steps[0])
    with np.errstate(all="ignore"):  # of what is not finite, the loss or its metrics will tell
        for t in range(len(steps) - 1, -1, -1):
            running = steps[t] + factors[t] * running
            sums[t] = running
    return torch.from_numpy(sums)


def _sums_by_doubling(deltas: Tensor, decay: Tensor) -> Tensor:
    """After k rounds, sums reach over 2^k steps: log T rounds in place of T kernels one after the other."""
    reaching, left, reach = deltas.clone(), decay.clone(), 1
    while reach < len(deltas):
        reaching[:-reach] += left[:-reach] * reaching[reach:].clone()
        left[:-reach] *= left[reach:].clone()
        left[-reach:] = 0.0
        reach *= 2
    return reaching


def discounted_returns(rewards: Tensor, dones: Tensor, before: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted return G_t = r_t + γ G_{t−1}, from zero after every episode.

    Args:
        rewards, dones: [T, N].
        before: [N], G of the step before the first; 0 after an episode's end.

    Returns:
        the returns [T, N], and `before` [N] of the next rollout.
    """
    if not _in_memory(rewards):  # backwards in time, these are `discounted_sums`
        going_on = 1.0 - dones.float()
        first = torch.cat((rewards[:1] + gamma * before, rewards[1:]))
        decay = gamma * torch.cat((going_on[:1], going_on[:-1]))
        sums = discounted_sums(first.flip(0), decay.flip(0)).flip(0)
        return sums, sums[-1] * going_on[-1]
    steps, cut = rewards.numpy(), 1.0 - dones.float().numpy()
    running, returns = before.numpy(), np.empty_like(steps)
    for t in range(len(steps)):
        returns[t] = running = steps[t] + gamma * running
        running = running * cut[t]
    return torch.from_numpy(returns), torch.from_numpy(running)


def anneal(initial: float, progress: float, enabled: bool) -> float:
    """`initial` scaled linearly to zero as `progress` goes from 0 to 1, or left alone."""
    return initial * (1.0 - progress) if enabled else initial


def explained_variance(fabric: Fabric, values: Tensor, returns: Tensor, counts: Tensor | None = None) -> Tensor:
    """1 − Var[returns − values] / Var[returns]: 1 is a perfect critic, 0 predicts the mean. NaN if they are equal.

    Over all ranks, which must call it together, and the rows that count, where some do not. All [B]; only the result
    is brought to the CPU.
    """
    counts = torch.ones_like(values) if counts is None else counts
    gathered = all_gather(fabric, torch.stack((values, returns, counts))).double()  # so that equal ones have variance 0
    values, returns, counts = gathered.movedim(1, 0).flatten(1)

    def variance(x: Tensor) -> Tensor:
        mean = (x * counts).sum() / counts.sum()
        return ((x - mean).square() * counts).sum() / counts.sum()

    whole = variance(returns)
    (explained,) = to_host(torch.where(whole == 0, torch.nan, 1 - variance(returns - values) / whole))
    return explained


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
    return [HALF + (first + (rank * num_envs + i) * (stride | 1)) % HALF for i in range(num_envs)]


def freeze_gc() -> None:
    """Freezes long-lived objects: to search them again and again costs 3 % of SAC's update."""
    gc.collect()
    gc.freeze()


def require(condition: bool, flag: str, given: object, allowed: str) -> None:
    """Raises ConfigError naming the flag, what was given and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"--{flag.replace('_', '-')} is {given}: it must be {allowed}")
