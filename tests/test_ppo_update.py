"""One whole update of PPO against a plain one, written here from the paper with torch.distributions and torch.optim."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.agent import PPOAgent, make_agent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import METRICS, returns_and_advantages, rollout, shaped_rewards, train_epoch
from fabricrl.data import Batch, RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.seeding import generators
from tests.conftest import BareRun
from tests.envs import vectors

STEPS, ENVS = 16, 2
ENVIRONMENTS = {
    "Discrete": ("tests.envs:Deterministic-v0", '{"length": 5, "truncate": true}'),
    "Box": ("tests.envs:IdentityBox-v0", "{}"),
    "MultiDiscrete": ("tests.envs:IdentityMultiDiscrete-v0", "{}"),
    "MultiBinary": ("tests.envs:IdentityMultiBinary-v0", "{}"),
}


def played(kind: str, tmp_path: Path, **changes: Any) -> tuple[BareRun, PPOAgent, RolloutBuffer]:
    """A run, its agent and a rollout of it."""
    env_id, env_kwargs = ENVIRONMENTS[kind]
    settings: dict[str, Any] = {"num_steps": STEPS, "num_envs": ENVS, "hidden_sizes": (8, 8), "learning_rate": 1 / 64}
    args = PPOArgs(env_id=env_id, env_kwargs=env_kwargs, **(settings | {"num_minibatches": 4} | changes))
    envs = make_envs(args, 0, tmp_path)
    torch.manual_seed(args.seed)
    agent = make_agent(args, envs)
    rb = RolloutBuffer(STEPS, ENVS, envs.single_observation_space, agent.head.num_actions, agent.head.dtype)
    rb.start(envs.reset(seed=1)[0])
    run = BareRun(args, action_space=envs.single_action_space)
    rollout(run, agent, envs, rb)
    envs.close()
    return run, agent, rb


def train(run: BareRun, agent: PPOAgent, data: Batch, seed: int = 3) -> dict[str, Tensor]:
    """The script's update, and what it has noted of each minibatch, [K] by name."""
    args = run.args
    model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
    step = run.compiled(partial(ppo.update, run, model, optimizer))
    run.train_rng.manual_seed(seed)
    coefs = run.coefs(args.clip_coef, args.ent_coef)
    metrics = ppo.train(run, run.captured(partial(train_epoch, step, args.norm_adv)), data, *coefs)
    return dict(zip(METRICS, metrics.unbind(1), strict=True))


class Updated:
    """Trains on a rollout, in float64 so that differences are those of formulas."""

    def __init__(self, run: BareRun, agent: PPOAgent, rb: RolloutBuffer) -> None:
        data = returns_and_advantages(run, agent, agent, rb)
        agent.double()
        columns = {n: c.double() if c is not None and c.is_floating_point() else c for n, c in data.columns.items()}
        with torch.no_grad():  # again in float64, so that the first ratios are exactly 1
            columns["logprobs"], _, columns["values"] = agent(Batch(**columns))
        self.data, self.before = Batch(**columns), [parameter.detach().clone() for parameter in agent.parameters()]
        self.metrics = train(run, agent, self.data)


def log_probability_and_entropy(agent: PPOAgent, params: Tensor, actions: Tensor, space: Space) -> tuple:
    if isinstance(space, Box):
        normal = Normal(params, agent.head.log_std.exp())
        return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)
    if isinstance(space, MultiBinary):
        bits = Bernoulli(logits=params)
        return bits.log_prob(actions).sum(-1), bits.entropy().sum(-1)
    choices = [int(space.n)] if isinstance(space, Discrete) else space.nvec.tolist()
    parts = [Categorical(logits=logits) for logits in params.split(choices, -1)]
    logprob = sum(part.log_prob(actions[:, i]) for i, part in enumerate(parts))
    return logprob, sum(part.entropy() for part in parts)


