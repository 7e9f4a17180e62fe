"""Losses of soft actor-critic, and the targets of its critics. Numbers are those of arXiv:1812.05905v2.

B rows, C critics. Entropies and log-probabilities are those of actions in [−1, 1], before they are rescaled to the
environment's bounds.
"""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def td_target(
    rewards: Tensor, terminated: Tensor, discounts: Tensor, next_q: Tensor, next_logprobs: Tensor, alpha: Tensor
) -> Tensor:
    """TD target of the critics (the bracket of Eq. 5, with V of Eq. 3), [B].

        y = r + γ (1 − terminated) ( min_i Q̄_i(s', a') − α log π(a'|s') ),  a' ~ π(·|s')

    The minimum over target critics is that of Section 6. A truncated episode's s' has a value.

    Args:
        rewards, terminated, discounts, next_logprobs: [B]; discounts is γ^m for an m-step return.
        next_q: [C, B], the target critics at s', a'.
        alpha: scalar.
    """
    return rewards + discounts * (1.0 - terminated) * (next_q.amin(0) - alpha * next_logprobs)


def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Half the squared Bellman error (Eq. 5), summed over critics: J_Q = Σ_i mean( ½ (Q_i(s, a) − y)² ).

    Args:
        q: [C, B]; targets: [B].
    """
    errors = functional.mse_loss(q, targets.expand_as(q), reduction="none")
    return 0.5 * errors.mean(-1).sum()


def actor_loss(q: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """J_π = mean( α log π(a|s) − Q(s, a) ) with a reparametrised (Eq. 9).

    Args:
        q: [B], the least of the critics (Section 6), or their mean; logprobs: [B].
        alpha: scalar without gradient.
    """
    return (alpha * logprobs - q).mean()


def alpha_loss(log_alpha: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """J(α) = log α · (H − H̄), with H = −mean( log π(a|s) ): α rises while the policy's entropy is below the target H̄.

    Eq. 18 has α in place of log α, whose gradient by log α is this one's times α. Both are in use: this in earlier
    versions of the authors' code (github.com/rail-berkeley/softlearning) and in Stable-Baselines3, the other in its
    later versions and in CleanRL. Adam divides a factor that changes slowly out again, so that they differ little.

    Args:
        log_alpha, entropy: scalars; the entropy is taken as a constant.
    """
    return log_alpha * (entropy.detach() - target_entropy)
