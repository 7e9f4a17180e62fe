"""SAC's whole update against a plain one, written here from the paper with separate networks, torch.distributions and
an Adam for each; and when updates are due."""

import contextlib
import copy
import io
import math
from dataclasses import replace
from decimal import Decimal
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from fabricrl.algos.off_policy.updates import SampleAndTrain, UpdateSchedule, make_schedule
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.loss import critic_loss
from fabricrl.data import Batch, ReplayBuffer
from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import MLP, EnsembleMLP
from fabricrl.utils import optimizer as optimizer_module
from fabricrl.utils.errors import CheckpointError, ConfigError, NonFiniteError
from tests.conftest import BareRun

OBS, ACTIONS, BATCH = 3, 2, 16
OBS_SPACE = Box(-np.inf, np.inf, (OBS,))


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def use_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float64, also where the code asks for float32, so that differences are those of formulas: a step
    of Adam makes much of a little in a gradient near zero."""
    noise = TanhNormalHead.noise
    monkeypatch.setattr(TanhNormalHead, "noise", lambda *args: noise(*args).double())
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def make_args(**changes: Any) -> SACArgs:
    settings: dict[str, Any] = {"hidden_sizes": (8, 8), "batch_size": BATCH, "activation": "tanh"}
    return SACArgs(**(settings | {"policy_lr": 1 / 64, "q_lr": 1 / 32, "tau": 0.1, "alpha": 0.3} | changes))


def make_agent(args: SACArgs) -> SACAgent:
    sizes = OBS_SPACE, ACTIONS, args.hidden_sizes, args.activation, args.num_critics
    agent = SACAgent(*sizes, args.alpha, args.autotune, args.target_entropy, args.norm_obs)
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)  # targets that are not the critics
    return agent


class Training:
    """The script's update of an agent, as `main` puts it together."""

    script: Any = sac

    def __init__(self, agent: SACAgent, args: SACArgs) -> None:
        self.run, self.agent = BareRun(args), agent
        self.learner = sac.setup(self.run, agent)
        self.step_critics = self.run.compiled(partial(self.script.update_critics, self.run, self.learner))
        self.step_actor = self.run.compiled(partial(self.script.update_actor, self.run, self.learner))

    def train(self, batches: Batch, number: int, seed: int = 3) -> dict[str, Tensor]:
        """Trains on batches, as an iteration does; returns its metrics. `number`: of the first update."""
        self.run.train_rng.manual_seed(seed)
        steps = self.step_critics, self.step_actor
        plan = sac.make_plan(self.run.args, number, len(batches))
        return self.noted(sac.train(self.run, self.learner, *steps, batches, plan))

    def noted(self, *metrics: dict[tuple[str, ...], Tensor]) -> dict[str, Tensor]:
        for found in metrics:
            for tags, values in found.items():
                self.run.add_metrics(tags, values)
        return self.run.metrics.fetch()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        _, _, _, actor_optimizer, q_optimizer = self.learner
        return {"agent": self.agent, "actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}


def make_batches(updates: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> Batch:
    """Batches as of `ReplayBuffer.sample`: three-step returns, some cut short, and some ended episodes."""
    generator = rng(seed)
    shape = (updates, BATCH)
    batches = {
        "obs": torch.randn(*shape, OBS, generator=generator),
        "actions": 2 * torch.rand(*shape, ACTIONS, generator=generator) - 1,
        "rewards": torch.randn(shape, generator=generator),
        "next_obs": torch.randn(*shape, OBS, generator=generator),
        "terminated": (torch.rand(shape, generator=generator) < 0.3).float(),
        "discounts": 0.9 ** torch.randint(1, 4, shape, generator=generator),
    }
    return Batch(**{name: column.to(dtype) for name, column in batches.items()})


def plain_actor(actor: MLP, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in actor.hidden:
        layers += [copy.deepcopy(layer), activation()]
    return nn.Sequential(*layers, copy.deepcopy(actor.out)).double()


def plain_critics(ensemble: EnsembleMLP, activation: type[nn.Module] = nn.Tanh) -> nn.ModuleList:
    networks = nn.ModuleList()
    for member in range(len(ensemble.weights[0])):
        layers: list[nn.Module] = []
        for weight, bias in zip(ensemble.weights, ensemble.biases, strict=True):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight.data[member].T.clone(), bias.data[member, 0].clone()
            layers += [linear, activation()]
        networks.append(nn.Sequential(*layers[:-1]))
    return networks.double()


class PlainSAC:
    """Soft actor-critic as a textbook has it, in float64."""

    def __init__(self, agent: SACAgent, args: SACArgs, target_entropy: float) -> None:
        self.args, self.target_entropy = args, target_entropy
        self.actor = plain_actor(agent.actor)
        self.critics, self.targets = plain_critics(agent.critics), plain_critics(agent.target_critics)
        self.log_alpha = agent.log_alpha.detach().clone().double().requires_grad_()
        self.q_adam = torch.optim.Adam(self.critics.parameters(), lr=args.q_lr)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=args.policy_lr)
        self.history: list[tuple[str, float]] = []

    def policy(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs).chunk(2, -1)
        std = log_std.clamp(-20, 2).exp()
        squash = TanhTransform(cache_size=1)
        actions = squash(mean + std * noise)
        return actions, TransformedDistribution(Normal(mean, std), [squash]).log_prob(actions).sum(-1)

    @staticmethod
    def q(critics: nn.ModuleList, obs: Tensor, actions: Tensor) -> list[Tensor]:
        return [critic(torch.cat((obs, actions), -1))[:, 0] for critic in critics]

    def update_critics(self, batch: Batch, noise: Tensor) -> None:
        with torch.no_grad():
            actions, logprobs = self.policy(batch.next_obs, noise)
            least = torch.stack(self.q(self.targets, batch.next_obs, actions)).min(0).values
            value = least - self.log_alpha.exp() * logprobs
            y = torch.where(batch.terminated == 1, batch.rewards, batch.rewards + batch.discounts * value)
        q = self.q(self.critics, batch.obs, batch.actions)
        loss = sum(0.5 * nn.functional.mse_loss(values, y) for values in q)
        self.q_adam.zero_grad()
        loss.backward()
        self.q_adam.step()
        self.history += [("qf_loss", loss.item()), ("qf_values", torch.stack(q).mean().item())]

    def update_actor(self, obs: Tensor, noise: Tensor) -> None:
        actions, logprobs = self.policy(obs, noise)
        q = self.reduced(torch.stack(self.q(self.critics, obs, actions)))
        alpha = self.log_alpha.exp().item()
        loss = (alpha * logprobs - q).mean()
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        alpha_loss = -(self.log_alpha * (logprobs.detach() + self.target_entropy)).mean()
        if self.args.autotune:
            self.alpha_adam.zero_grad()
            alpha_loss.backward()
            self.alpha_adam.step()
        numbers = (("actor_loss", loss), ("alpha_loss", alpha_loss), ("entropy", -logprobs.mean()))
        self.history += [(name, value.item()) for name, value in numbers] + [("alpha", alpha)]

    def reduced(self, q: Tensor) -> Tensor:
        return q.min(0).values

    def update_targets(self) -> None:
        with torch.no_grad():
            for target, source in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.copy_(self.args.tau * source + (1 - self.args.tau) * target)

    def train(self, batches: Batch, first: int, generator: torch.Generator) -> None:
        numbers, frequency = range(first, first + len(batches)), self.args.policy_frequency
        draws = len(numbers) + frequency * sum(number % frequency == 0 for number in numbers)
        noise = iter(torch.randn(draws, BATCH, ACTIONS, generator=generator).double())  # in the order of its use
        for k, number in enumerate(numbers):
            batch = Batch(**{name: column[k].double() for name, column in batches.columns.items()})
            self.update_critics(batch, next(noise))
            if number % frequency == 0:
                for _ in range(frequency):
                    self.update_actor(batch.obs, next(noise))
            if number % self.args.target_network_frequency == 0:
                self.update_targets()
        assert next(noise, None) is None

    def check(self, agent: SACAgent) -> None:
        """Parameters are those of the agent."""
        kinds = ((self.actor, plain_actor(agent.actor)), (self.critics, plain_critics(agent.critics)))
        for plain, ours in (*kinds, (self.targets, plain_critics(agent.target_critics))):
            for theirs, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
                torch.testing.assert_close(parameter, theirs, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(agent.log_alpha, self.log_alpha, rtol=1e-9, atol=1e-10)

    def numbers(self, name: str) -> list[float]:
        return [value for key, value in self.history if key == name]


PARTS = ("actor", "log_alpha", "critics", "target_critics")


def moved(agent: SACAgent, before: dict[str, Tensor], part: str) -> bool:
    return any(
        not torch.equal(value, before[name]) for name, value in agent.state_dict().items() if name.startswith(part)
    )


def snapshot(agent: SACAgent) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in agent.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy_frequency": 1},
        {"policy_frequency": 3, "target_network_frequency": 2},
        {"target_network_frequency": 4, "tau": 1.0},
        {"autotune": False},
        {"target_entropy": 0.5, "alpha": 2.0},
        {"num_critics": 1},
        {"num_critics": 5, "hidden_sizes": (12,)},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_updates_equal_the_plain_ones(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    args = make_args(**changes)
    agent = make_agent(args).double()
    before = snapshot(agent)
    plain = PlainSAC(agent, args, -ACTIONS if args.target_entropy is None else args.target_entropy)
    training, first = Training(agent, args), 1
    for updates in (1, 4, 2, 5):  # one call or several: the count goes on
        batches = make_batches(updates, first, torch.float64)
        plain.history.clear()
        metrics = training.train(batches, first, seed=first)
        plain.train(batches, first, rng(first))
        first += updates
        plain.check(agent)
        assert {name.removeprefix("losses/") for name in metrics} == {name for name, _ in plain.history}
        for name, values in metrics.items():
            assert values.tolist() == pytest.approx(plain.numbers(name.removeprefix("losses/")), rel=1e-8, abs=1e-9)
    for part in ("actor", "critics", "target_critics"):
        assert moved(agent, before, part)
    assert moved(agent, before, "log_alpha") == args.autotune


def test_the_actor_waits_for_its_turn_and_then_makes_up_for_it() -> None:
    args = make_args(policy_frequency=3)
    agent = make_agent(args)
    training, before = Training(agent, args), snapshot(agent)
    metrics = training.train(make_batches(2), 1)
    assert "losses/actor_loss" not in metrics
    assert not moved(agent, before, "actor")
    metrics = training.train(make_batches(10), 3)  # updates 3 to 12
    assert len(metrics["losses/actor_loss"]) == 12
    assert len(metrics["losses/qf_loss"]) == 10


def test_networks_see_normalised_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    args = make_args(norm_obs=True)
    agent = make_agent(args).double()
    agent.obs_normalizer.update(5 + 3 * torch.randn(100, OBS))
    batches = make_batches(3, dtype=torch.float64)
    mean, deviation = agent.obs_normalizer.mean, (agent.obs_normalizer.var + 1e-8).sqrt()
    seen = [(obs - mean) / deviation for obs in (batches.obs, batches.next_obs)]
    plain = PlainSAC(agent, args, -ACTIONS)
    plain.train(batches.with_columns(obs=seen[0], next_obs=seen[1]), 1, rng())
    Training(agent, args).train(batches, 1)
    plain.check(agent)
    raw, noise = 4 + torch.randn(6, OBS).double(), torch.randn(6, ACTIONS).double()
    params = agent.actor((raw - mean) / deviation)
    torch.testing.assert_close(agent.act(raw, noise), agent.head.sample(params, noise))
    torch.testing.assert_close(agent.greedy(raw), agent.head.mode(params))


def test_bytes_reach_the_networks_as_numbers() -> None:
    args = make_args(activation="relu")
    agent = make_agent(args)
    images = torch.randint(0, 256, (4, OBS), dtype=torch.uint8)
    torch.testing.assert_close(agent.greedy(images), agent.greedy(images.float()))


def test_the_update_of_the_actor_leaves_the_critics_alone() -> None:
    args = make_args()
    agent = make_agent(args)
    training, batches = Training(agent, args), make_batches(1)
    training.train(batches, 1)  # moments of Adam are not zero any more
    q_optimizer = training.learner.q_optimizer
    before, optimizer = snapshot(agent), copy.deepcopy(q_optimizer.state_dict())
    for parameter in agent.critics.parameters():  # nothing is added to what is there
        parameter.grad = torch.full_like(parameter, 7.0)
    training.step_actor(batches.obs[0], torch.randn(BATCH, ACTIONS))
    assert all((parameter.grad == 7).all() for parameter in agent.critics.parameters())
    assert all(parameter.requires_grad for parameter in agent.critics.parameters())  # they learn on
    assert [moved(agent, before, part) for part in PARTS] == [True, True, False, False]
    for key, value in q_optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, optimizer["state"][0][key])


@pytest.mark.parametrize("autotune", [True, False])
def test_the_actor_averages_its_gradient_and_that_of_the_temperature(
    autotune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one message, with the metrics."""
    args = make_args(autotune=autotune)
    agent = make_agent(args)
    training, sent = Training(agent, args), []

    def averaged(fabric: Any, vector: Tensor) -> Tensor:
        sent.append(vector)
        return 0.5 * vector

    monkeypatch.setattr(optimizer_module, "mean_over_ranks", averaged)
    training.run.fabric = SimpleNamespace(
        world_size=2, backward=lambda loss: loss.backward(), autocast=contextlib.nullcontext
    )
    alpha = agent.alpha.item()
    metrics = training.step_actor(torch.randn(4, OBS), torch.randn(4, ACTIONS))
    (vector,) = sent
    assert len(vector) == sum(p.numel() for p in agent.actor.parameters()) + autotune + len(sac.ACTOR_METRICS)
    found = [*([agent.log_alpha] * autotune), *agent.actor.parameters()]
    gradient = torch.cat([parameter.grad.flatten() for parameter in found])
    torch.testing.assert_close(vector[: len(gradient)], gradient)
    assert metrics[sac.ACTOR_METRICS.index("losses/alpha")].item() == pytest.approx(0.5 * alpha)
    moments = training.learner.actor_optimizer.state_dict()["state"][0]["exp_avg"]  # (1 − β₁) of what came back
    torch.testing.assert_close(moments, 0.1 * 0.5 * gradient)


def test_the_update_of_the_critics_leaves_actor_and_temperature_alone_and_moves_targets_if_it_is_to() -> None:
    args = make_args()
    agent = make_agent(args)
    training, before = Training(agent, args), snapshot(agent)
    (batch,) = make_batches(1)
    training.step_critics(batch, torch.randn(BATCH, ACTIONS), False)
    assert [moved(agent, before, part) for part in PARTS] == [False, False, True, False]
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    training.step_critics(batch, torch.randn(BATCH, ACTIONS), True)
    after = snapshot(agent)
    for name, value in agent.target_critics.named_parameters():  # θ̄ ← 0.1 θ + 0.9 θ̄, with the newest θ
        expected = 0.1 * after[f"critics.{name}"] + 0.9 * before[f"target_critics.{name}"]
        torch.testing.assert_close(value.detach(), expected)
    assert [moved(agent, before, part) for part in PARTS] == [False, False, True, True]


@pytest.mark.parametrize(("target_entropy", "sign"), [(5.0, 1), (-20.0, -1)])
def test_the_temperature_moves_towards_the_target_entropy(target_entropy: float, sign: int) -> None:
    args = make_args(target_entropy=target_entropy)
    agent = make_agent(args)
    training, last = Training(agent, args), agent.log_alpha.item()
    for _ in range(5):
        metrics = training.step_actor(torch.randn(BATCH, OBS), torch.randn(BATCH, ACTIONS))
        assert sign * (agent.log_alpha.item() - last) > 0
        used = metrics[sac.ACTOR_METRICS.index("losses/alpha")]
        assert used.item() == pytest.approx(math.exp(last))
        last = agent.log_alpha.item()


def test_the_target_entropy_is_minus_the_number_of_actions_unless_it_is_given() -> None:
    for given, used in ((None, -2.0), (-0.7, -0.7), (0.0, 0.0)):
        assert make_agent(make_args(target_entropy=given)).target_entropy == used


def targets_of(training: Training, batch: Batch, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """TD targets, [B]."""
    seen: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(sac, "critic_loss", lambda q, targets: seen.append(targets) or critic_loss(q, targets))
        sac.update_critics(training.run, training.learner, batch, noise, False)
    return seen[0]


def test_terminal_states_are_not_bootstrapped_and_time_limits_are_from_the_last_observation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = make_args()
    agent, gamma = make_agent(args), 0.9
    rb = ReplayBuffer(8, 2, Box(-9, 9, (OBS,), np.float32), ACTIONS, gamma)
    first, final, reset = np.zeros((2, OBS)), np.full((2, OBS), 0.5), np.full((2, OBS), -0.7)
    rb.start(first)
    infos = {"final_obs": np.array([*final, None], dtype=object)[:2]}
    rewards, terminated = np.array([1.0, 2.0]), np.array([True, False])  # environment 1 runs into a time limit
    rb.add(np.zeros((2, ACTIONS)), reset, rewards, terminated, ~terminated, infos)
    plain = PlainSAC(agent, args, -2.0)
    (batch,) = agent.prepare_batches(rb.sample(1, 64, rng()), rng())
    noise = torch.randn(64, ACTIONS, generator=rng(5))
    targets = targets_of(Training(agent, args), batch, noise, monkeypatch)
    obs = torch.tensor(final[:1]).expand(64, -1)
    actions, logprobs = plain.policy(obs, noise.double())
    values = torch.stack(plain.q(plain.targets, obs, actions)).min(0).values - args.alpha * logprobs
    ended = batch.rewards == 1.0
    assert 0 < ended.sum() < 64
    assert (targets[ended] == 1.0).all()
    torch.testing.assert_close(targets[~ended].double(), (2 + gamma * values)[~ended], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("column", ["rewards", "obs", "next_obs", "actions"])
def test_a_number_that_is_not_finite_ends_the_update_in_an_error(column: str) -> None:
    args = make_args()
    batches = make_batches(4)
    batches.columns[column][2, 3] = math.nan
    batches.terminated[:] = 0
    with pytest.raises(NonFiniteError, match="losses/qf_loss"):
        Training(make_agent(args), args).train(batches, 1)


def test_large_finite_losses_are_not_taken_for_infinite_ones() -> None:
    args, batches = make_args(), make_batches(4)
    batches.rewards[:] = 1e15
    Training(make_agent(args), args).train(batches, 1)


def assert_half_precision_follows(kind: type[Training], agent: SACAgent, args: Any, batches: Batch) -> None:
    """An update in bf16-mixed has nearly the losses of one in full precision, not the same, and full parameters."""
    twin, losses = copy.deepcopy(agent), []
    for precision, learns in (("32-true", agent), ("bf16-mixed", twin)):
        losses.append(kind(learns, replace(args, precision=precision)).train(batches, 1))
    full, half = losses
    for name, values in full.items():
        torch.testing.assert_close(half[name], values, rtol=0.1, atol=0.05)
    assert not torch.equal(half["losses/qf_loss"], full["losses/qf_loss"])
    assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())


def test_half_precision_follows_the_full_one_and_keeps_parameters_in_it() -> None:
    args = make_args(policy_lr=1e-3, q_lr=1e-3)
    assert_half_precision_follows(Training, make_agent(args), args, make_batches(4))


def test_half_precision_does_not_round_what_the_critics_are_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric rounds every tensor that it finds among the inputs of a module."""
    args = make_args(precision="bf16-mixed")
    (batch,) = make_batches(1)
    targets = targets_of(Training(make_agent(args), args), batch, torch.randn(BATCH, ACTIONS), monkeypatch)
    assert targets.dtype == torch.float32
    assert (targets != targets.bfloat16().float()).any()
    ended = batch.terminated == 1
    assert torch.equal(targets[ended], batch.rewards[ended])
    assert ended.any()


def test_a_restored_training_goes_on_as_the_one_that_was_stored() -> None:
    args = make_args()
    training, restored = Training(make_agent(args), args), Training(make_agent(args), args)
    training.train(make_batches(4), 1, seed=1)
    file = io.BytesIO()
    torch.save(training.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for learning in (training, restored):
        learning.train(make_batches(5), 5, seed=2)
    for name, value in training.agent.state_dict().items():
        assert torch.equal(value, restored.agent.state_dict()[name]), name


@pytest.mark.parametrize(
    ("then", "now", "alpha"),
    [
        ({}, {"q_lr": 0.5, "policy_lr": 0.25}, 0.3),
        ({"alpha": 0.3}, {"alpha": 0.7}, 0.3),  # it is learned: where it starts does not matter any more
        ({"autotune": False}, {"autotune": False, "alpha": 0.7}, 0.7),
    ],
)
def test_a_resumed_run_has_the_rates_and_the_fixed_temperature_of_its_arguments(
    then: dict[str, Any], now: dict[str, Any], alpha: float
) -> None:
    before, after = make_args(**then), make_args(**now)
    restored = Training(make_agent(after), after)
    restored.load_state_dict(Training(make_agent(before), before).state_dict())
    _, _, _, actor_optimizer, q_optimizer = restored.learner
    assert [group["lr"].item() for group in q_optimizer.param_groups] == pytest.approx([after.q_lr])
    assert [group["lr"].item() for group in actor_optimizer.param_groups] == pytest.approx([after.policy_lr])
    assert restored.agent.alpha.item() == pytest.approx(alpha)


@pytest.mark.parametrize(("then", "was"), [(True, "learned"), (False, "fixed")])
def test_a_temperature_that_was_learned_is_not_fixed_later_nor_the_other_way_round(then: bool, was: str) -> None:
    run = BareRun(make_args(autotune=not then))
    run.obs_space, run.action_space = Box(-1, 1, (OBS,), np.float32), Box(-1, 1, (ACTIONS,), np.float32)
    make_schedule(run)
    run.state = {"args": vars(make_args(autotune=then))}
    with pytest.raises(CheckpointError, match=f"--autotune: the temperature was {was} in the checkpoint"):
        make_schedule(run)


@pytest.mark.parametrize("part", ["q_optimizer", "actor_optimizer"])
def test_a_parameter_that_is_not_finite_is_noticed_though_no_loss_was_computed_with_it_yet(part: str) -> None:
    args = make_args()
    training = Training(make_agent(args), args)
    training.train(make_batches(2), 1)
    getattr(training.learner, part).flat.vector[3] = math.inf
    with pytest.raises(NonFiniteError, match="parameters"):
        training.run.metrics.fetch()


def schedule(ratio: float, world_size: int = 1, rank: int = 0, **changes: Any) -> UpdateSchedule:
    settings = {"learning_starts": 100, "batch_size": 10, "total_timesteps": 10**7}
    return UpdateSchedule(SACArgs(replay_ratio=ratio, **(settings | changes)), world_size, rank == 0)


def exactly(ratio: float, steps: int) -> int:
    """⌊ratio · steps⌋ of the number that was written, in decimal arithmetic."""
    return math.floor(Decimal(str(ratio)) * steps)


RATIOS = [0.1, 0.29, 0.3, 0.3333333, 0.001, 1e-05, 0.7, 1.0, 1.1, 1.5, 2.675, 20.0, 19.99]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stride", [1, 3, 4, 16])  # N · W steps at a time
def test_as_many_updates_as_the_ratio_says_at_every_step_and_numbered_without_gaps(ratio: float, stride: int) -> None:
    plan, done = schedule(ratio), 0
    for step in range(stride, 4000, stride):
        first, due = plan.take(step)
        assert first == done + 1
        assert due >= 0
        done += due
        assert done == exactly(ratio, max(step - 100, 0)), step
    assert plan.done == done


def test_updates_are_spread_evenly() -> None:
    plan = schedule(0.3)
    due = [plan.take(step)[1] for step in range(1, 1001)]
    assert set(due) == {0, 1}
    assert due[:103] == [0] * 103  # ⌊0.3 · 4⌋ = 1 is the first
    assert due[103] == 1
    plan = schedule(20.0)
    assert [plan.take(step)[1] for step in range(99, 104)] == [0, 0, 20, 20, 20]  # no burst at the start
    plan = schedule(1.0)
    assert [plan.take(step)[1] for step in range(4, 113, 4)] == [0] * 25 + [4, 4, 4]


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_count_is_exact_over_resumes(ratio: float) -> None:
    plan, done = schedule(ratio), 0
    for step in range(4, 3001, 4):
        done += plan.take(step)[1]
        if step in (40, 96, 100, 104, 500, 504, 1000, 2900):
            resumed = schedule(ratio)
            resumed.load_state_dict(copy.deepcopy(plan.state_dict()), step, refill=False)
            plan = resumed
        assert done == plan.done == exactly(ratio, max(step - 100, 0))


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.5])
def test_a_buffer_that_has_to_be_filled_again_puts_updates_off_without_catching_up(ratio: float) -> None:
    plan = schedule(ratio)
    before = sum(plan.take(step)[1] for step in range(1, 1004))
    resumed = schedule(ratio)
    resumed.load_state_dict(plan.state_dict(), 1003, refill=True)
    due = {step: resumed.take(step) for step in range(1004, 2001)}
    assert all(due[step][1] == 0 for step in range(1004, 1104))  # learning starts 100 steps later
    assert max(number for _, number in due.values()) <= math.ceil(ratio)
    assert sum(number for _, number in due.values()) == exactly(ratio, 2000 - 1103)
    assert resumed.done == before + exactly(ratio, 2000 - 1103)
    assert due[1104][0] == before + 1  # numbers go on
    assert not resumed.explores(1050)  # there is a policy that has learned
    again = schedule(ratio)
    again.load_state_dict(resumed.state_dict(), 2000, refill=False)
    assert sum(again.take(step)[1] for step in range(2001, 3001)) == (
        exactly(ratio, 3000 - 1103) - exactly(ratio, 2000 - 1103)
    )


@pytest.mark.parametrize(("old", "new"), [(1.0, 20.0), (20.0, 1.0), (0.3, 0.5)])
def test_another_ratio_holds_from_then_on(old: float, new: float) -> None:
    plan = schedule(old)
    before = sum(plan.take(step)[1] for step in range(1, 1001))
    resumed = schedule(new)
    resumed.load_state_dict(plan.state_dict(), 1000, refill=False)
    due = [resumed.take(step)[1] for step in range(1001, 1501)]
    assert max(due) <= math.ceil(new)  # no burst, and no pause
    assert sum(due) == exactly(new, 500)
    assert resumed.done == before + sum(due)


def test_another_ratio_before_learning_starts_does_not_start_it_sooner() -> None:
    plan = schedule(1.0)
    plan.take(50)
    resumed = schedule(2.0)
    resumed.load_state_dict(plan.state_dict(), 50, refill=False)
    assert [resumed.take(step)[1] for step in range(51, 104)] == [0] * 50 + [2, 2, 2]


@pytest.mark.parametrize(("given", "starts"), [(30, 50), (70, 70), (200, 200)])
def test_before_the_first_update_learning_may_be_started_sooner_or_later_but_not_in_the_past(
    given: int, starts: int
) -> None:
    plan = schedule(1.0)
    plan.take(50)
    resumed = schedule(1.0, learning_starts=given)
    resumed.load_state_dict(plan.state_dict(), 50, refill=False)
    due = [resumed.take(step)[1] for step in range(51, 301)]
    assert due == [0] * (starts - 50) + [1] * (300 - starts)  # no burst for steps before


def test_a_refill_that_was_interrupted_before_the_first_update_is_not_forgotten() -> None:
    plan = schedule(1.0)
    refilled = schedule(1.0)
    refilled.load_state_dict(plan.state_dict(), 50, refill=True)  # learning starts after 150 steps
    assert refilled.take(120) == (1, 0)
    resumed = schedule(1.0)
    resumed.load_state_dict(refilled.state_dict(), 120, refill=False)
    assert [resumed.take(step)[1] for step in range(121, 161)] == [0] * 30 + [1] * 10


def test_a_small_ratio_is_not_put_off_by_a_resume_before_its_first_update() -> None:
    plan = schedule(0.001)
    for step in range(1, 600):
        plan.take(step)
    resumed = schedule(0.001)
    resumed.load_state_dict(plan.state_dict(), 599, refill=False)
    assert [resumed.take(step)[1] for step in range(600, 1101)] == [0] * 500 + [1]


def test_actions_are_random_until_learning_starts() -> None:
    plan = schedule(1.0)
    for step in range(105):
        assert plan.explores(step) == (step < 100)
        plan.take(step + 1)


def test_learning_starts_no_sooner_than_with_a_batch_of_each_rank(capsys: pytest.CaptureFixture) -> None:
    plan = schedule(1.0, world_size=4, learning_starts=0, batch_size=30)
    assert plan.starts == 120
    assert "learning starts after 120 steps" in capsys.readouterr().err
    assert schedule(1.0, world_size=4, rank=1, learning_starts=0, batch_size=30).starts == 120
    assert schedule(1.0, world_size=4).starts == 100
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="--total-timesteps is 120: it must be above 120"):
        schedule(1.0, world_size=4, learning_starts=0, batch_size=30, total_timesteps=120)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1e6, math.nan, math.inf])