def plain_update(agent: PPOAgent, space: Space, data: Batch, args: PPOArgs) -> list[dict[str, float]]:
    """PPO's inner loop as a textbook has it: one parameter group of many tensors, one minibatch after the other."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    rng, size, history = torch.Generator().manual_seed(3), STEPS * ENVS // args.num_minibatches, []
    for _ in range(args.update_epochs):
        order = torch.randperm(STEPS * ENVS, generator=rng)
        for start in range(0, STEPS * ENVS, size):
            rows = order[start : start + size]
            batch = {name: column[rows] for name, column in data.columns.items() if column is not None}
            advantages = batch["advantages"]
            if args.norm_adv:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            logprobs, entropy = log_probability_and_entropy(agent, agent.actor(batch["obs"]), batch["actions"], space)
            ratio = (logprobs - batch["logprobs"]).exp()
            surrogate = advantages * ratio
            clipped = advantages * torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = -torch.minimum(surrogate, clipped).mean()
            values = agent.critic(batch["obs"])[:, 0]
            v_error = (values - batch["returns"]) ** 2
            if args.clip_vloss:
                change = torch.clip(values - batch["values"], -args.clip_coef, args.clip_coef)
                v_error = torch.maximum(v_error, (batch["values"] + change - batch["returns"]) ** 2)
            v_loss = v_error.mean() / 2
            loss = pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * v_loss
            optimizer.zero_grad()
            loss.backward()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            kl = ((ratio - 1) - (logprobs - batch["logprobs"])).mean().item()
            outside = ((ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)).double().mean().item()
            numbers = {"policy_loss": pg_loss.item(), "value_loss": v_loss.item(), "entropy": entropy.mean().item()}
            old_kl = -(logprobs - batch["logprobs"]).mean().item()
            history.append(numbers | {"approx_kl": kl, "clipfrac": outside, "old_approx_kl": old_kl})
        if args.target_kl is not None and history[-1]["approx_kl"] > args.target_kl:
            break
    return history


SPACES = {
    "Discrete": Discrete(3),
    "Box": Box(-1.0, 1.0, (2,)),
    "MultiDiscrete": MultiDiscrete([2, 3]),
    "MultiBinary": MultiBinary(3),
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in SPACES),
        ("Discrete", {"norm_adv": False, "clip_vloss": False, "max_grad_norm": 0.0}),
        ("Discrete", {"clip_coef": 0.03, "ent_coef": 0.3, "vf_coef": 2.0, "max_grad_norm": 0.1, "num_minibatches": 2}),
        ("Box", {"target_kl": 0.003, "update_epochs": 10, "num_minibatches": 1, "activation": "relu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_an_update_equals_the_plain_one(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run, agent, rb = played(kind, tmp_path, **changes)
    args, updated = run.args, Updated(run, agent, rb)
    plain = PPOAgent(vectors(rb.obs.shape[-1]), SPACES[kind], args.hidden_sizes, args.activation).double()
    with torch.no_grad():
        for parameter, before in zip(plain.parameters(), updated.before, strict=True):
            parameter.copy_(before)
    history = plain_update(plain, SPACES[kind], updated.data, args)
    moved = 0.0
    parameters = zip(agent.named_parameters(), plain.parameters(), updated.before, strict=True)
    for (name, ours), theirs, before in parameters:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)
        moved = max(moved, (theirs - before).abs().max().item())
    assert moved > 0.01
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "old_approx_kl"):
        theirs = torch.tensor([numbers[name] for numbers in history], dtype=torch.float64)  # of each, in order
        torch.testing.assert_close(updated.metrics[f"losses/{name}"], theirs, rtol=1e-6, atol=1e-9, msg=name)
    if args.target_kl is not None:
        assert 1 < len(history) < args.update_epochs  # it did stop, and not at once


def test_returns_and_advantages_equal_the_plain_ones(tmp_path: Path) -> None:
    run, agent, rb = played("Discrete", tmp_path)
    args, data = run.args, returns_and_advantages(run, agent, agent, rb)
    with torch.no_grad():
        values = agent.critic(rb.obs).squeeze(-1).double()  # [T + 1, N]
        logits = agent.actor(rb.obs[:-1])
    final_values = {}
    for t, env, final in zip(*rb.truncated_episodes(), strict=True):
        final_values[int(t), int(env)] = agent.critic(final).item()
    advantages = torch.zeros(STEPS, ENVS, dtype=torch.float64)
    for env in range(ENVS):
        for t in range(STEPS):  # Eq. 16 as a sum: A_t = Σ_k (γλ)^k δ_{t+k}, up to the episode's or the rollout's end
            for k in range(STEPS - t):
                now = t + k
                following = values[now + 1, env].item()
                if rb.dones[now, env]:
                    following = final_values.get((now, env), 0.0)
                delta = rb.rewards[now, env].item() + args.gamma * following - values[now, env].item()
                advantages[t, env] += (args.gamma * args.gae_lambda) ** k * delta
                if rb.dones[now, env]:
                    break
    assert len(final_values) == ENVS * (STEPS // 5)
    torch.testing.assert_close(data.advantages.view(STEPS, ENVS).double(), advantages, rtol=1e-5, atol=1e-5)
    returns = data.returns.view(STEPS, ENVS).double()
    torch.testing.assert_close(returns, advantages + values[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.values.view(STEPS, ENVS), values[:-1].float())
    logprobs = Categorical(logits=logits).log_prob(rb.actions[..., 0])
    torch.testing.assert_close(data.logprobs.view(STEPS, ENVS), logprobs)
    assert torch.equal(data.obs.view(STEPS, ENVS, -1), rb.obs[:-1])  # rows of different columns belong together
    assert torch.equal(data.actions.view(STEPS, ENVS, -1), rb.actions)
    assert data.valid is None


def test_log_probabilities_and_values_are_those_of_the_normaliser_that_acted(tmp_path: Path) -> None:
    run, agent, rb = played("Discrete", tmp_path, norm_obs=True, gae_lambda=0.0)
    agent.obs_normalizer.update(5 + 3 * torch.randn(100, 3))
    data = returns_and_advantages(run, agent, agent, rb)
    normalised = (rb.obs - agent.obs_normalizer.mean) / (agent.obs_normalizer.var + 1e-8).sqrt()
    torch.testing.assert_close(data.obs.view(STEPS, ENVS, -1), normalised[:-1].float())
    torch.testing.assert_close(data.values.view(STEPS, ENVS), agent.value(rb.obs[:-1]))
    logits = agent.actor(normalised[:-1].float())
    logprobs = Categorical(logits=logits).log_prob(rb.actions[..., 0])
    torch.testing.assert_close(data.logprobs.view(STEPS, ENVS), logprobs)
    following = agent.value(rb.obs[1:])  # also of what follows the last step, and of final observations
    for t, env, final_obs in zip(*rb.truncated_episodes(), strict=True):
        following[t, env] = agent.value(final_obs)
    deltas = rb.rewards + run.args.gamma * following - agent.value(rb.obs[:-1])
    torch.testing.assert_close(data.advantages.view(STEPS, ENVS), deltas)
    assert not rb.dones[-1].all()


def test_the_discounted_return_that_scales_rewards_begins_anew_with_each_life() -> None:
    args = PPOArgs(num_envs=1, num_steps=3, num_minibatches=1, norm_reward=True)
    agent = PPOAgent(vectors(2), Discrete(2), norm_reward=True)
    rb = RolloutBuffer(3, 1, vectors(2), 1, torch.int64)
    rb.start(np.zeros((1, 2)))
    no = np.zeros(1, bool)
    for t in range(3):
        rb.add(t, np.zeros((1, 1)), np.zeros((1, 2)), np.ones(1), no, no, {"life_lost": np.ones(1, bool)})
    shaped_rewards(BareRun(args), agent, rb)
    assert agent.reward_normalizer.mean.tolist() == [1.0]  # not 1, 1 + γ, ...
    assert agent.reward_normalizer.count == 3


def test_the_first_minibatch_sees_ratio_one_and_an_almost_uniform_policy(tmp_path: Path) -> None:
    metrics = Updated(*played("Discrete", tmp_path, update_epochs=1)).metrics
    assert abs(metrics["losses/old_approx_kl"][0]) < 1e-12  # [K]: mean log ratio of the first minibatch
    assert abs(metrics["losses/old_approx_kl"][1]).max() > 1e-4  # by the second, the policy has moved
    # The last layer of the policy starts with gain 0.01: all three actions are about equally likely
    assert metrics["losses/entropy"][0].item() == pytest.approx(math.log(3), abs=1e-3)
    # −mean(A) of normalised advantages
    assert metrics["losses/policy_loss"][0].item() == pytest.approx(0.0, abs=1e-9)


def test_target_kl_stops_the_epochs_once_it_is_passed(tmp_path: Path) -> None:
    def minibatches(target_kl: float | None) -> int:
        updated = Updated(*played("Discrete", tmp_path, target_kl=target_kl, update_epochs=6))
        return len(updated.metrics["losses/policy_loss"])

    assert minibatches(None) == 24
    assert minibatches(1e9) == 24
    assert minibatches(1e-9) == 4  # after the first epoch
    kls = Updated(*played("Discrete", tmp_path, update_epochs=1)).metrics["losses/approx_kl"]
    assert kls[-1] > 1.1 * kls.mean()
    assert minibatches(float(kls[-1] + kls.mean()) / 2) == 4  # by the last minibatch, not by the mean of all


@pytest.mark.parametrize("averaged", [0.0, 1.0])
def test_ranks_stop_by_the_mean_of_their_kls(averaged: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their own, or one waits for the other; here the mean is said to be nothing, or much."""

    def average(fabric: Any, optimizer: Adam, metrics: Tensor) -> Tensor:
        return metrics.detach().index_fill(0, torch.tensor(METRICS.index("losses/approx_kl")), averaged)

    monkeypatch.setattr(ppo, "average_gradients", average)
    target = 1e-9 if averaged == 0 else 0.5  # the rank's own KL lies between
    updated = Updated(*played("Discrete", tmp_path, target_kl=target, update_epochs=3))
    assert len(updated.metrics["losses/policy_loss"]) == (12 if averaged == 0 else 4)


