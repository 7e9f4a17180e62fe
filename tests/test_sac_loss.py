"""The losses of SAC and DroQ, against arithmetic written out and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from fabricrl.algos.droq import loss as droq_loss
from fabricrl.algos.sac import loss as sac_loss
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("terminated", "discount", "q", "logprob", "alpha", "target"),
    [
        # r = 1; y = r + γ (1 − terminated)(min Q̄ − α log π)
        (0.0, 0.9, (3.0, 2.0), -1.0, 0.5, 1 + 0.9 * (2 + 0.5)),
        (1.0, 0.9, (3.0, 2.0), -1.0, 0.5, 1.0),  # nothing comes after
        (0.0, 0.9, (2.0, 3.0), 1.0, 0.5, 1 + 0.9 * (2 - 0.5)),  # a likely action has little entropy
        (0.0, 0.9**3, (-5.0, -4.0), -2.0, 0.1, 1 + 0.729 * (-5 + 0.2)),  # three rewards are in r already
        (0.0, 0.9, (4.0,), 0.5, 0.0, 1 + 0.9 * 4),  # one critic, no entropy
        (0.0, 0.9, (4.0, 7.0, 3.0, 9.0, 5.0), 0.0, 1.0, 1 + 0.9 * 3),  # the least of all
        (0.0, 0.0, (3.0, 2.0), -1.0, 0.5, 1.0),
    ],
)
def test_td_target_by_hand(
    terminated: float, discount: float, q: tuple[float, ...], logprob: float, alpha: float, target: float
) -> None:
    next_q = vector(*q)[:, None]
    y = td_target(vector(1.0), vector(terminated), vector(discount), next_q, vector(logprob), vector(alpha)[0])
    assert y.tolist() == [pytest.approx(target)]


def test_the_minimum_is_that_of_each_row_and_rows_keep_their_own_numbers() -> None:
    next_q = torch.tensor([[1.0, 20.0, 300.0], [2.0, 10.0, 400.0]], dtype=torch.float64)  # [C, B]
    y = td_target(
        vector(0.1, 0.2, 0.3), vector(0, 0, 1), vector(1.0, 0.5, 0.5), next_q, vector(1, 2, 3), vector(2.0)[0]
    )
    assert y.tolist() == pytest.approx([0.1 + 1 - 2, 0.2 + 0.5 * (10 - 4), 0.3])
    assert y.shape == (3,)


def test_targets_carry_no_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not td_target(vector(1, 1, 1), vector(0, 0, 0), vector(1, 1, 1), x, x[0], vector(1.0)[0]).requires_grad


def test_critic_loss_is_half_the_squared_error_averaged_over_rows_and_summed_over_critics() -> None:
    q = torch.tensor([[1.0, 2.0], [0.0, 5.0], [3.0, 3.0]], dtype=torch.float64)
    # y = (2, 3): ½ (1 + 1)/2 + ½ (4 + 4)/2 + ½ (1 + 0)/2
    loss, grad = critic_loss(q, vector(2.0, 3.0))
    assert loss.item() == pytest.approx(0.5 + 2.0 + 0.25)
    # The gradient of a critic is that of its own loss, however many there are: (Q − y)/B
    assert grad.tolist() == [[-0.5, -0.5], [-1.0, 1.0], [0.5, 0.0]]


def test_actor_loss_weighs_log_probability_with_the_temperature() -> None:
    q = torch.tensor([[1.0, 6.0], [3.0, 4.0]], dtype=torch.float64)
    loss, grad_q, grad_logprobs = actor_loss(q, vector(-2.0, 3.0), vector(0.5)[0])
    assert loss.item() == pytest.approx(((0.5 * -2 - 1) + (0.5 * 3 - 4)) / 2)  # the least of the critics
    assert grad_q.tolist() == [[-0.5, 0.0], [0.0, -0.5]]  # up this one
    assert grad_logprobs.item() == 0.25  # down the log-probability: towards entropy
    loss, grad_q, grad_logprobs = actor_loss(q, vector(-2.0, 3.0), vector(0.5)[0], mean_over_critics=True)
    assert loss.item() == pytest.approx(((0.5 * -2 - 2) + (0.5 * 3 - 5)) / 2)
    assert grad_q.tolist() == [[-0.25, -0.25]] * 2
    assert grad_logprobs.item() == 0.25


def test_alpha_loss_by_hand() -> None:
    # −mean(log α (log π + H̄)) with log α = 0.3, log π = (−1, 4), so that H = −1.5, and H̄ = −2
    loss, grad = alpha_loss(torch.tensor(0.3, dtype=torch.float64), -vector(-1.0, 4.0).mean(), -2.0)
    assert loss.item() == pytest.approx(-0.3 * ((-1 - 2) + (4 - 2)) / 2)
    assert grad.item() == pytest.approx(0.5)  # −mean(log π + H̄), whatever α is


@pytest.mark.parametrize("log_alpha", [-5.0, 0.0, 2.0])
@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (-2.1, True), (-1.9, False), (1.0, False)])
def test_the_temperature_rises_below_the_target_entropy_and_falls_above(
    entropy: float, rises: bool, log_alpha: float
) -> None:
    _, grad = alpha_loss(torch.tensor(log_alpha), torch.tensor(entropy), -2.0)
    assert (grad.item() < 0) == rises
    # A step is as long for small temperatures as for large ones
    assert grad.item() == pytest.approx(entropy + 2.0, rel=1e-4)


@pytest.mark.parametrize("mean_over_critics", [False, True])
def test_the_gradients_that_are_written_out_are_those_of_the_losses(mean_over_critics: bool) -> None:
    q = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets, logprobs = vector(1, -1, 0.5, 2, 0), vector(0.1, -0.2, 0.3, 2, -1).requires_grad_()
    loss, grad = critic_loss(q, targets)
    torch.testing.assert_close(grad, *torch.autograd.grad(loss, q))
    loss, grad_q, grad_logprobs = actor_loss(q, logprobs, vector(0.7)[0], mean_over_critics)
    found = torch.autograd.grad(loss, (q, logprobs))
    torch.testing.assert_close(grad_q, found[0])
    torch.testing.assert_close(grad_logprobs.expand(5), found[1])
    log_alpha = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    loss, grad = alpha_loss(log_alpha, vector(0.7)[0], -1.5)
    torch.testing.assert_close(grad, *torch.autograd.grad(loss, log_alpha))


def test_a_policy_that_minimises_the_actor_loss_is_the_softmax_of_the_critic() -> None:
    # Over three actions, E[α log π − Q] is least at π ∝ e^(Q/α), where it is −α log Σ e^(Q/α)
    q, alpha = vector(1.0, 2.0, 0.0), vector(0.7)[0]
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        logprobs = logits.log_softmax(0)
        # The loss is a mean over samples: each action as often as its probability says
        loss = 3 * actor_loss((logprobs.exp() * q)[None], logprobs.exp() * logprobs, alpha)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(0), (q / alpha).softmax(0), atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(-alpha.item() * math.log((q / alpha).exp().sum().item()), abs=1e-6)


def test_the_losses_of_droq_are_those_of_sac() -> None:
    assert set(droq_loss.__all__) == {"actor_loss", "alpha_loss", "critic_loss", "td_target"}
    for name in droq_loss.__all__:
        assert getattr(droq_loss, name) is getattr(sac_loss, name)
