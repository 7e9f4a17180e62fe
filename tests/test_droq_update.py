"""DroQ's whole update against a plain one: Algorithm 2 line by line, with separate networks and masks written out."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from fabricrl.algos.droq import droq
from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.droq.agent import make_agent as build
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.sac.loss import critic_loss
from fabricrl.data import Batch
from fabricrl.models.models import EnsembleMLP
from fabricrl.utils.errors import NonFiniteError
from tests import test_sac_update
from tests.test_sac_update import (
    ACTIONS,
    BATCH,
    OBS,
    OBS_SPACE,
    PARTS,
    PlainSAC,
    assert_half_precision_follows,
    make_batches,
    moved,
    plain_actor,
    rng,
    snapshot,
    use_float64,
)


class Training(test_sac_update.Training):
    """As there, by the functions of DroQ."""

    script = droq

    def train(self, batches: Batch, number: int, seed: int = 3) -> dict[str, Tensor]:
        """Batches of an iteration of `number` environment steps; the last ones are the actor's."""
        self.run.train_rng.manual_seed(seed)
        count, metrics = len(batches) - number, []
        for step, rows in enumerate(rows_of(count, number)):
            of_step = batches[[*rows, count + step]]
            metrics.append(droq.train(self.run, self.learner, self.step_critics, self.step_actor, of_step))
        return self.noted(*metrics)