def test_a_rollout_leaves_the_generator_of_training_alone(tmp_path: Path) -> None:
    run, *_ = played("Discrete", tmp_path)
    act_rng, train_rng = generators(run.args.seed, 0)
    assert torch.equal(run.train_rng.get_state(), train_rng.get_state())
    assert not torch.equal(run.act_rng.get_state(), act_rng.get_state())


def test_a_copy_that_acts_elsewhere_has_the_newest_weights() -> None:
    run, agent = BareRun(PPOArgs()), PPOAgent(vectors(2), Discrete(2))
    assert run.player(agent) is agent
    run.player_device = torch.device("cpu", 0)  # to torch another one than "cpu"
    for _ in range(2):
        with torch.no_grad():
            agent.actor.out.bias += 1
        player = run.player(agent)
        assert player is not agent
        assert torch.equal(player.actor.out.bias, agent.actor.out.bias)


def test_the_update_visits_every_row_once_an_epoch(tmp_path: Path) -> None:
    updated = Updated(*played("Discrete", tmp_path, update_epochs=1, norm_adv=False, learning_rate=1e-12))
    # The policy stands still, so the mean over all minibatches is the one over all rows, each counted once: −mean(A)
    mean = -updated.data.advantages.mean()
    torch.testing.assert_close(updated.metrics["losses/policy_loss"].mean(), mean, rtol=1e-8, atol=1e-8)


