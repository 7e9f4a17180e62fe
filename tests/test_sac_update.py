"""SAC's whole update against a plain one, written here from the paper with separate networks, torch.distributions and
an Adam for each; and when updates are due."""

import copy
import io
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from fabricrl.algos.sac import learner as learner_module
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.learner import Learner, compile_ahead
from fabricrl.algos.sac.loss import critic_loss
from fabricrl.algos.sac.utils import UpdateSchedule
from fabricrl.data.buffers import ReplayBuffer
from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import MLP, EnsembleMLP
from fabricrl.utils.errors import CheckpointError, ConfigError, NonFiniteError


def train(learner: Learner, *rest: Any) -> dict[str, Tensor]:
    """The script's update, and what it has noted."""
    sac.train(learner, *rest)
    return learner.metrics()


OBS, ACTIONS, BATCH = 3, 2, 16


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
    return SACArgs(**(settings | {"policy_lr": 0.02, "q_lr": 0.03, "tau": 0.1, "alpha": 0.3} | changes))


def make_agent(args: SACArgs) -> SACAgent:
    agent = SACAgent(
        OBS, ACTIONS, args.hidden_sizes, args.activation, args.num_critics, args.alpha, args.autotune, args.norm_obs
    )
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)  # targets that are not the critics
    return agent


def make_learner(agent: SACAgent, args: SACArgs, **more: Any) -> Learner:
    return Learner(Fabric(accelerator="cpu", devices=1), agent, args, **more)