def test_a_replay_ratio_is_above_zero_and_leaves_an_iteration_that_can_end(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"--replay-ratio is .* at most 1000"):
        SACArgs(replay_ratio=ratio)


def test_a_run_without_a_single_update_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--replay-ratio is 0.001.* 999 steps"):
        schedule(0.001, learning_starts=100, total_timesteps=1099)
    assert schedule(0.001, learning_starts=100, total_timesteps=1100).take(1100) == (1, 1)


@pytest.mark.parametrize(("delay", "every"), [(1, 1), (2, 1), (2, 3), (3, 6), (2, 8000), (1000, 1200)])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("captures", [False, True])
def test_the_warm_up_has_each_kind_of_update_that_a_run_makes(
    delay: int, every: int, ratio: float, captures: bool
) -> None:
    args = SACArgs(policy_frequency=delay, target_network_frequency=every, replay_ratio=ratio)
    run: Any = SimpleNamespace(args=args, captured=lambda function: function, captures=captures)
    run.fabric = SimpleNamespace(world_size=1)
    sample_and_train = SampleAndTrain(run, None, None, delay, every)  # type: ignore[arg-type]
    warmed_up = {sac.make_plan(args, *kind) for kind in sample_and_train.kinds()}
    done = 0
    for step in range(1, int(2 * math.lcm(delay, every) / ratio) + 3):
        due = int(ratio * step) - done
        parts = list(sample_and_train.parts(done + 1, due)) if captures else [(done + i + 1, 1) for i in range(due)]
        assert {sac.make_plan(args, *part) for part in parts} <= warmed_up
        done += due
