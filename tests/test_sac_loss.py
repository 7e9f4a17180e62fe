"""The losses of SAC and DroQ, against arithmetic written out and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from fabricrl.algos.droq import loss as droq_loss
from fabricrl.algos.sac import loss as sac_loss
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.models.distributions import TanhNormalHead


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
    q.requires_grad_()
    loss = critic_loss(q, vector(2.0, 3.0))
    assert loss.item() == pytest.approx(0.5 + 2.0 + 0.25)
    loss.backward()
    # The gradient of a critic is that of its own loss, however many there are: (Q − y)/B
    assert q.grad.tolist() == [[-0.5, -0.5], [-1.0, 1.0], [0.5, 0.0]]


def test_actor_loss_weighs_log_probability_with_the_temperature() -> None:
    q, logprobs = vector(1.0, 4.0).requires_grad_(), vector(-2.0, 3.0).requires_grad_()
    loss = actor_loss(q, logprobs, vector(0.5)[0])
    assert loss.item() == pytest.approx(((0.5 * -2 - 1) + (0.5 * 3 - 4)) / 2)
    loss.backward()
    assert q.grad.tolist() == [-0.5, -0.5]  # up the critics
    assert logprobs.grad.tolist() == [0.25, 0.25]  # down the log-probability: towards entropy


def test_alpha_loss_by_hand() -> None:
    # −mean(log α (log π + H̄)) with log α = 0.3, log π = (−1, 4), so that H = −1.5, and H̄ = −2
    log_alpha, logprobs = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), vector(-1.0, 4.0).requires_grad_()
    loss = alpha_loss(log_alpha, -logprobs.mean(), -2.0)
    assert loss.item() == pytest.approx(-0.3 * ((-1 - 2) + (4 - 2)) / 2)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(0.5)  # −mean(log π + H̄), whatever α is
    assert logprobs.grad is None  # the temperature does not move the policy


@pytest.mark.parametrize("log_alpha", [-5.0, 0.0, 2.0])
@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (-2.1, True), (-1.9, False), (1.0, False)])
def test_the_temperature_rises_below_the_target_entropy_and_falls_above(
    entropy: float, rises: bool, log_alpha: float
) -> None:
    parameter = torch.tensor(log_alpha, requires_grad=True)
    alpha_loss(parameter, torch.tensor(entropy), -2.0).backward()
    assert (parameter.grad.item() < 0) == rises
    # A step is as long for small temperatures as for large ones
    assert parameter.grad.item() == pytest.approx(entropy + 2.0, rel=1e-4)


def test_gradients_equal_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    targets, logprobs = vector(1, -1, 0.5, 2, 0), vector(0.1, -0.2, 0.3, 2, -1).requires_grad_()
    alpha, log_alpha = vector(0.7)[0], torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: critic_loss(q, targets), (q,))
    assert torch.autograd.gradcheck(lambda q, logprobs: actor_loss(q.amin(0), logprobs, alpha), (q, logprobs))
    assert torch.autograd.gradcheck(lambda q, logprobs: actor_loss(q.mean(0), logprobs, alpha), (q, logprobs))
    assert torch.autograd.gradcheck(lambda a: alpha_loss(a, vector(0.7)[0], -1.5), (log_alpha,))


def test_the_policys_gradient_through_its_draw_and_the_least_of_the_critics_equals_finite_differences() -> None:
    rng = torch.Generator().manual_seed(1)
    obs, noise, slopes, weight = (
        torch.randn(size, generator=rng, dtype=torch.float64) for size in ((6, 3), (6, 2), (3, 2), (4, 3))
    )

    def loss(weight: Tensor) -> Tensor:
        actions, logprobs = TanhNormalHead(2).sample_with_logprob(0.5 * obs @ weight.T, noise)
        return actor_loss((slopes @ actions.T).amin(0), logprobs, vector(0.3)[0])  # of three linear critics

    assert torch.autograd.gradcheck(loss, (weight.requires_grad_(),))


def test_a_policy_that_minimises_the_actor_loss_is_the_softmax_of_the_critic() -> None:
    # Over three actions, E[α log π − Q] is least at π ∝ e^(Q/α), where it is −α log Σ e^(Q/α)
    q, alpha = vector(1.0, 2.0, 0.0), vector(0.7)[0]
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        logprobs = logits.log_softmax(0)
        # The loss is a mean over samples: each action as often as its probability says
        loss = 3 * actor_loss(logprobs.exp() * q, logprobs.exp() * logprobs, alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(0), (q / alpha).softmax(0), atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(-alpha.item() * math.log((q / alpha).exp().sum().item()), abs=1e-6)


def test_the_losses_of_droq_are_those_of_sac() -> None:
    assert set(droq_loss.__all__) == {"actor_loss", "alpha_loss", "critic_loss", "td_target"}
    for name in droq_loss.__all__:
        assert getattr(droq_loss, name) is getattr(sac_loss, name)
