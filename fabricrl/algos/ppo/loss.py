"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347v2): tensors in, scalars out, and metrics.

Where some rows of a minibatch do not count, `weights` [B] of all rows stand in for the 1/B of the mean.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

squared_error = partial(functional.mse_loss, reduction="none")  # one operation forward and one backward


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of [B], or the sum weighted by `weights` [B]."""
    return values.mean() if weights is None else (values * weights).sum()


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: Any, weights: Tensor | None = None) -> Tensor:
    """Clipped surrogate objective, negated (Eq. 7), with r = π_new(a|s) / π_old(a|s) = e^logratio.

        L = −mean( min( r A, clip(r, 1 − ε, 1 + ε) A ) )

    Args:
        logratio, advantages: [B].
        clip_coef: ε, a number or a scalar tensor.
    """
    ratio = logratio.exp()
    clipped = ratio.detach().clamp(1 - clip_coef, 1 + clip_coef)  # a constant: no gradient where it is the smaller
    surrogate, clipped_surrogate = ratio * advantages, clipped * advantages
    return -mean(torch.where(surrogate <= clipped_surrogate, surrogate, clipped_surrogate), weights)


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    clip_coef: Any,
    clip_vloss: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """Half the mean squared error (Eq. 9), of the worse of the new value and its clipped change.

        L = ½ mean( max( (V − R)², (V_old + clip(V − V_old, −ε, ε) − R)² ) )

    The clipping is not in the paper but in its authors' code (github.com/openai/baselines, ppo2/model.py). All [B].
    """
    errors = squared_error(new_values, returns)
    if clip_vloss:  # a constant again; exactly the new value where that is in range, so that its own error counts
        clipped = new_values.detach().clamp(values - clip_coef, values + clip_coef)
        clipped_errors = squared_error(clipped, returns)
        errors = torch.where(clipped_errors > errors, clipped_errors, errors)
    return 0.5 * mean(errors, weights)


@torch.no_grad()
def policy_metrics(logratio: Tensor, clip_coef: Any, weights: Tensor | None = None) -> Tensor:
    """Measures of how far the policy has moved: means over samples of π_old, [3].

        old_approx_kl = mean( −log r )          ≈ KL(π_old ‖ π_new)
        approx_kl     = mean( r − 1 − log r )   ≈ KL(π_old ‖ π_new): unbiased, too, and never negative
        clipfrac      = mean( |r − 1| > ε )     share of samples that are clipped

    The second is k3 of Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    change = logratio.expm1()  # r − 1
    clipped = (change.abs() > clip_coef).to(logratio.dtype)
    samples = torch.stack((-logratio, change - logratio, clipped))  # [3, B]
    return samples.mean(-1) if weights is None else (samples * weights).sum(-1)
