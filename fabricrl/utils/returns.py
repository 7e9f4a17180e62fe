"""Returns and advantages: discounted sums over rollouts, and how well values explain them."""

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.utils.device import to_host
from fabricrl.utils.ranks import all_gather


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


def explained_variance(fabric: Fabric, values: Tensor, returns: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 − Var[returns − values] / Var[returns]: 1 is a perfect critic, 0 predicts the mean. NaN if they are equal.

    Over all ranks, which must call it together, and the rows that are valid. All [B]; only the result is brought to the
    CPU.
    """
    valid = torch.ones_like(values) if valid is None else valid
    gathered = all_gather(fabric, torch.stack((values, returns, valid))).double()  # so that equal ones have variance 0
    values, returns, valid = gathered.movedim(1, 0).flatten(1)

    def variance(x: Tensor) -> Tensor:
        mean = (x * valid).sum() / valid.sum()
        return ((x - mean).square() * valid).sum() / valid.sum()

    whole = variance(returns)
    (explained,) = to_host(torch.where(whole == 0, torch.nan, 1 - variance(returns - values) / whole))
    return explained