def gradient(run: BareRun, agent: PPOAgent, batch: Batch, ent_coef: float) -> Tensor:
    """The one that an update on this batch steps by."""
    ppo.update(run, *run.setup(agent, Adam(agent.parameters(), 0.0)), batch, 0.2, ent_coef)
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])


def test_entropy_and_value_coefficients_weigh_their_part_of_the_loss(tmp_path: Path) -> None:
    """Gradients are linear in the coefficients, which tells their parts apart."""
    parts = {}
    for vf_coef, ent_coef, ent_weight in ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.5, 1.0), (0.7, 0.5, 0.3)):
        run, agent, rb = played("Discrete", tmp_path, vf_coef=vf_coef, ent_coef=ent_coef)
        batch = returns_and_advantages(run, agent, agent, rb).with_columns(weights=None)
        parts[vf_coef, ent_weight] = gradient(run, agent, batch, ent_weight)
    policy = parts[0.0, 0.0]
    value, entropy = parts[1.0, 0.0] - policy, parts[0.0, 1.0] - policy
    torch.testing.assert_close(parts[0.7, 0.3], policy + 0.7 * value + 0.3 * entropy)
    actor = sum(parameter.numel() for parameter in agent.actor.parameters())
    assert [bool(part[:actor].any()) for part in (policy, value, entropy)] == [True, False, True]
    assert [bool(part[actor:].any()) for part in (policy, value, entropy)] == [False, True, False]


