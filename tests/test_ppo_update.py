"""One whole update of PPO against a plain one, written here from the paper with torch.distributions and torch.optim."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from lightning.fabric import Fabric
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import Objective, returns_and_advantages, rollout, train
from fabricrl.algos.ppo.utils import make_agent
from fabricrl.data.buffers import RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.utils.metric import Stopwatch
from fabricrl.utils.model import FlatParameters
from tests.conftest import SINGLE
from tests.envs import vectors

STEPS, ENVS = 16, 2
ENVIRONMENTS = {
    "Discrete": ("tests.envs:Deterministic-v0", '{"length": 5, "truncate": true}'),
    "Box": ("tests.envs:IdentityBox-v0", "{}"),
    "MultiDiscrete": ("tests.envs:IdentityMultiDiscrete-v0", "{}"),
    "MultiBinary": ("tests.envs:IdentityMultiBinary-v0", "{}"),
}


def played(kind: str, tmp_path: Path, **changes: Any) -> tuple[PPOArgs, PPOAgent, RolloutBuffer]:
    """An agent and a rollout of it."""
    env_id, env_kwargs = ENVIRONMENTS[kind]
    settings: dict[str, Any] = {"num_steps": STEPS, "num_envs": ENVS, "hidden_sizes": (8, 8), "learning_rate": 0.02}
    args = PPOArgs(env_id=env_id, env_kwargs=env_kwargs, **(settings | {"num_minibatches": 4} | changes))
    envs = make_envs(args, 0, tmp_path)
    torch.manual_seed(args.seed)
    agent = make_agent(args, envs)
    rb = RolloutBuffer(STEPS, ENVS, envs.single_observation_space, agent.head.num_actions, agent.head.dtype)
    rb.start(envs.reset(seed=1)[0])
    rollout(agent, envs, rb, torch.Generator().manual_seed(2), Stopwatch("act", "env"))
    envs.close()
    return args, agent, rb


class Updated:
    """What `train` made of a rollout, in float64 so that differences are those of formulas."""

    def __init__(self, args: PPOArgs, agent: PPOAgent, rb: RolloutBuffer, ent_coef: float | None = None) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        data, _ = returns_and_advantages(agent, rb, torch.zeros(ENVS), args, fabric)
        agent.double()
        self.data = {name: v.double() if v.is_floating_point() else v for name, v in data.items()}
        with torch.no_grad():  # again in float64, so that the first ratios are exactly 1
            self.data["logprobs"], _, self.data["values"] = agent(self.data["obs"], self.data["actions"])
        self.before = [parameter.detach().clone() for parameter in agent.parameters()]
        objective = fabric.setup_module(Objective(agent, args))
        flat = FlatParameters(agent)
        adam = torch.optim.Adam([flat.vector], lr=args.learning_rate, eps=1e-5, fused=True)
        optimizer = fabric.setup_optimizers(adam)
        rng = torch.Generator().manual_seed(3)
        coefficient = args.ent_coef if ent_coef is None else ent_coef
        self.metrics = train(fabric, objective, flat, optimizer, self.data, rng, args, args.clip_coef, coefficient)


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


def plain_update(agent: PPOAgent, space: Space, data: dict[str, Tensor], args: PPOArgs) -> list[dict[str, float]]:
    """PPO's inner loop as a textbook has it: one parameter group of many tensors, one minibatch after the other."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    rng, size, history = torch.Generator().manual_seed(3), STEPS * ENVS // args.num_minibatches, []
    for _ in range(args.update_epochs):
        order = torch.randperm(STEPS * ENVS, generator=rng)
        for start in range(0, STEPS * ENVS, size):
            rows = order[start : start + size]
            batch = {name: column[rows] for name, column in data.items()}
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
    args, agent, rb = played(kind, tmp_path, **changes)
    updated = Updated(args, agent, rb)
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
    for name in ("policy_loss", "value_loss", "entropy"):  # of every minibatch, in order
        theirs = torch.tensor([numbers[name] for numbers in history], dtype=torch.float64)
        torch.testing.assert_close(updated.metrics[f"losses/{name}"], theirs, msg=name)
    for name in ("approx_kl", "clipfrac", "old_approx_kl"):
        theirs = np.mean([numbers[name] for numbers in history])
        assert updated.metrics[f"losses/{name}"].mean().item() == pytest.approx(theirs, abs=1e-6), name
    if args.target_kl is not None:
        assert 1 < len(history) < args.update_epochs  # it did stop, and not at once