def make_batches(updates: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What `ReplayBuffer.sample` returns of three-step returns, some cut short, and some episodes that ended."""
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
    return {name: column.to(dtype) for name, column in batches.items()}


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

    def update_critics(self, batch: dict[str, Tensor], noise: Tensor) -> None:
        with torch.no_grad():
            actions, logprobs = self.policy(batch["next_obs"], noise)
            least = torch.stack(self.q(self.targets, batch["next_obs"], actions)).min(0).values
            value = least - self.log_alpha.exp() * logprobs
            y = torch.where(batch["terminated"] == 1, batch["rewards"], batch["rewards"] + batch["discounts"] * value)
        q = self.q(self.critics, batch["obs"], batch["actions"])
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

    def train(self, batches: dict[str, Tensor], first: int, generator: torch.Generator) -> None:
        numbers, frequency = range(first, first + len(batches["rewards"])), self.args.policy_frequency
        draws = len(numbers) + frequency * sum(number % frequency == 0 for number in numbers)
        noise = iter(torch.randn(draws, BATCH, ACTIONS, generator=generator).double())  # in the order of its use
        for k, number in enumerate(numbers):
            batch = {name: column[k].double() for name, column in batches.items()}
            self.update_critics(batch, next(noise))
            if number % frequency == 0:
                for _ in range(frequency):
                    self.update_actor(batch["obs"], next(noise))
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
    learner, ours, theirs, first = make_learner(agent, args), rng(), rng(), 1
    for updates in (1, 4, 2, 5):  # one call or several: the count goes on
        batches = make_batches(updates, first, torch.float64)
        plain.history.clear()
        metrics = train(learner, batches, first, ours, args)
        plain.train(batches, first, theirs)
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
    learner, before = make_learner(agent, args), snapshot(agent)
    metrics = train(learner, make_batches(2), 1, rng(), args)
    assert "losses/actor_loss" not in metrics
    assert not moved(agent, before, "actor")
    metrics = train(learner, make_batches(10), 3, rng(), args)  # updates 3 to 12
    assert len(metrics["losses/actor_loss"]) == 12
    assert len(metrics["losses/qf_loss"]) == 10


def test_networks_see_normalised_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    args = make_args(norm_obs=True)
    agent = make_agent(args).double()
    agent.obs_normalizer.update(5 + 3 * torch.randn(100, OBS))
    batches = make_batches(3, dtype=torch.float64)
    mean, deviation = agent.obs_normalizer.mean, (agent.obs_normalizer.var + 1e-8).sqrt()
    normalised = dict(batches)
    for name in ("obs", "next_obs"):
        normalised[name] = (batches[name] - mean) / deviation
    plain = PlainSAC(agent, args, -ACTIONS)
    plain.train(normalised, 1, rng())
    train(make_learner(agent, args), batches, 1, rng(), args)
    plain.check(agent)
    raw, noise = 4 + torch.randn(6, OBS).double(), torch.randn(6, ACTIONS).double()
    inputs = (raw - mean) / deviation
    torch.testing.assert_close(agent.act(raw, noise), agent.policy(inputs, noise)[0])
    torch.testing.assert_close(agent.greedy(raw), agent.policy(inputs, torch.zeros(6, ACTIONS))[0])


def test_bytes_reach_the_networks_as_numbers() -> None:
    args = make_args(activation="relu")
    agent = make_agent(args)
    images = torch.randint(0, 256, (4, OBS), dtype=torch.uint8)
    torch.testing.assert_close(agent.greedy(images), agent.greedy(images.float()))


def test_the_update_of_the_actor_leaves_the_critics_alone() -> None:
    args = make_args()
    agent = make_agent(args)
    learner, batches = make_learner(agent, args), make_batches(1)
    train(learner, batches, 1, rng(), args)  # moments of Adam are not zero any more
    before, optimizer = snapshot(agent), copy.deepcopy(learner.q_optimizer.state_dict())
    assert all(parameter.grad is None for parameter in agent.critics.parameters())
    learner.update_actor(batches["obs"][0], torch.randn(BATCH, ACTIONS))
    assert all(parameter.grad is None for parameter in agent.critics.parameters())
    assert [moved(agent, before, part) for part in PARTS] == [True, True, False, False]
    for key, value in learner.q_optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, optimizer["state"][0][key])
    for parameter in agent.critics.parameters():  # nothing is added to what is there either
        parameter.grad = torch.full_like(parameter, 7.0)
    learner.update_actor(batches["obs"][0], torch.randn(BATCH, ACTIONS))
    assert all((parameter.grad == 7).all() for parameter in agent.critics.parameters())


@pytest.mark.parametrize("autotune", [True, False])
def test_what_is_averaged_for_the_actor_is_its_gradient_and_that_of_the_temperature(autotune: bool) -> None:
    args = make_args(autotune=autotune)
    agent = make_agent(args)
    learner = make_learner(agent, args)
    calls = []
    with mock.patch.object(learner_module, "average", lambda fabric, tensor: calls.append(tensor)):
        learner.update_actor(torch.randn(4, OBS), torch.randn(4, ACTIONS))
    (averaged,) = calls
    assert averaged is learner.actor.vector.grad
    assert averaged.numel() == sum(p.numel() for p in agent.actor.parameters()) + autotune


def test_the_update_of_the_critics_leaves_actor_temperature_and_targets_alone() -> None:
    args = make_args()
    agent = make_agent(args)
    learner, before = make_learner(agent, args), snapshot(agent)
    batches = learner.prepare(make_batches(1))
    batch = learner.next_actions({name: column[0] for name, column in batches.items()}, torch.randn(BATCH, ACTIONS))
    learner.update_critics(batch)
    assert [moved(agent, before, part) for part in PARTS] == [False, False, True, False]
    after = snapshot(agent)
    learner.update_targets()
    for name, value in agent.target_critics.named_parameters():  # θ̄ ← 0.1 θ + 0.9 θ̄
        expected = 0.1 * after[f"critics.{name}"] + 0.9 * before[f"target_critics.{name}"]
        torch.testing.assert_close(value.detach(), expected)
    assert [moved(agent, after, part) for part in PARTS] == [False, False, False, True]


@pytest.mark.parametrize(("target_entropy", "sign"), [(5.0, 1), (-20.0, -1)])
def test_the_temperature_moves_towards_the_target_entropy(target_entropy: float, sign: int) -> None:
    args = make_args(target_entropy=target_entropy)
    agent = make_agent(args)
    learner, last = make_learner(agent, args), agent.log_alpha.item()
    for _ in range(5):
        learner.update_actor(torch.randn(BATCH, OBS), torch.randn(BATCH, ACTIONS))
        assert sign * (agent.log_alpha.item() - last) > 0
        used = learner.metrics()["losses/alpha"]
        assert used.item() == pytest.approx(math.exp(last))
        last = agent.log_alpha.item()


def test_the_target_entropy_is_minus_the_number_of_actions_unless_it_is_given() -> None:
    for given, used in ((None, -2.0), (-0.7, -0.7), (0.0, 0.0)):
        args = make_args(target_entropy=given)
        assert make_learner(make_agent(args), args).target_entropy == used


def test_networks_without_a_written_gradient_learn_alike_by_the_vjp_that_the_readme_shows() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(def vjp.*?)```", readme, re.DOTALL)
    shown: dict[str, Any] = {"torch": torch}
    exec(code, shown)
    args = make_args()
    agents = [make_agent(args)]
    agents.append(copy.deepcopy(agents[0]))
    for network in (agents[1].critics, agents[1].actor):
        network.vjp = MethodType(shown["vjp"], network)  # type: ignore[method-assign]
    before, losses = snapshot(agents[0]), []
    for agent in agents:
        losses.append(train(make_learner(agent, args), make_batches(3), 1, rng(), args))
    for name, value in agents[0].state_dict().items():
        torch.testing.assert_close(value, agents[1].state_dict()[name], rtol=0, atol=2e-4)
    for name, values in losses[0].items():
        torch.testing.assert_close(values, losses[1][name], rtol=1e-4, atol=1e-5)
    assert [moved(agents[1], before, part) for part in PARTS] == [True] * 4


def test_terminal_states_are_not_bootstrapped_and_time_limits_are_from_the_last_observation() -> None:
    args = make_args()
    agent, gamma = make_agent(args), 0.9
    rb = ReplayBuffer(8, 2, Box(-9, 9, (OBS,), np.float32), ACTIONS, gamma)
    first, final, reset = np.zeros((2, OBS)), np.full((2, OBS), 0.5), np.full((2, OBS), -0.7)
    rb.start(first)
    infos = {"final_obs": np.array([*final, None], dtype=object)[:2]}
    rewards, terminated = np.array([1.0, 2.0]), np.array([True, False])  # environment 1 runs into a time limit
    rb.add(np.zeros((2, ACTIONS)), reset, rewards, terminated, ~terminated, infos)
    learner = make_learner(agent, args)
    batches = learner.prepare(rb.sample(1, 64, rng()))
    noise = torch.randn(64, ACTIONS, generator=rng(5))
    batch = learner.next_actions({name: column[0] for name, column in batches.items()}, noise)
    targets = learner.td_targets(batch)
    plain = PlainSAC(agent, args, -2.0)
    obs = torch.tensor(final[:1]).expand(64, -1)
    actions, logprobs = plain.policy(obs, noise.double())
    values = torch.stack(plain.q(plain.targets, obs, actions)).min(0).values - args.alpha * logprobs
    ended = batch["rewards"] == 1.0
    assert 0 < ended.sum() < 64
    assert (targets[ended] == 1.0).all()
    torch.testing.assert_close(targets[~ended].double(), (2 + gamma * values)[~ended], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("column", ["rewards", "obs", "next_obs", "actions"])
def test_a_number_that_is_not_finite_ends_the_update_in_an_error(column: str) -> None:
    args = make_args()
    learner, batches = make_learner(make_agent(args), args), make_batches(4)
    batches[column][2, 3] = math.nan
    batches["terminated"][:] = 0
    with pytest.raises(NonFiniteError, match="losses/qf_loss"):
        train(learner, batches, 1, rng(), args)


def test_large_finite_losses_are_not_taken_for_infinite_ones() -> None:
    args = make_args()
    learner, batches = make_learner(make_agent(args), args), make_batches(4)
    batches["rewards"][:] = 1e15
    train(learner, batches, 1, rng(), args)


def test_compiling_ahead_changes_nothing() -> None:
    args = make_args()
    agents = [make_agent(args)]
    agents.append(copy.deepcopy(agents[0]))
    learners = [make_learner(agent, args) for agent in agents]
    compile_ahead(learners[0])
    assert all(parameter.grad is None for parameter in agents[0].parameters())
    for learner in learners:
        train(learner, make_batches(4), 1, rng(), args)
    for name, value in agents[0].state_dict().items():
        assert torch.equal(value, agents[1].state_dict()[name]), name


def assert_half_precision_follows(train: Callable, agent: SACAgent, args: Any, batches: dict, **more: Any) -> None:
    """An update in bf16-mixed has nearly the losses of one in full precision, not the same, and full parameters."""
    twin, losses = copy.deepcopy(agent), []
    for precision, learns in (("32-true", agent), ("bf16-mixed", twin)):
        learner = Learner(Fabric(accelerator="cpu", devices=1, precision=precision), learns, args, **more)
        losses.append(train(learner, batches, 1, rng(), args))
    full, half = losses
    for name, values in full.items():
        torch.testing.assert_close(half[name], values, rtol=0.1, atol=0.05)
    assert not torch.equal(half["losses/qf_loss"], full["losses/qf_loss"])
    assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())


def test_half_precision_follows_the_full_one_and_keeps_parameters_in_it() -> None:
    args = make_args(policy_lr=1e-3, q_lr=1e-3)
    assert_half_precision_follows(train, make_agent(args), args, make_batches(4))


def test_a_restored_learner_goes_on_as_the_one_that_was_stored() -> None:
    args = make_args()
    agent = make_agent(args)
    learner = make_learner(agent, args)
    train(learner, make_batches(4), 1, rng(1), args)
    file = io.BytesIO()
    torch.save({"agent": agent.state_dict(), "learner": learner.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make_agent(args)
    restored = make_learner(other, args)
    other.load_state_dict(state["agent"])
    restored.load_state_dict(state["learner"])
    for learning in (learner, restored):
        train(learning, make_batches(5), 5, rng(2), args)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


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
    agent, other = make_agent(before), make_agent(after)
    other.load_state_dict(agent.state_dict())
    restored = make_learner(other, after)
    restored.load_state_dict(make_learner(agent, before).state_dict())
    assert [group["lr"] for group in restored.q_optimizer.param_groups] == [after.q_lr]
    assert [group["lr"] for group in restored.actor_optimizer.param_groups] == [after.policy_lr]
    assert other.alpha.item() == pytest.approx(alpha)


@pytest.mark.parametrize(("then", "words"), [(True, "was learned there"), (False, "was fixed there")])
def test_a_temperature_that_was_learned_is_not_fixed_later_nor_the_other_way_round(then: bool, words: str) -> None:
    before, after = make_args(autotune=then), make_args(autotune=not then)
    stored = make_learner(make_agent(before), before)
    train(stored, make_batches(2), 1, rng(), before)
    with pytest.raises(CheckpointError, match=f"--autotune: the temperature {words}"):
        make_learner(make_agent(after), after).load_state_dict(stored.state_dict())


@pytest.mark.parametrize("part", ["critics", "actor"])
def test_a_parameter_that_is_not_finite_is_noticed_though_no_loss_was_computed_with_it_yet(part: str) -> None:
    args = make_args()
    learner = make_learner(make_agent(args), args)
    train(learner, make_batches(2), 1, rng(), args)
    getattr(learner, part).vector.data[3] = math.inf
    with pytest.raises(NonFiniteError, match=part):
        learner.metrics()


def schedule(ratio: float, world_size: int = 1, rank: int = 0, **changes: Any) -> UpdateSchedule:
    settings = {"learning_starts": 100, "batch_size": 10, "total_timesteps": 10**7}
    fabric = SimpleNamespace(world_size=world_size, global_rank=rank)
    return UpdateSchedule(SACArgs(replay_ratio=ratio, **(settings | changes)), fabric)


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


def test_half_precision_does_not_round_what_the_critics_are_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric rounds every tensor that it finds among the inputs of a module."""
    args, seen = make_args(), {}
    monkeypatch.setattr(
        learner_module, "critic_loss", lambda q, targets: seen.update(targets=targets) or critic_loss(q, targets)
    )
    learner = Learner(Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), make_agent(args), args)
    batch = {name: column[0] for name, column in learner.prepare(make_batches(1)).items()}
    batch = learner.next_actions(batch, torch.randn(BATCH, ACTIONS))
    expected = learner.td_targets(batch)
    assert (expected != expected.bfloat16().float()).any()
    learner.update_critics(batch)
    assert torch.equal(seen["targets"], expected)