def test_rows_that_do_not_count_move_nothing(tmp_path: Path) -> None:
    """Their contents do not matter, and the weights of the other rows add up to one."""
    run, agent, rb = played("Box", tmp_path)
    data = returns_and_advantages(run, agent, agent, rb)
    batch = Batch(**{name: column for name, column in data.columns.items() if name != "counts" and column is not None})
    counted = torch.arange(len(batch)) % 3 > 0
    others = gradient(run, agent, batch[counted].with_columns(weights=None), 0.3)
    assert others.any()
    for filler in (0.0, 100.0):
        for column in filter(torch.is_tensor, batch.columns.values()):
            column[~counted] = filler
        filled = batch.with_columns(weights=counted.float() / counted.sum())
        torch.testing.assert_close(gradient(run, agent, filled, 0.3), others)


def test_metrics_are_means_over_the_rows_that_count(tmp_path: Path) -> None:
    """Or `--target-kl` would stop by rows that only reset an environment."""
    run, agent, rb = played("Discrete", tmp_path)
    batch = returns_and_advantages(run, agent, agent, rb).with_columns(weights=None)
    batch = batch.with_columns(logprobs=batch.logprobs - torch.linspace(-0.5, 0.5, len(batch)))
    counted = torch.arange(len(batch)) % 3 > 0
    step = partial(ppo.update, run, *run.setup(agent, Adam(agent.parameters(), 0.0)))
    of_some = step(batch[counted].with_columns(weights=None), 0.2, 0.0)
    assert of_some[METRICS.index("losses/approx_kl")] > 0.01
    weighted = step(batch.with_columns(weights=counted.float() / counted.sum()), 0.2, 0.0)
    torch.testing.assert_close(weighted, of_some)


def test_the_first_ratio_is_one_in_half_precision_too(tmp_path: Path) -> None:
    """Fabric rounds what it finds among the inputs of a module, and old log-probabilities are not to be."""
    run, agent, rb = played("Box", tmp_path, update_epochs=1, num_minibatches=1, precision="bf16-mixed")
    model, optimizer = run.setup(agent, Adam(agent.parameters(), run.args.learning_rate))
    data = returns_and_advantages(run, model, agent, rb)
    assert {data.logprobs.dtype, data.values.dtype, data.returns.dtype} == {torch.float32}
    epoch = partial(train_epoch, partial(ppo.update, run, model, optimizer), run.args.norm_adv)
    (metrics,) = ppo.train(run, epoch, data, run.args.clip_coef, run.args.ent_coef)
    assert metrics[METRICS.index("losses/approx_kl")].abs() < 1e-9
    assert metrics.dtype == torch.float32


def test_truncated_episodes_bootstrap_in_the_precision_of_the_run(tmp_path: Path) -> None:
    """As rollouts do that are cut off."""
    run, agent, rb = played("Discrete", tmp_path, precision="bf16-mixed", gae_lambda=0.0)
    t, env, final_obs = rb.truncated_episodes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        final_values = agent.value(final_obs).float()
    data = returns_and_advantages(run, agent, agent, rb)
    found = data.returns.view(STEPS, ENVS)[t, env] - rb.rewards[t, env]
    torch.testing.assert_close(found, run.args.gamma * final_values)
    assert (final_values - agent.value(final_obs)).abs().max() > 1e-4