def rows_of(count: int, steps: int) -> list[range]:
    """The updates of each environment step, numbered from 0."""
    return [range(count * step // steps, count * (step + 1) // steps) for step in range(steps)]


@pytest.mark.parametrize(("count", "steps"), [(20, 1), (12, 3), (7, 3), (1, 4), (0, 1), (0, 0)])
def test_updates_are_shared_out_over_environment_steps(count: int, steps: int) -> None:
    assert droq.spread_updates(count, steps) == [len(rows) for rows in rows_of(count, steps)]
    assert sum(droq.spread_updates(count, steps)) == count


def make_args(**changes: Any) -> DroQArgs:
    settings: dict[str, Any] = {"hidden_sizes": (8, 6), "batch_size": BATCH, "dropout": 0.2, "alpha": 0.3}
    return DroQArgs(**(settings | {"policy_lr": 1 / 128, "q_lr": 1 / 128, "tau": 0.1, "activation": "tanh"} | changes))


def make_agent(args: DroQArgs) -> DroQAgent:
    agent = DroQAgent(
        OBS_SPACE,
        ACTIONS,
        args.hidden_sizes,
        args.activation,
        args.num_critics,
        args.alpha,
        args.autotune,
        args.target_entropy,
        dropout=args.dropout,
        layer_norm=args.layer_norm,
    )
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)  # targets that are not the critics
    return agent


class Masked(nn.Module):
    """Dropout with a mask that is set from outside, [B, H]: 0 is dropped."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.mask = rate, torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask == 0, 0.0, x / (1 - self.rate))


def plain_critics(ensemble: EnsembleMLP, args: DroQArgs) -> nn.ModuleList:
    networks = nn.ModuleList()
    for member in range(args.num_critics):
        layers: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight.data[member].T.clone(), bias.data[member, 0].clone()
            layers.append(linear)
            if i < len(args.hidden_sizes):
                layers.append(Masked(args.dropout))
                if args.layer_norm:
                    layers.append(nn.LayerNorm(args.hidden_sizes[i]))
                    layers[-1].weight.data = ensemble.scales[i].data[member, 0].clone()
                    layers[-1].bias.data = ensemble.shifts[i].data[member, 0].clone()
                layers.append(nn.Tanh())
        networks.append(nn.Sequential(*layers))
    return networks.double()


class PlainDroQ(PlainSAC):
    """SAC's plain actor and temperature; critics with dropout, of which the actor climbs the mean."""

    def __init__(self, agent: DroQAgent, args: DroQArgs, target_entropy: float) -> None:
        super().__init__(agent, args, target_entropy)
        self.dropout_masks = agent.dropout_masks
        self.critics, self.targets = plain_critics(agent.critics, args), plain_critics(agent.target_critics, args)
        self.q_adam = torch.optim.Adam(self.critics.parameters(), lr=args.q_lr)

    def reduced(self, q: Tensor) -> Tensor:
        return sum(q) / len(q)

    def set_masks(self, critics: nn.ModuleList, kept: list[Tensor]) -> None:
        """`kept`: [C, B, H] for each hidden layer."""
        for i, masks in enumerate(kept):
            for critic, mask in zip(critics, masks, strict=True):
                [layer for layer in critic if isinstance(layer, Masked)][i].mask = mask

    def train(self, batches: Batch, steps: int, generator: torch.Generator) -> None:
        updates = len(batches) - steps
        for step, rows in enumerate(rows_of(updates, steps)):
            noise = torch.randn(len(rows) + 1, BATCH, ACTIONS, generator=generator).double()
            for i, k in enumerate(rows):  # lines 4 to 9
                of_critics, of_targets = self.dropout_masks(2, BATCH, generator)
                self.set_masks(self.critics, of_critics)
                self.set_masks(self.targets, of_targets)
                batch = Batch(**{name: column[k].double() for name, column in batches.columns.items()})
                self.update_critics(batch, noise[i])
                self.update_targets()
            self.set_masks(self.critics, self.dropout_masks(1, BATCH, generator)[0])  # line 10
            self.update_actor(batches.obs[updates + step].double(), noise[-1])

    def check(self, agent: DroQAgent) -> None:
        ours = (plain_actor(agent.actor), *(plain_critics(e, self.args) for e in (agent.critics, agent.target_critics)))
        for plain, network in zip((self.actor, self.critics, self.targets), ours, strict=True):
            for theirs, parameter in zip(plain.parameters(), network.parameters(), strict=True):
                torch.testing.assert_close(parameter, theirs, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(agent.log_alpha, self.log_alpha, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(20, 1), (20, 1)]),  # updates and environment steps of each call
        ({}, [(12, 3), (8, 2)]),
        ({}, [(7, 3), (1, 4), (5, 2)]),  # shares that are not even, and steps without an update of the critics
        ({}, [(0, 1), (3, 1)]),
        ({"layer_norm": False}, [(6, 2)]),
        ({"dropout": 0.0}, [(6, 2)]),
        ({"dropout": 0.01, "num_critics": 5}, [(6, 2)]),
        ({"dropout": 0.5, "hidden_sizes": (12,), "autotune": False}, [(6, 2)]),
        ({"target_entropy": 0.5, "hidden_sizes": (8, 6, 4)}, [(6, 2)]),
    ],
    ids=str,
)
def test_updates_equal_the_plain_ones(
    changes: dict[str, Any], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_float64(monkeypatch)
    args = make_args(**changes)
    agent = make_agent(args).double()
    before = snapshot(agent)
    plain = PlainDroQ(agent, args, -ACTIONS if args.target_entropy is None else args.target_entropy)
    training = Training(agent, args)
    for seed, (updates, steps) in enumerate(calls):
        batches = make_batches(updates + steps, updates, torch.float64)
        plain.history.clear()
        metrics = training.train(batches, steps, seed)
        plain.train(batches, steps, rng(seed))
        plain.check(agent)
        assert {name.removeprefix("losses/") for name in metrics} == {name for name, _ in plain.history}
        assert len(metrics["losses/actor_loss"]) == steps
        assert len(metrics.get("losses/qf_loss", [])) == updates
        for name, values in metrics.items():
            assert values.tolist() == pytest.approx(plain.numbers(name.removeprefix("losses/")), rel=1e-8, abs=1e-9)
    assert [moved(agent, before, part) for part in PARTS] == [True, args.autotune, True, True]


def test_the_update_of_the_actor_leaves_the_critics_alone() -> None:
    args = make_args()
    agent = make_agent(args)
    training, before = Training(agent, args), snapshot(agent)
    (kept,) = agent.dropout_masks(1, BATCH, rng())
    training.step_actor(torch.randn(BATCH, OBS), torch.randn(BATCH, ACTIONS), kept)
    assert [moved(agent, before, part) for part in PARTS] == [True, True, False, False]
    assert all(parameter.grad is None for parameter in agent.critics.parameters())


def test_every_forward_of_the_critics_drops_something_else() -> None:
    args = make_args(dropout=0.3)
    passes = make_agent(args).dropout_masks(5, BATCH, rng())
    assert len(passes) == 5
    seen = set()
    for kept in passes:
        assert len(kept) == len(args.hidden_sizes)
        for mask, width in zip(kept, args.hidden_sizes, strict=True):
            assert mask.shape == (args.num_critics, BATCH, width)
            assert 0.55 < mask.mean() < 0.85
            seen.add(tuple(mask.flatten().tolist()))
    assert len(seen) == 10
    again = make_agent(args).dropout_masks(5, BATCH, rng())
    assert all(torch.equal(a, b) for x, y in zip(passes, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("changes", [{"dropout": 0.0}, {"hidden_sizes": ()}], ids=str)
def test_nothing_is_dropped_where_there_is_nothing_to_drop(changes: dict[str, Any]) -> None:
    args = make_args(**changes)
    agent = make_agent(args)
    generator, untouched = rng(), rng()
    assert agent.dropout_masks(3, BATCH, generator) == [[], [], []]
    assert torch.equal(generator.get_state(), untouched.get_state())
    Training(agent, args).train(make_batches(5), 1)


def test_acting_and_values_outside_of_training_drop_nothing() -> None:
    agent = make_agent(make_args(dropout=0.5))
    inputs, obs = torch.randn(6, OBS + ACTIONS), torch.randn(6, OBS)
    assert torch.equal(agent.critics(inputs), agent.critics(inputs))
    assert torch.equal(agent.greedy(obs), agent.greedy(obs))


def test_the_actor_climbs_the_mean_of_the_critics_and_targets_take_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two critics that are linear in the action, one steep up, one less steep down: the mean rises, the minimum falls
    args = make_args(dropout=0.0, layer_norm=False, hidden_sizes=(), autotune=False, alpha=1e-6)
    agent = make_agent(args)
    with torch.no_grad():
        for ensemble in (agent.critics, agent.target_critics):
            ensemble.weights[0].zero_()
            ensemble.biases[0].copy_(torch.tensor([0.0, -100.0]).view(2, 1, 1))  # the second is always the least
            ensemble.weights[0][0, OBS:] = 3.0
            ensemble.weights[0][1, OBS:] = -1.0
    obs = torch.randn(BATCH, OBS)
    before = agent.greedy(obs)
    training = Training(agent, args)
    training.step_actor(obs, torch.zeros(BATCH, ACTIONS), [])
    assert (agent.greedy(obs) - before).mean() > 0.005
    columns = {"rewards": torch.zeros(BATCH), "terminated": torch.zeros(BATCH), "discounts": torch.ones(BATCH)}
    batch = Batch(obs=obs, actions=torch.zeros(BATCH, ACTIONS), next_obs=obs, **columns)
    seen: list[Tensor] = []
    monkeypatch.setattr(droq, "critic_loss", lambda q, targets: seen.append(targets) or critic_loss(q, targets))
    training.step_critics(batch, torch.zeros(BATCH, ACTIONS), [], [])
    torch.testing.assert_close(seen[0], -100 - agent.greedy(obs).sum(-1), rtol=1e-4, atol=1e-4)


def test_a_number_that_is_not_finite_ends_the_update_in_an_error() -> None:
    args = make_args()
    batches = make_batches(5)
    batches.rewards[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="losses/qf_loss"):
        Training(make_agent(args), args).train(batches, 1)


def test_without_dropout_and_norm_on_one_critic_droq_is_sac_with_another_schedule() -> None:
    # One critic: mean and minimum are the same; one environment step of one critic update, then the actor's
    args = make_args(dropout=0.0, layer_norm=False, num_critics=1)
    agent = make_agent(args)
    twin = copy.deepcopy(agent)
    batches = make_batches(2)
    Training(agent, args).train(batches, 1)
    other = test_sac_update.Training(twin, args)
    noise = torch.randn(2, BATCH, ACTIONS, generator=rng())
    other.step_critics(batches[0], noise[0], True)
    other.step_actor(batches.obs[1], noise[1])
    for name, value in agent.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


def test_the_agent_is_made_of_the_arguments() -> None:
    envs = SimpleNamespace(
        single_observation_space=Box(-1, 1, (OBS,)), single_action_space=Box(-1, 1, (ACTIONS,)), num_envs=1
    )
    agent = build(make_args(dropout=0.25, layer_norm=True, num_critics=3, alpha=0.5), envs)
    for ensemble in (agent.critics, agent.target_critics):
        assert ensemble.dropout == 0.25
        assert ensemble.layer_norm
        assert len(ensemble.scales) == 2
        assert ensemble.weights[0].shape == (3, OBS + ACTIONS, 8)
    assert agent.alpha.item() == pytest.approx(0.5)
    assert not build(make_args(layer_norm=False), envs).critics.layer_norm


@pytest.mark.parametrize("layer_norm", [False, True])
def test_half_precision_follows_the_full_one_with_dropout_and_layer_norm(layer_norm: bool) -> None:
    args = make_args(policy_lr=1e-3, q_lr=1e-3, layer_norm=layer_norm, dropout=0.2)
    assert_half_precision_follows(Training, make_agent(args), args, make_batches(5))
