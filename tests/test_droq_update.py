"""DroQ's whole update against a plain one: Algorithm 2 line by line, with separate networks and masks written out."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.droq import droq
from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.droq.utils import make_agent as build
from fabricrl.algos.sac.learner import Learner, compile_ahead
from fabricrl.data.buffers import ReplayBuffer
from fabricrl.models.models import EnsembleMLP
from fabricrl.utils.errors import NonFiniteError
from tests.test_sac_update import (
    ACTIONS,
    BATCH,
    OBS,
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


def train(learner: Learner, *rest: Any) -> dict[str, Tensor]:
    """The script's update, and what it has noted."""
    droq.train(learner, *rest)
    return learner.metrics()


def make_args(**changes: Any) -> DroQArgs:
    settings: dict[str, Any] = {"hidden_sizes": (8, 6), "batch_size": BATCH, "dropout": 0.2, "alpha": 0.3}
    return DroQArgs(**(settings | {"policy_lr": 0.01, "q_lr": 0.01, "tau": 0.1, "activation": "tanh"} | changes))


def make_agent(args: DroQArgs) -> DroQAgent:
    agent = DroQAgent(
        OBS,
        ACTIONS,
        args.hidden_sizes,
        args.activation,
        args.num_critics,
        args.alpha,
        args.autotune,
        dropout=args.dropout,
        layer_norm=args.layer_norm,
    )
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)  # targets that are not the critics
    return agent


def make_learner(agent: DroQAgent, args: DroQArgs) -> Learner:
    return Learner(Fabric(accelerator="cpu", devices=1), agent, args, mean_over_critics=True)


