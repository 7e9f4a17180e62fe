"""Advantages, returns and time limits, against rollouts worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete

from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import returns_and_advantages
from fabricrl.data import Batch, RolloutBuffer
from fabricrl.utils.returns import discounted_returns, discounted_sums, explained_variance, gae
from tests.conftest import SINGLE, BareRun, on_ranks
from tests.envs import vectors

# Three steps, γ = λ = 1/2, so γλ = 1/4; every number below is exact in float32.
REWARDS = (1.0, 2.0, 3.0)
VALUES = (2.0, 4.0, 8.0)  # V(s_0), V(s_1), V(s_2)
NEXT_VALUE = 16.0  # V(s_3)
FINAL_VALUE = 32.0  # V of the observation that a time limit cut off

# What happened in which step -> advantages (A_0, A_1, A_2). δ_t = r_t + γ V(s_{t+1}) − V(s_t) without an end gives
#   δ_0 = 1 + 4/2 − 2 = 1      δ_1 = 2 + 8/2 − 4 = 2      δ_2 = 3 + 16/2 − 8 = 3
ROLLOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]] = {
    # A_2 = 3, A_1 = 2 + 3/4 = 2.75, A_0 = 1 + 2.75/4 = 1.6875
    "no end": ((), (), (1.6875, 2.75, 3.0)),
    # δ_0 = 1 − 2 = −1 and nothing of A_1: A_0 = −1
    "terminated in the first step": ((0,), (), (-1.0, 2.75, 3.0)),
    # δ_0 = 1 + 32/2 − 2 = 15 and nothing of A_1: A_0 = 15
    "truncated in the first step": ((), (0,), (15.0, 2.75, 3.0)),
    # δ_1 = 2 − 4 = −2 = A_1, A_0 = 1 − 2/4 = 0.5
    "terminated in the middle": ((1,), (), (0.5, -2.0, 3.0)),
    # δ_1 = 2 + 16 − 4 = 14 = A_1, A_0 = 1 + 14/4 = 4.5
    "truncated in the middle": ((), (1,), (4.5, 14.0, 3.0)),
    # A_2 = 3 − 8 = −5, A_1 = 2 − 5/4 = 0.75, A_0 = 1 + 0.75/4 = 1.1875
    "terminated in the last step": ((2,), (), (1.1875, 0.75, -5.0)),
    # A_2 = 3 + 16 − 8 = 11, A_1 = 2 + 11/4 = 4.75, A_0 = 1 + 4.75/4 = 2.1875
    "truncated in the last step": ((), (2,), (2.1875, 4.75, 11.0)),
    # The task ended, so there is no value left, whatever the clock says: as if terminated alone
    "both in the middle": ((1,), (1,), (0.5, -2.0, 3.0)),
    # A_0 = 1 − 2 = −1, A_1 = 2 + 16 − 4 = 14, A_2 = 3 − 8 = −5: three episodes of one step
    "an end in every step": ((0, 2), (1,), (-1.0, 14.0, -5.0)),
}


def flags(steps: tuple[int, ...]) -> np.ndarray:
    return np.isin(np.arange(3), steps)


def value_is_first_number(norm_reward: bool = False) -> PPOAgent:
    """An agent with V(s) = s_0, exactly."""
    agent = PPOAgent(vectors(2), Discrete(2), hidden_sizes=(), norm_reward=norm_reward)
    with torch.no_grad():
        agent.critic.out.weight.copy_(torch.tensor([[1.0, 0.0]]))
        agent.critic.out.bias.zero_()
    return agent


def data_of(agent: PPOAgent, rb: RolloutBuffer, **settings: Any) -> Batch:
    """Training data that the script makes of a rollout."""
    return returns_and_advantages(BareRun(PPOArgs(**settings)), agent, agent, rb)


def filled_buffer() -> RolloutBuffer:
    """One environment for each row of ROLLOUTS; the observations carry the values."""
    num_envs = len(ROLLOUTS)
    rb = RolloutBuffer(3, num_envs, vectors(2), 1, torch.int64)
    observe = lambda value: np.tile(np.array([value, -1.0], np.float32), (num_envs, 1))  # noqa: E731
    rb.start(observe(VALUES[0]))
    for t, value in enumerate((*VALUES[1:], NEXT_VALUE)):
        terminated = np.array([flags(ends)[t] for ends, _, _ in ROLLOUTS.values()])
        truncated = np.array([flags(limits)[t] for _, limits, _ in ROLLOUTS.values()])
        infos: dict[str, Any] = {"final_obs": np.full(num_envs, None, dtype=object)}
        for env in np.flatnonzero(terminated | truncated):
            infos["final_obs"][env] = np.array([FINAL_VALUE, -1.0], np.float32)
        actions = np.zeros((num_envs, 1), np.int64)
        rb.add(t, actions, observe(value), np.full(num_envs, REWARDS[t]), terminated, truncated, infos)
    return rb


def test_gae_equals_the_hand_computed_rollouts_once_time_limits_are_in_the_rewards() -> None:
    expected = torch.tensor([advantages for _, _, advantages in ROLLOUTS.values()]).T
    rewards = torch.tensor(REWARDS)[:, None].repeat(1, len(ROLLOUTS))
    dones = torch.zeros_like(rewards, dtype=torch.bool)
    for env, (terminated, truncated, _) in enumerate(ROLLOUTS.values()):
        dones[:, env] = torch.from_numpy(flags(terminated) | flags(truncated))
        rewards[:, env] += 0.5 * FINAL_VALUE * torch.from_numpy(flags(truncated) & ~flags(terminated))
    values = torch.tensor(VALUES)[:, None].repeat(1, len(ROLLOUTS))
    advantages, returns = gae(rewards, values, dones, torch.full((len(ROLLOUTS),), NEXT_VALUE), 0.5, 0.5)
    assert torch.equal(advantages, expected)
    assert torch.equal(returns, expected + values)  # R_t = A_t + V(s_t)


def test_a_rollout_becomes_the_hand_computed_advantages_and_returns() -> None:
    data = data_of(value_is_first_number(), filled_buffer(), gamma=0.5, gae_lambda=0.5)
    advantages = data.advantages.view(3, -1).T
    returns = data.returns.view(3, -1).T
    for (name, (_, _, expected)), a, r in zip(ROLLOUTS.items(), advantages, returns, strict=True):
        assert a.tolist() == list(expected), name
        assert r.tolist() == [x + v for x, v in zip(expected, VALUES, strict=True)], name


def test_without_bootstrapping_a_time_limit_counts_as_the_end_of_the_task() -> None:
    agent, rb = value_is_first_number(), filled_buffer()
    data = data_of(agent, rb, gamma=0.5, gae_lambda=0.5, bootstrap_truncated=False)
    by_name = dict(zip(ROLLOUTS, data.advantages.view(3, -1).T.tolist(), strict=True))
    for when in ("in the first step", "in the middle", "in the last step"):
        assert by_name[f"truncated {when}"] == by_name[f"terminated {when}"]


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstrap", "target"),
    [
        # One step from V(s) = 2 with reward 1, γ = 1/2: what the critic is asked to learn
        (False, False, True, 9.0),  # r + γ V(next) = 1 + 16/2
        (True, False, True, 1.0),  # r alone: the task is over
        (False, True, True, 17.0),  # r + γ V(final) = 1 + 32/2, not the value of the next episode's start
        (True, True, True, 1.0),  # over is over
        (False, False, False, 9.0),
        (True, False, False, 1.0),
        (False, True, False, 1.0),
        (True, True, False, 1.0),
    ],
)
def test_time_limit_truth_table(terminated: bool, truncated: bool, bootstrap: bool, target: float) -> None:
    rb = RolloutBuffer(1, 1, vectors(2), 1, torch.int64)
    rb.start(np.array([[2.0, 0.0]]))
    final = np.array([np.array([FINAL_VALUE, 0.0], np.float32), None], dtype=object)[:1]
    infos = {"final_obs": final} if terminated or truncated else {}
    step = np.array([[NEXT_VALUE, 0.0]]), np.array([1.0]), np.array([terminated]), np.array([truncated])
    rb.add(0, np.zeros((1, 1), np.int64), *step, infos)
    data = data_of(value_is_first_number(), rb, gamma=0.5, gae_lambda=0.5, bootstrap_truncated=bootstrap)
    assert data.returns.item() == target


def test_rewards_are_scaled_before_the_value_of_a_time_limit_is_added() -> None:
    # V is learned in units of scaled rewards, so that dividing it by their deviation again would be wrong.
    agent, rb = value_is_first_number(norm_reward=True), filled_buffer()
    data = data_of(agent, rb, gamma=0.5, gae_lambda=0.0, norm_reward=True)  # λ = 0: A_t = δ_t
    # Discounted sums of (1, 2, 3) are (1, 2.5, 4.25) without an end, and begin again after one; the scale is their
    # deviation over all environments, this rollout's included.
    sums = []
    for terminated, truncated, _ in ROLLOUTS.values():
        running = 0.0
        for t, reward in enumerate(REWARDS):
            running = reward + 0.5 * running
            sums.append(running)
            running *= not (flags(terminated) | flags(truncated))[t]
    scale = np.std(sums)
    column = list(ROLLOUTS).index("truncated in the middle")
    advantages = data.advantages.view(3, -1)[:, column].numpy()
    expected = [1 / scale + 2 - 2, 2 / scale + 16 - 4, 3 / scale + 8 - 8]
    np.testing.assert_allclose(advantages, expected, rtol=1e-5)
    assert torch.equal(rb.rewards[:, 0], torch.tensor(REWARDS))  # statistics of episodes still see the raw rewards


def test_lambda_one_gives_discounted_returns_and_lambda_zero_one_step_errors() -> None:
    torch.manual_seed(1)
    rewards, values, last = torch.randn(20, 3), torch.randn(20, 3), torch.randn(3)
    dones = torch.rand(20, 3) < 0.2
    _, returns = gae(rewards, values, dones, last, 0.9, 1.0)
    expected = last.clone()
    for t in reversed(range(20)):
        expected = rewards[t] + 0.9 * torch.where(dones[t], 0.0, expected)
        torch.testing.assert_close(returns[t], expected)
    advantages, _ = gae(rewards, values, dones, last, 0.9, 0.0)
    following = torch.cat((values[1:], last[None]))
    torch.testing.assert_close(advantages, rewards + 0.9 * torch.where(dones, 0.0, following) - values)


def test_discounted_sums_by_hand() -> None:
    # A_t = δ_t + c_t A_{t+1}: 4, 2 + 4/2 = 4, 1 + 0 · 4 = 1 in column 0; 4, 2 + 0 = 2, 1 + 2 · 2 = 5 in column 1
    sums = discounted_sums(torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]), torch.tensor([[0, 2], [0.5, 0], [9, 9]]))
    assert sums.T.tolist() == [[1.0, 4.0, 4.0], [5.0, 2.0, 4.0]]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 9, 13, 127, 128, 2048])
def test_discounted_sums_are_those_of_one_step_after_the_other(steps: int) -> None:
    deltas = torch.randn(steps, 5, dtype=torch.float64)
    decay = 0.95 * (torch.rand(steps, 5) > 0.1).double()
    given, running, expected = (deltas.clone(), decay.clone()), torch.zeros(5, dtype=torch.float64), []
    for delta, factor in zip(deltas.flip(0), decay.flip(0), strict=True):
        running = delta + factor * running
        expected.append(running)
    torch.testing.assert_close(discounted_sums(deltas, decay), torch.stack(expected).flip(0))
    assert torch.equal(deltas, given[0])
    assert torch.equal(decay, given[1])


def test_discounted_returns_by_hand_with_an_end_in_the_first_a_middle_and_the_last_step() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]])
    dones = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    returns, last = discounted_returns(rewards, dones, torch.tensor([8.0, 8.0, 8.0, 8.0]), 0.5)
    # G_0 = 1 + 8/2 = 5 always, since the end of a step comes after its reward;
    # then 2 + 5/2 = 4.5 and 4 + 4.5/2 = 6.25; after an end in step 0: 2, then 4 + 2/2 = 5; after one in step 1: 4
    assert returns.T.tolist() == [[5.0, 4.5, 6.25], [5.0, 2.0, 5.0], [5.0, 4.5, 4.0], [5.0, 4.5, 6.25]]
    assert last.tolist() == [6.25, 5.0, 4.0, 0.0]


def test_discounted_returns_of_two_rollouts_are_those_of_one_long_rollout() -> None:
    torch.manual_seed(2)
    rewards, dones = torch.randn(12, 3), torch.rand(12, 3) < 0.3
    whole, end = discounted_returns(rewards, dones, torch.zeros(3), 0.9)
    first, between = discounted_returns(rewards[:5], dones[:5], torch.zeros(3), 0.9)
    second, last = discounted_returns(rewards[5:], dones[5:], between, 0.9)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(last, end)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_the_mean() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(SINGLE, returns, returns).item() == 1.0
    assert explained_variance(SINGLE, torch.full((4,), 3.0), returns).item() == 0.0
    # Errors (1, −1, 1, −1) have variance 1, returns have (4 + 1 + 0 + 9)/4 = 3.5: 1 − 1/3.5
    assert explained_variance(SINGLE, returns + torch.tensor([1.0, -1.0, 1.0, -1.0]), returns).item() == pytest.approx(
        5 / 7
    )
    assert explained_variance(SINGLE, returns, torch.ones(4)).isnan()


def test_explained_variance_is_that_of_the_rows_that_count() -> None:
    returns, values = torch.tensor([1.0, 2.0, 3.0, 6.0, 50.0]), torch.tensor([2.0, 1.0, 4.0, 5.0, -70.0])
    counts = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    assert explained_variance(SINGLE, values, returns, counts).item() == pytest.approx(5 / 7)


def test_explained_variance_of_several_ranks_is_that_of_one_which_has_all_their_rows() -> None:
    values, returns, counts = torch.randn(2, 8), 5 * torch.randn(2, 8), (torch.rand(2, 8) < 0.7).float()

    def explained(fabric: Any) -> float:
        rank = fabric.global_rank
        return explained_variance(fabric, values[rank], returns[rank] + 9 * rank, counts[rank]).item()

    both = returns + 9 * torch.arange(2)[:, None]
    whole = explained_variance(SINGLE, values.flatten(), both.flatten(), counts.flatten()).item()
    assert on_ranks(2, explained) == [pytest.approx(whole)] * 2
