"""Losses of soft actor-critic, each with its gradient. Numbers are those of arXiv:1812.05905v2.

B rows, C critics. Entropies and log-probabilities are those of actions in [−1, 1], before they are stretched to the
environment's bounds.
"""

import torch
from torch import Tensor


@torch.no_grad()
def td_target(
    rewards: Tensor, terminated: Tensor, discounts: Tensor, next_q: Tensor, next_logprobs: Tensor, alpha: Tensor
) -> Tensor:
    """What the critics shall say (the bracket of Eq. 5, with V of Eq. 3), [B].

        y = r + γ (1 − terminated) ( min_i Q̄_i(s', a') − α log π(a'|s') ),  a' ~ π(·|s')

    The minimum over target critics is that of Section 6. A time limit is no termination: its s' has a value.

    Args:
        rewards, terminated, discounts, next_logprobs: [B]; discounts is γ^m for an m-step return.
        next_q: [C, B], the target critics at s', a'.
        alpha: scalar.
    """
    return rewards + discounts * (1.0 - terminated) * (next_q.amin(0) - alpha * next_logprobs)


def critic_loss(q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared Bellman error (Eq. 5), summed over critics: J_Q = Σ_i mean( ½ (Q_i(s, a) − y)² ).

    Args:
        q: [C, B]; targets: [B].

    Returns:
        J_Q, and ∂J_Q/∂Q = (Q − y) / B, [C, B].
    """
    errors, rows = q - targets, len(targets)
    return errors.square().sum() * (0.5 / rows), errors / rows


def actor_loss(
    q: Tensor, logprobs: Tensor, alpha: Tensor, mean_over_critics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """J_π = mean( α log π(a|s) − Q(s, a) ) with a reparametrised (Eq. 9), and Q the least of the critics (Section 6).

    Args:
        q: [C, B]; logprobs: [B]; alpha: scalar without gradient.
        mean_over_critics: Q is their mean instead.

    Returns:
        J_π, ∂J_π/∂Q_i [C, B], which is −1/B for the least critic or −1/(C B) for all, and ∂J_π/∂log π = α/B, a scalar.
    """
    critics, rows = q.shape
    if mean_over_critics:
        value, grad_q = q.mean(0), torch.full_like(q, -1.0 / (critics * rows))
    else:
        value, least = q.min(0, keepdim=True)
        grad_q = torch.zeros_like(q).scatter_(0, least, -1.0 / rows)
    return (alpha * logprobs - value).mean(), grad_q, alpha / rows


def alpha_loss(log_alpha: Tensor, entropy: Tensor, target_entropy: float) -> tuple[Tensor, Tensor]:
    """J(α) = log α · (H − H̄), with H = −mean( log π(a|s) ): α rises while the policy's entropy is below the target H̄.

    Eq. 18 has α in place of log α, whose gradient by log α is this one's times α. Both are in use: this in earlier
    versions of the authors' code (github.com/rail-berkeley/softlearning) and in Stable-Baselines3, the other in its
    later versions and in CleanRL. Adam divides a factor that changes slowly out again, so that they differ little.

    Args:
        log_alpha, entropy: scalars; entropy is taken as a constant.

    Returns:
        J(α), and ∂J/∂log α = H − H̄; scalars.
    """
    excess = entropy - target_entropy
    return log_alpha * excess, excess