class Masked(nn.Module):
    """Dropout with a mask that is set from outside, [B, H]: True is dropped."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.mask = rate, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask == 1, 0.0, x / (1 - self.rate))


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
        self.drop = agent.drop
        self.critics, self.targets = plain_critics(agent.critics, args), plain_critics(agent.target_critics, args)
        self.q_adam = torch.optim.Adam(self.critics.parameters(), lr=args.q_lr)

    def reduced(self, q: Tensor) -> Tensor:
        return sum(q) / len(q)

    def set_masks(self, critics: nn.ModuleList, dropped: tuple[Tensor, ...]) -> None:
        """Places are counted over critics, then rows, then units."""
        sizes = self.args.hidden_sizes
        for i, places in enumerate(dropped):
            mask = torch.zeros(self.args.num_critics * BATCH * sizes[i])
            mask[places] = 1
            for critic, part in zip(critics, mask.view(self.args.num_critics, BATCH, sizes[i]), strict=True):
                [layer for layer in critic if isinstance(layer, Masked)][i].mask = part

    def train(self, batches: dict[str, Tensor], steps: int, generator: torch.Generator) -> None:
        updates = len(batches["rewards"]) - steps
        noise = torch.randn(updates + steps, BATCH, ACTIONS, generator=generator).double()
        dropped = iter(self.drop(2 * updates + steps, BATCH, generator))
        k = 0
        for step in range(steps):
            while k < updates * (step + 1) // steps:  # lines 4 to 9
                self.set_masks(self.critics, next(dropped))
                self.set_masks(self.targets, next(dropped))
                self.update_critics({name: column[k].double() for name, column in batches.items()}, noise[k])
                self.update_targets()
                k += 1
            self.set_masks(self.critics, next(dropped))  # line 10
            self.update_actor(batches["obs"][updates + step].double(), noise[updates + step])

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
    learner, ours, theirs = make_learner(agent, args), rng(), rng()
    for updates, steps in calls:
        batches = make_batches(updates + steps, updates, torch.float64)
        plain.history.clear()
        metrics = train(learner, batches, steps, ours, args)
        plain.train(batches, steps, theirs)
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
    learner, before = make_learner(agent, args), snapshot(agent)
    (dropped,) = agent.drop(1, BATCH, rng())
    learner.update_actor(torch.randn(BATCH, OBS), torch.randn(BATCH, ACTIONS), dropped)
    assert [moved(agent, before, part) for part in PARTS] == [True, True, False, False]
    assert all(parameter.grad is None for parameter in agent.critics.parameters())


def test_every_forward_of_the_critics_drops_something_else() -> None:
    args = make_args(dropout=0.3)
    passes = make_agent(args).drop(5, BATCH, rng())
    assert len(passes) == 5
    seen = set()
    for dropped in passes:
        assert len(dropped) == len(args.hidden_sizes)
        for places, width in zip(dropped, args.hidden_sizes, strict=True):
            total = args.num_critics * BATCH * width
            assert 0.15 < len(places) / total < 0.45
            seen.add(tuple(places.tolist()))
    assert len(seen) == 10
    again = make_agent(args).drop(5, BATCH, rng())
    assert all(torch.equal(a, b) for x, y in zip(passes, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("changes", [{"dropout": 0.0}, {"hidden_sizes": ()}], ids=str)
def test_nothing_is_dropped_where_there_is_nothing_to_drop(changes: dict[str, Any]) -> None:
    args = make_args(**changes)
    agent = make_agent(args)
    generator, untouched = rng(), rng()
    assert agent.drop(3, BATCH, generator) == [(), (), ()]
    assert torch.equal(generator.get_state(), untouched.get_state())
    train(make_learner(agent, args), make_batches(5), 1, rng(), args)


def test_acting_and_values_outside_of_training_drop_nothing() -> None:
    agent = make_agent(make_args(dropout=0.5))
    inputs, obs = torch.randn(6, OBS + ACTIONS), torch.randn(6, OBS)
    assert torch.equal(agent.critics(inputs), agent.critics(inputs))
    assert torch.equal(agent.greedy(obs), agent.greedy(obs))


def test_the_actor_climbs_the_mean_of_the_critics_and_targets_take_the_least() -> None:
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
    learner = make_learner(agent, args)
    learner.update_actor(obs, torch.zeros(BATCH, ACTIONS))
    assert (agent.greedy(obs) - before).mean() > 0.005
    batch = learner.next_actions(
        {
            "next_obs": obs,
            "rewards": torch.zeros(BATCH),
            "terminated": torch.zeros(BATCH),
            "discounts": torch.ones(BATCH),
        },
        torch.zeros(BATCH, ACTIONS),
    )
    targets = learner.td_targets(batch)
    expected = -100 - batch["next_inputs"][:, OBS:].sum(-1)
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-4)


def test_a_number_that_is_not_finite_ends_the_update_in_an_error() -> None:
    args = make_args()
    batches = make_batches(5)
    batches["rewards"][3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="losses/qf_loss"):
        train(make_learner(make_agent(args), args), batches, 1, rng(), args)


def test_without_dropout_and_norm_on_one_critic_droq_is_sac_with_another_schedule() -> None:
    # One critic: mean and minimum are the same; one environment step of one critic update, then the actor's
    args = make_args(dropout=0.0, layer_norm=False, num_critics=1)
    agent = make_agent(args)
    twin = copy.deepcopy(agent)
    learner, other = make_learner(agent, args), Learner(Fabric(accelerator="cpu", devices=1), twin, args)
    batches = make_batches(2)
    train(learner, batches, 1, rng(), args)
    prepared = other.prepare(batches)
    noise = torch.randn(2, BATCH, ACTIONS, generator=rng())
    batch = other.next_actions({name: column[0] for name, column in prepared.items()}, noise[0])
    other.update_critics(batch)
    other.update_targets()
    other.update_actor(prepared["obs"][1], noise[1])
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
    assert_half_precision_follows(train, make_agent(args), args, make_batches(5), mean_over_critics=True)


def test_everything_that_is_to_be_compiled_is_and_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight variants of one function are all that the compiler keeps; beyond them it leaves a function as it was."""
    args = make_args(dropout=0.2, layer_norm=True, compile=True, replay_ratio=4.0)
    real, compiled, evaluated = torch.compile, [], []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return lambda *given: (evaluated.append(graph), graph.forward(*given))[1]

    monkeypatch.setattr(torch, "compile", lambda part, **options: real(part, **options | {"backend": backend}))
    torch.compiler.reset()
    rb = ReplayBuffer(BATCH, 1, Box(-9, 9, (OBS,), np.float32), ACTIONS)
    rb.start(np.zeros((1, OBS)))
    for _ in range(BATCH):
        never = np.zeros(1, dtype=bool)
        rb.add(np.zeros((1, ACTIONS)), np.ones((1, OBS)), np.ones(1), never, never, {})
    learner = make_learner(make_agent(args), args)
    for seed in range(2):  # as the script does
        compile_ahead(learner, 4, learner.agent.drop(3, BATCH, rng(seed)))
    ahead = len(compiled)
    for _ in range(3):
        evaluated.clear()
        droq.train(learner, rb.sample(5, BATCH, rng()), 1, rng(), args)
        assert len(evaluated) == 1 + 4 + 4 + 1  # next actions; targets and gradients of four updates; the actor's
    assert len(compiled) == ahead
    torch.compiler.reset()
