"""The losses of PPO, against arithmetic written out and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from fabricrl.algos.ppo.loss import mean, policy_loss, policy_metrics, value_loss


def logratio(*ratios: float) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "has_gradient"),
    [
        # ε = 0.2. min(r A, clip(r) A): the objective stops where the policy has moved far enough in the good direction
        (1.0, 2.0, 2.0, True),
        (1.1, 2.0, 2.2, True),
        (1.5, 2.0, 2.4, False),  # min(3, 1.2 · 2): more probable than allowed, and good: no reason to go on
        (0.5, 2.0, 1.0, True),  # min(1, 0.8 · 2): too improbable though good: back
        (1.1, -2.0, -2.2, True),
        (1.5, -2.0, -3.0, True),  # min(−3, −2.4): too probable though bad: back
        (0.5, -2.0, -1.6, False),  # min(−1, −1.6): improbable enough
        (0.9, -2.0, -1.8, True),
    ],
)
def test_policy_loss_clips_on_the_side_that_the_advantage_says(
    ratio: float, advantage: float, objective: float, has_gradient: bool
) -> None:
    x = logratio(ratio).requires_grad_()
    loss = policy_loss(x, vector(advantage), 0.2)
    assert loss.item() == pytest.approx(-objective)
    loss.backward()
    # d(−r A)/d log r = −r A
    assert x.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0)


def test_policy_loss_is_the_mean_over_samples() -> None:
    loss = policy_loss(logratio(1.5, 0.5, 1.0), vector(2.0, 2.0, -1.0), 0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 1.0) / 3)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("new", "old", "target", "clipped", "unclipped"),
    [
        # ε = 0.2; half of the squared error, and with clipping the worse of both
        (1.0, 1.0, 3.0, 2.0, 2.0),  # ½ (1 − 3)²
        (2.0, 1.0, 3.0, 1.62, 0.5),  # ½ max((2 − 3)², (1.2 − 3)²) = ½ 3.24: moved towards the target too fast
        (0.0, 1.0, 3.0, 4.5, 4.5),  # ½ max(9, (0.8 − 3)² = 4.84): away from it: the unclipped one
        (0.0, 1.0, -3.0, 7.22, 4.5),  # ½ max(9, (0.8 + 3)² = 14.44): the other sign
        (1.1, 1.0, 3.0, 1.805, 1.805),  # ½ 1.9²: inside ε
    ],
)
def test_value_loss_is_half_the_worse_squared_error(
    new: float, old: float, target: float, clipped: float, unclipped: float
) -> None:
    args = vector(new), vector(old), vector(target), 0.2
    assert value_loss(*args, clip_vloss=True).item() == pytest.approx(clipped)
    assert value_loss(*args, clip_vloss=False).item() == pytest.approx(unclipped)


def test_value_loss_is_the_mean_over_samples() -> None:
    loss = value_loss(vector(2.0, 0.0), vector(1.0, 1.0), vector(3.0, 3.0), 0.2, True)
    assert loss.item() == pytest.approx((1.62 + 4.5) / 2)


def test_a_value_that_has_not_moved_far_is_learned_as_without_clipping() -> None:
    values, returns = torch.randn(2, 2, 1000)
    changes = 0.19 * (2 * torch.rand(2, 2, 1000, dtype=torch.float64) - 1).prod(0)
    new_values = (values + changes).float()  # not a sum in float32, of which the difference is what was added
    gradients = []
    for clip_vloss in (True, False):
        x = new_values.clone().requires_grad_()
        value_loss(x, values, returns, 0.2, clip_vloss).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_nothing_is_learned_where_the_clipped_value_is_the_worse() -> None:
    x = vector(1.5, 1.5, 0.5).requires_grad_()
    value_loss(x, vector(1.0, 1.0, 1.0), vector(2.0, 0.0, 2.0), 0.2, True).backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.0, 0.5, -0.5])  # (V − R) / 3


def test_gradients_equal_finite_differences() -> None:
    # Away from the kinks, where a derivative exists
    x = torch.tensor([0.05, 0.5, -0.5, 0.4, -0.6, -0.1], dtype=torch.float64, requires_grad=True)
    advantages = vector(1.0, 2.0, 1.5, -1.0, -2.0, -0.5)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, advantages, 0.2), (x,))
    values, returns = vector(0.0, 1.0, -1.0, 2.0, 0.5, 0.3), vector(1.0, -1.0, 0.5, 3.0, 0.4, 2.0)
    new_values = (values + vector(0.1, 0.7, -0.6, 0.5, 0.05, -0.9)).requires_grad_()
    for clip_vloss in (True, False):
        assert torch.autograd.gradcheck(lambda v, c=clip_vloss: value_loss(v, values, returns, 0.2, c), (new_values,))
    weights = vector(0.5, 0.0, 0.2, 0.1, 0.2, 0.0)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, advantages, 0.2, weights), (x,))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, values, returns, 0.2, True, weights), (new_values,))
    assert torch.autograd.gradcheck(lambda h: mean(h, weights), (returns.clone().requires_grad_(),))


def test_with_weights_rows_count_as_often_as_these_say() -> None:
    x, advantages = logratio(1.5, 0.5, 1.0, 9.0), vector(2.0, 2.0, -1.0, 5.0)
    values, returns, entropy = vector(2.0, 0.0, 1.0, 7.0), vector(3.0, 3.0, 0.0, -9.0), vector(1.0, 2.0, 6.0, 4.0)
    weights, counted = vector(0.5, 0.25, 0.25, 0.0), torch.tensor([0, 0, 1, 2])  # the first twice, the last never
    for loss, columns in (
        (policy_loss, (x, advantages, 0.2)),
        (value_loss, (values, values + 0.1, returns, 0.2, True)),
        (mean, (entropy,)),
        (policy_metrics, (x, 0.2)),
    ):
        often = (c[counted] if isinstance(c, Tensor) else c for c in columns)
        torch.testing.assert_close(loss(*columns, weights), loss(*often))


def test_coefficients_may_be_tensors() -> None:
    x, values = logratio(1.5, 0.5, 1.0), vector(2.0, 0.0, 1.0)
    advantages, clip_coef = vector(2.0, 2.0, -1.0), torch.tensor(0.2, dtype=torch.float64)
    assert policy_loss(x, advantages, clip_coef) == policy_loss(x, advantages, 0.2)
    assert value_loss(values, x, advantages, clip_coef, True) == value_loss(values, x, advantages, 0.2, True)
    assert torch.equal(policy_metrics(x, clip_coef), policy_metrics(x, 0.2))


def approx_kl(x: Tensor) -> float:
    return policy_metrics(x, 0.2)[1].item()


def test_policy_metrics_are_the_mean_log_ratio_negated_the_divergence_and_the_share_that_is_clipped() -> None:
    x = logratio(1.5, 0.5, 1.0, 1.1)
    divergence = (x.exp() - 1 - x).mean().item()
    assert policy_metrics(x, 0.2).tolist() == pytest.approx([-x.mean().item(), divergence, 0.5])


def test_approx_kl_by_hand() -> None:
    # (2 − 1 − log 2 + ½ − 1 − log ½)/2 = (1 − ½)/2 = ¼, since the logarithms cancel
    assert approx_kl(logratio(2.0, 0.5)) == pytest.approx(0.25)
    assert approx_kl(logratio(1.0, 1.0)) == 0.0


def test_approx_kl_is_exact_where_the_policy_has_hardly_moved() -> None:
    x = torch.full((2,), 1e-3)  # e^x − 1 − x = x²/2 + x³/6 + …, which the difference e^x − 1 in float32 would lose
    assert approx_kl(x) == pytest.approx(0.5e-6 + 1e-9 / 6, rel=1e-3)


def test_approx_kl_estimates_the_true_divergence_from_samples_of_the_old_policy() -> None:
    old, new = vector(0.5, 0.3, 0.2), vector(0.4, 0.4, 0.2)
    counts = (old * 1000).long()  # a sample that has exactly the old policy's frequencies
    actions = torch.repeat_interleave(torch.arange(3), counts)
    estimate = approx_kl((new / old).log()[actions])
    assert estimate == pytest.approx((old * (old / new).log()).sum().item())  # KL(old ‖ new)


def test_clipfrac_counts_both_sides() -> None:
    assert policy_metrics(logratio(0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0, 1.1), 0.2)[2].item() == 4 / 8


def test_policy_metrics_carry_no_gradient() -> None:
    assert not policy_metrics(torch.zeros(3, requires_grad=True), 0.2).requires_grad


def test_policy_gradient_at_the_old_policy_is_the_plain_one() -> None:
    # At ratio 1 the gradient is −A/B for each sample: PPO's first minibatch is ordinary policy gradient
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    advantages = vector(1.0, -2.0, 0.5, 0.0)
    policy_loss(x, advantages, 0.2).backward()
    torch.testing.assert_close(x.grad, -advantages / 4)
    assert math.isclose(policy_loss(x, advantages, 0.2).item(), 0.125)  # −(1 − 2 + ½)/4
