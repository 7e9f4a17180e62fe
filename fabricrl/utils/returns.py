"""Returns and advantages: discounted sums over rollouts, and how well values explain them."""

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

    `done_t` belongs to the step that earned `r_t`, so a truncated episode is cut like any other;
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
    """A_t = δ_t + c_t A_{t+1} for δ and c [T, N], from A_T = 0; [T, N].

    After k rounds, sums reach over 2^k steps: log T rounds of three operations in place of T steps.
    """
    sums, left, reach = deltas.clone(), decay, 1
    while reach < len(sums):
        sums[:-reach] += left[: len(sums) - reach] * sums[reach:]
        left = left[:-reach] * left[reach:]  # the product of the factors of twice as many steps
        reach *= 2
    return sums


def discounted_returns(rewards: Tensor, dones: Tensor, before: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Running discounted return G_t = r_t + γ G_{t−1}, from zero after every episode.

    Args:
        rewards, dones: [T, N].
        before: [N], G of the step before the first; 0 after an episode's end.

    Returns:
        the returns [T, N], and `before` [N] of the next rollout.
    """
    going_on = 1.0 - dones.float()
    first = torch.cat((rewards[:1] + gamma * before, rewards[1:]))
    decay = gamma * torch.cat((going_on[:1], going_on[:-1]))  # the first is not used
    returns = discounted_sums(first.flip(0), decay.flip(0)).flip(0)  # backwards in time, they are such sums
    return returns, returns[-1] * going_on[-1]


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
