"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347v2): tensors in, scalars out."""

import torch
from torch import Tensor


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate objective, negated (Eq. 7), with r = π_new(a|s) / π_old(a|s) = e^logratio.

        L = −mean( min( r A, clip(r, 1 − ε, 1 + ε) A ) )

    Args:
        logratio, advantages: [B].
        clip_coef: ε, a number or, for compiled code, a scalar tensor.
    """
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, clip_coef: float, clip_vloss: bool) -> Tensor:
    """Half the mean squared error (Eq. 9), of the worse of the new value and its clipped change.

        L = ½ mean( max( (V − R)², (V_old + clip(V − V_old, −ε, ε) − R)² ) )

    The clipping is not in the paper but in its authors' code (github.com/openai/baselines, ppo2/model.py). All [B].
    """
    errors = (new_values - returns).square()
    if clip_vloss:
        clipped = values + (new_values - values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * errors.mean()


def entropy_loss(entropy: Tensor) -> Tensor:
    """−mean(H): minimising it keeps the policy random (the bonus S of Eq. 9). [B]."""
    return -entropy.mean()


@torch.no_grad()
def approx_kl(logratio: Tensor) -> Tensor:
    """KL(π_old ‖ π_new) ≈ mean(r − 1 − log r) over samples of π_old: unbiased and never negative (k3 of Schulman 2020,
    joschu.net/blog/kl-approx.html)."""
    return (logratio.exp() - 1 - logratio).mean()


@torch.no_grad()
def clip_fraction(logratio: Tensor, clip_coef: float) -> Tensor:
    """Share of samples whose ratio lies outside 1 ± ε."""
    return ((logratio.exp() - 1).abs() > clip_coef).float().mean()