def test_returns_and_advantages_equal_the_plain_ones(tmp_path: Path) -> None:
    args, agent, rb = played("Discrete", tmp_path)
    data, _ = returns_and_advantages(agent, rb, torch.zeros(ENVS), args, SINGLE)
    with torch.no_grad():
        values = agent.critic(rb.obs).squeeze(-1).double()  # [T + 1, N]
        logits = agent.actor(rb.obs[:-1])
    limits = rb.time_limits()
    assert limits is not None
    final_values = {}
    for t, env, final in zip(*limits, strict=True):
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
    torch.testing.assert_close(data["advantages"].view(STEPS, ENVS).double(), advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        data["returns"].view(STEPS, ENVS).double(), advantages + values[:-1], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(data["values"].view(STEPS, ENVS), values[:-1].float())
    logprobs = Categorical(logits=logits).log_prob(rb.actions[..., 0])
    torch.testing.assert_close(data["logprobs"].view(STEPS, ENVS), logprobs)
    assert torch.equal(data["obs"].view(STEPS, ENVS, -1), rb.obs[:-1])  # rows of different columns belong together
    assert torch.equal(data["actions"].view(STEPS, ENVS, -1), rb.actions)


def test_log_probabilities_and_values_are_those_of_the_normaliser_that_acted(tmp_path: Path) -> None:
    args, agent, rb = played("Discrete", tmp_path, norm_obs=True)
    agent.obs_normalizer.update(5 + 3 * torch.randn(100, 3))
    data, _ = returns_and_advantages(agent, rb, torch.zeros(ENVS), args, SINGLE)
    normalised = (rb.obs - agent.obs_normalizer.mean) / (agent.obs_normalizer.var + 1e-8).sqrt()
    torch.testing.assert_close(data["obs"].view(STEPS, ENVS, -1), normalised[:-1].float())
    torch.testing.assert_close(data["values"].view(STEPS, ENVS), agent.value(rb.obs[:-1]))
    logits = agent.actor(normalised[:-1].float())
    logprobs = Categorical(logits=logits).log_prob(rb.actions[..., 0])
    torch.testing.assert_close(data["logprobs"].view(STEPS, ENVS), logprobs)


def test_the_first_minibatch_sees_ratio_one_and_an_almost_uniform_policy(tmp_path: Path) -> None:
    args, agent, rb = played("Discrete", tmp_path, update_epochs=1)
    metrics = Updated(args, agent, rb).metrics
    assert abs(metrics["losses/old_approx_kl"][0]) < 1e-12  # [K]: mean log ratio of the first minibatch
    assert abs(metrics["losses/old_approx_kl"][1]).max() > 1e-4  # by the second, the policy has moved
    # The last layer of the policy starts with gain 0.01: all three actions are about equally likely
    assert metrics["losses/entropy"][0].item() == pytest.approx(math.log(3), abs=1e-3)
    # −mean(A) of normalised advantages
    assert metrics["losses/policy_loss"][0].item() == pytest.approx(0.0, abs=1e-9)


def test_target_kl_stops_the_epochs_once_it_is_passed(tmp_path: Path) -> None:
    def minibatches(target_kl: float | None) -> int:
        args, agent, rb = played("Discrete", tmp_path, target_kl=target_kl, update_epochs=6)
        return len(Updated(args, agent, rb).metrics["losses/policy_loss"])

    assert minibatches(None) == 24
    assert minibatches(1e9) == 24
    assert minibatches(1e-9) == 4  # after the first epoch


def test_the_update_visits_every_row_once_an_epoch(tmp_path: Path) -> None:
    args, agent, rb = played("Discrete", tmp_path, update_epochs=1, norm_adv=False, learning_rate=1e-12)
    updated = Updated(args, agent, rb)
    # The policy stands still, so the mean over all minibatches is the one over all rows, each counted once: −mean(A)
    mean = -updated.data["advantages"].mean()
    torch.testing.assert_close(updated.metrics["losses/policy_loss"].mean(), mean, rtol=1e-8, atol=1e-8)


def test_entropy_and_value_coefficients_weigh_their_part_of_the_loss(tmp_path: Path) -> None:
    args, agent, rb = played("Discrete", tmp_path)
    data, _ = returns_and_advantages(agent, rb, torch.zeros(ENVS), args, SINGLE)
    objective = Objective(agent, PPOArgs(vf_coef=0.7))
    loss, (pg_loss, v_loss, ent_loss), _ = objective(data, 0.2, 0.3)
    torch.testing.assert_close(loss, pg_loss + 0.3 * ent_loss + 0.7 * v_loss)
    assert ent_loss < 0


def test_the_first_ratio_is_one_in_half_precision_too(tmp_path: Path) -> None:
    """Fabric rounds what it finds among the inputs of a module, and old log-probabilities are not to be."""
    args, agent, rb = played("Box", tmp_path, update_epochs=1, num_minibatches=1)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    data, _ = returns_and_advantages(agent, rb, torch.zeros(ENVS), args, fabric)
    objective, flat = fabric.setup_module(Objective(agent, args)), FlatParameters(agent)
    optimizer = fabric.setup_optimizers(torch.optim.Adam([flat.vector]))
    metrics = train(fabric, objective, flat, optimizer, data, torch.Generator(), args, args.clip_coef, args.ent_coef)
    assert metrics["losses/approx_kl"].abs() < 1e-9
