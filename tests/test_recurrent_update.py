"""Rollouts, returns and updates of recurrent PPO against plain ones that go from step to step."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, Space
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributions import Categorical

from fabricrl.algos.ppo.ppo import METRICS, update
from fabricrl.algos.ppo_recurrent.agent import RecurrentPPOAgent, make_agent
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.ppo_recurrent.ppo_recurrent import returns_and_advantages, rollout, train
from fabricrl.data import Batch, RecurrentRolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.models.recurrent import Sequences
from fabricrl.utils.batch import Outputs
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.optimizer import Adam
from tests.conftest import BareRun
from tests.envs import Counting, vectors
from tests.process import FORKSERVER, LIMIT, free_port, load
from tests.test_ppo_update import ENVIRONMENTS, SPACES, log_probability_and_entropy
from tests.test_recurrent import cell, cut, random_dones, shaken, walk

# --- Rollouts, in environments that end in every way: their rewards and observations count steps

STEPS = 7
ENDS: dict[str, dict[str, int]] = {
    "terminated": {"terminate_after": 3},
    "truncated": {"truncate_after": 4},
    "both": {"terminate_after": 5, "truncate_after": 5},
    "endless": {},
    "truncated in every step": {"truncate_after": 1},
    "truncated at the border": {"truncate_after": STEPS},
}
AGENTS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru, shared, told all": {"rnn_type": "gru", "shared_core": True, "prev_action": True, "prev_reward": True},
    "two layers, encoder, told all": {
        "rnn_layers": 2, "encoder_sizes": (4,), "prev_action": True, "prev_reward": True, "norm_obs": True,
    },
    "normalised rewards": {"norm_reward": True, "prev_reward": True},
}  # fmt: skip


class Played:
    """An agent in these environments, and its memory written out: `play` makes a rollout and follows it step by step.

    Attributes, of the last rollout, by step and environment:
        logprobs, values: [T, N]; next_values: [N], of the observation after the last step.
        final_values: (t, environment) → value of the last observation of an episode, remembering all steps before.
        forgetful: the same, remembering nothing.
    """

    def __init__(self, **changes: Any) -> None:
        settings: dict[str, Any] = {"rnn_hidden_size": 5, "hidden_sizes": (4,), "num_minibatches": 1}
        self.args = RecurrentPPOArgs(**(settings | {"num_steps": STEPS, "num_envs": len(ENDS)} | changes))
        makers = [partial(Counting, **ends) for ends in ENDS.values()]
        self.envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.agent = shaken(make_agent(self.args, self.envs))
        if self.agent.obs_normalizer is not None:
            self.agent.obs_normalizer.update(5 * torch.rand(100, 3, generator=torch.Generator().manual_seed(1)))
        self.rb = RecurrentRolloutBuffer(STEPS, len(ENDS), vectors(3), 1, torch.int64, self.agent.memory_size)
        self.rb.start(self.envs.reset(seed=0)[0])
        self.run = BareRun(self.args, action_space=self.envs.single_action_space)
        self.memory = torch.zeros(len(ENDS), self.agent.memory_size)

    @torch.no_grad()
    def play(self) -> None:
        """One rollout more; the memory that is expected goes on where the last one left it."""
        rb = self.rb
        rollout(self.run, self.agent, self.envs, rb)
        finals = {(int(t), int(env)): obs for t, env, obs in zip(*rb.truncated_episodes(), strict=True)}
        logprobs, values = [], []
        self.final_values, self.forgetful = {}, {}
        for t in range(STEPS):
            torch.testing.assert_close(rb.memory[t], self.memory, rtol=1e-5, atol=1e-6)
            logits, value, states = self.step(rb.obs[t], self.memory)
            logprobs.append(Categorical(logits=logits).log_prob(rb.actions[t, :, 0]))
            values.append(value)
            parts = [torch.eye(2)[rb.actions[t, :, 0]]] * self.args.prev_action
            parts += [rb.rewards[t, :, None]] * self.args.prev_reward
            self.memory = torch.cat((*parts, states), -1)
            for env in range(len(ENDS)):
                if (t, env) in finals:
                    obs, memory = finals[t, env][None], self.memory[env : env + 1]
                    self.final_values[t, env] = self.step(obs, memory)[1].item()
                    self.forgetful[t, env] = self.step(obs, torch.zeros_like(memory))[1].item()
                if rb.dones[t, env]:
                    self.memory[env] = 0.0
        torch.testing.assert_close(rb.memory[STEPS], self.memory, rtol=1e-5, atol=1e-6)
        self.logprobs, self.values = torch.stack(logprobs), torch.stack(values)
        self.next_values = self.step(rb.obs[STEPS], self.memory)[1]

    def step(self, obs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, values, and the states of the cores after it."""
        agent = self.agent
        told, states = memory[:, : agent.num_prev], memory[:, agent.num_prev :]
        if agent.obs_normalizer is not None:
            obs = (obs - agent.obs_normalizer.mean) / (agent.obs_normalizer.var + 1e-8).sqrt()
        x, size = torch.cat((obs.float(), told), -1), agent.actor_core.state_size
        features, after = cell(agent.actor_core, x, states[:, :size])
        of_critic = features
        if agent.critic_core is not None:
            of_critic, critic_after = cell(agent.critic_core, x, states[:, size:])
            after = torch.cat((after, critic_after), -1)
        return agent.actor(features), agent.critic(of_critic)[:, 0], after

    def data(self, **changes: Any) -> dict[str, Tensor]:
        """Training data that the script makes of the rollout, each [T, N, ...]."""
        self.run.args = RecurrentPPOArgs(**(vars(self.args) | changes))
        data, _ = returns_and_advantages(self.run, self.agent, self.rb)
        columns = {name: column for name, column in data.columns.items() if column is not None}
        return {name: column.unflatten(0, (len(ENDS), STEPS)).transpose(0, 1) for name, column in columns.items()}

    def advantages(self, rewards: Tensor, bootstrap: bool = True) -> Tensor:
        """Eq. 16 as a sum: A_t = Σ_k (γλ)^k δ_{t+k}, up to the episode's or the rollout's end."""
        rb, args = self.rb, self.args
        result = torch.zeros(STEPS, len(ENDS))
        for env in range(len(ENDS)):
            for t in range(STEPS):
                for now in range(t, STEPS):
                    following = (self.next_values if now + 1 == STEPS else self.values[now + 1])[env].item()
                    if rb.dones[now, env]:
                        following = self.final_values.get((now, env), 0.0) if bootstrap else 0.0
                    delta = rewards[now, env] + args.gamma * following - self.values[now, env]
                    result[t, env] += (args.gamma * args.gae_lambda) ** (now - t) * delta
                    if rb.dones[now, env]:
                        break
        return result


@pytest.fixture(params=AGENTS)
def played(request: pytest.FixtureRequest) -> Iterator[Played]:
    made = Played(**AGENTS[request.param])
    yield made
    made.envs.close()


def test_memory_is_carried_over_borders_of_rollouts_and_zero_at_the_first_observation_of_an_episode(
    played: Played,
) -> None:
    """`play` compares the memory of every row with one that is computed step by step, from the formulas."""
    rb, endless = played.rb, list(ENDS).index("endless")
    for iteration in range(3):
        played.play()
        firsts = rb.obs[..., 0] == 0  # Counting's observation: steps taken in this episode
        assert torch.equal((rb.memory == 0).all(-1), firsts)
        assert firsts[1:].equal(rb.dones)
        last = rb.memory[STEPS].clone()
        rb.start()
        assert torch.equal(rb.memory[0], last)
        assert rb.memory[0, endless, played.agent.num_prev :].all()
        assert rb.obs[0, endless].tolist() == [(iteration + 1) * STEPS, 0, list(ENDS).index("endless")]
        assert not rb.memory[0, list(ENDS).index("truncated at the border")].any()
        with torch.no_grad():  # as an update: memory is what was thought at the time, not thought again
            played.agent.actor.out.bias.add_(0.1)
            played.agent.actor_core.rnn.weight_hh_l0.mul_(1.1)


def test_values_log_probabilities_and_advantages_are_those_of_a_loop_over_steps(played: Played) -> None:
    sums, running = [], np.zeros(len(ENDS))
    for _ in range(2):
        played.play()
        rb, rewards = played.rb, played.rb.rewards.clone()
        for t in range(STEPS):
            running = rb.rewards[t].numpy() + played.args.gamma * running
            sums.append(running)
            running = running * ~rb.dones[t].numpy()
        if played.args.norm_reward:
            rewards = (rewards / np.std(sums)).clamp(-10, 10)
        data = played.data()
        torch.testing.assert_close(data["logprobs"], played.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(data["values"], played.values, rtol=1e-5, atol=1e-5)
        advantages = played.advantages(rewards)
        torch.testing.assert_close(data["advantages"], advantages, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(data["returns"], advantages + played.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(data["actions"], rb.actions)
        assert torch.equal(data["states"], rb.memory[:-1, :, played.agent.num_prev :])
        rb.start()
    if played.args.norm_reward:
        np.testing.assert_allclose(played.agent.reward_normalizer.discounted, running, rtol=1e-5)


def test_time_limits_are_bootstrapped_with_the_memory_after_the_last_step_and_terminations_are_not(
    played: Played,
) -> None:
    """With λ = 0, A_t = r_t + γ V − V_t: what was added for the end can be read off."""
    played.agent.reward_normalizer = None
    played.play()
    rb, gamma = played.rb, played.args.gamma
    ends = [(t, env) for t, env in rb.dones.nonzero().tolist()]
    with_values, without = (played.data(gae_lambda=0.0, bootstrap_truncated=flag) for flag in (True, False))
    added = (with_values["advantages"] - without["advantages"]) / gamma
    assert set(played.final_values) == {(t, env) for t, env in ends if not rb.terminated[t, env]}
    for t, env in ends:
        expected = played.final_values.get((t, env), 0.0)
        assert added[t, env].item() == pytest.approx(expected, abs=1e-4), (t, env)
        added[t, env] = 0.0
    assert not added.any()  # and nowhere else
    differences = [abs(value - played.forgetful[place]) for place, value in played.final_values.items()]
    assert min(differences) > 1e-3, "memory makes no difference"


def test_memory_outlasts_a_lost_life_and_no_episode() -> None:
    rb = RecurrentRolloutBuffer(1, 3, vectors(1), 1, torch.float32, memory_size=2)
    rb.start(np.zeros((3, 1), np.float32))
    nothing, ended = np.zeros(3, np.float32), np.array([False, False, True])
    infos = {"life_lost": np.array([False, True, False]), "final_obs": np.zeros((3, 1), np.float32)}
    rb.add(0, np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32), nothing, ended, ended & False, infos)
    rb.remember(0, torch.ones(3, 2))
    assert rb.memory[1].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert rb.dones.tolist() == [[False, True, True]]  # no return flows from one life to the next


def test_the_value_after_the_last_step_remembers_the_rollout(played: Played) -> None:
    played.agent.reward_normalizer = None
    played.play()
    data = played.data(gae_lambda=0.0)
    rb, endless = played.rb, list(ENDS).index("endless")
    deltas = data["advantages"][-1] - rb.rewards[-1] + played.values[-1]
    torch.testing.assert_close(deltas[endless] / played.args.gamma, played.next_values[endless], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        forgetful = played.step(rb.obs[-1], torch.zeros_like(rb.memory[-1]))[1][endless]
    assert abs(forgetful - played.next_values[endless]) > 1e-3


def test_inputs_are_in_the_order_of_sequences_and_normalised_once(played: Played) -> None:
    played.play()
    data = played.data()
    agent, rb = played.agent, played.rb
    obs = rb.obs[:-1]
    if agent.obs_normalizer is not None:
        obs = ((obs - agent.obs_normalizer.mean) / (agent.obs_normalizer.var + 1e-8).sqrt()).float()
    torch.testing.assert_close(data["obs"], obs)
    assert torch.equal(data["previous"], rb.memory[:-1, :, : agent.num_prev])


def test_a_rollout_with_a_bad_number_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    """Also if the agent is told the reward, and acts on NaN until the rollout ends."""
    env_kwargs = '{"kind": "reward_nan", "at_step": 4, "only_seed": 1, "continuous": true}'
    args = RecurrentPPOArgs(env_id="tests.envs:Fault-v0", env_kwargs=env_kwargs, prev_reward=True, prev_action=True)
    envs = make_envs(args, 0, tmp_path)
    agent = make_agent(args, envs)
    rb = RecurrentRolloutBuffer(STEPS, 8, vectors(2), 1, torch.float32, agent.memory_size)
    rb.start(envs.reset(seed=0)[0])
    with pytest.raises(NonFiniteError, match="reward of environment 1 is not finite after step 4"):
        rollout(BareRun(args, action_space=envs.single_action_space), agent, envs, rb)
    envs.close()


# --- The update

T, N = 16, 2


def learning(kind: str, tmp_path: Path, **changes: Any) -> tuple[BareRun, RecurrentPPOAgent, Any]:
    """A run, its agent and a rollout of it, with an end or two in each environment."""
    env_id = ENVIRONMENTS[kind][0]
    env_kwargs = '{"length": 5, "truncate": true}' if kind == "Discrete" else '{"length": 5}'
    settings: dict[str, Any] = {"num_steps": T, "num_envs": N, "rnn_hidden_size": 6, "hidden_sizes": (8,)}
    settings |= {"learning_rate": 1 / 64, "num_minibatches": 4, "env_id": env_id, "env_kwargs": env_kwargs}
    args = RecurrentPPOArgs(**(settings | changes))
    envs = make_envs(args, 0, tmp_path)
    torch.manual_seed(args.seed)
    agent = make_agent(args, envs)
    head, space = agent.head, envs.single_observation_space
    rb = RecurrentRolloutBuffer(T, N, space, head.num_actions, head.dtype, agent.memory_size)
    rb.start(envs.reset(seed=1)[0])
    run = BareRun(args, action_space=envs.single_action_space)
    for _ in range(2):  # the second rollout starts within an episode, from a memory
        rollout(run, agent, envs, rb)
        rb.start()
    rollout(run, agent, envs, rb)
    envs.close()
    return run, agent, rb


class Spy(nn.Module):
    """Keeps the log ratios of every minibatch, and how it was laid out."""

    def __init__(self, agent: RecurrentPPOAgent) -> None:
        super().__init__()
        self.agent = agent
        self.logratios: list[Tensor] = []
        self.sizes: list[Tensor] = []

    def forward(self, batch: Batch) -> Outputs:
        logprobs, entropy, values = self.agent(batch)
        self.logratios.append((logprobs - batch.logprobs).detach())
        self.sizes.append(batch.layout.size)
        return Outputs(logprobs, entropy, values)

    @property
    def padded(self) -> bool:
        """True if any minibatch was laid out with padding."""
        return any(size.prod() > len(logratio) for size, logratio in zip(self.sizes, self.logratios, strict=True))


class Updated:
    """Trains on a rollout; in float64, unless told otherwise, so that differences are those of formulas."""

    def __init__(self, run: BareRun, agent: RecurrentPPOAgent, rb: Any, exact: bool = True) -> None:
        args = run.args
        self.data, sequences = returns_and_advantages(run, agent, rb)
        if exact:
            agent.double()
            columns = self.data.columns.items()
            self.data = Batch(**{n: c.double() if c is not None and c.is_floating_point() else c for n, c in columns})
            layout = sequences.in_order()
            with torch.no_grad():
                states = self.data.states[layout.first]
                logprobs, _, values = agent(self.data.with_columns(states=states, layout=layout))
            self.data = self.data.with_columns(logprobs=logprobs, values=values)
        self.before, self.spy = copy.deepcopy(agent), Spy(agent)
        model, optimizer = run.setup(self.spy, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
        step = run.compiled(partial(update, run, model, optimizer))
        run.train_rng.manual_seed(3)
        metrics = train(run, step, self.data, sequences, *run.coefs(args.clip_coef, args.ent_coef))
        self.metrics = dict(zip(METRICS, metrics.unbind(1), strict=True))


def evaluated(agent: RecurrentPPOAgent, space: Space, batch: dict[str, Tensor], begins: set[int]) -> tuple:
    """Log-probabilities, entropies and values, step by step."""
    size = agent.actor_core.state_size
    inputs = torch.cat((batch["obs"], batch["previous"]), -1)
    features = values = walk(agent.actor_core, inputs, batch["states"][:, :size], begins)
    if agent.critic_core is not None:
        values = walk(agent.critic_core, inputs, batch["states"][:, size:], begins)
    logprobs, entropy = log_probability_and_entropy(agent, agent.actor(features), batch["actions"], space)
    return logprobs, entropy, agent.critic(values)[:, 0]


def plain_update(
    agent: RecurrentPPOAgent, space: Space, data: Batch, dones: Tensor, args: RecurrentPPOArgs
) -> list[dict[str, float]]:
    """PPO's inner loop as a textbook has it; no row but those of the minibatch exists."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    rng, history = torch.Generator().manual_seed(3), []
    starts = {sequence[0] for sequence in cut(dones, args.sequence_length)}
    sequences = Sequences(dones, args.sequence_length)
    for order, _ in [sequences.minibatches(args.num_minibatches, rng) for _ in range(args.update_epochs)]:
        for rows in order:
            batch = {name: column[rows] for name, column in data.columns.items() if column is not None}
            begins = {0, *(i for i, row in enumerate(rows.tolist()) if row in starts)}
            advantages = batch["advantages"]
            if args.norm_adv:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            logprobs, entropy, values = evaluated(agent, space, batch, begins)
            ratio = (logprobs - batch["logprobs"]).exp()
            clipped = advantages * torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = -torch.minimum(advantages * ratio, clipped).mean()
            v_error = (values - batch["returns"]) ** 2
            if args.clip_vloss:
                change = torch.clip(values - batch["values"], -args.clip_coef, args.clip_coef)
                v_error = torch.maximum(v_error, (batch["values"] + change - batch["returns"]) ** 2)
            v_loss = v_error.mean() / 2
            optimizer.zero_grad()
            (pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * v_loss).backward()
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            numbers = {"policy_loss": pg_loss.item(), "value_loss": v_loss.item(), "entropy": entropy.mean().item()}
            numbers["approx_kl"] = ((ratio - 1) - (logprobs - batch["logprobs"])).mean().item()
            numbers["old_approx_kl"] = -(logprobs - batch["logprobs"]).mean().item()
            outside = (ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)
            history.append(numbers | {"clipfrac": outside.double().mean().item()})
        if args.target_kl is not None and history[-1]["approx_kl"] > args.target_kl:
            break
    return history


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Discrete", {}),
        ("Discrete", {"sequence_length": 4, "num_minibatches": 2, "prev_action": True, "prev_reward": True}),
        ("Discrete", {"norm_adv": False, "clip_vloss": False, "max_grad_norm": 0.0, "shared_core": True}),
        ("Discrete", {"clip_coef": 0.03, "ent_coef": 0.3, "vf_coef": 2.0, "max_grad_norm": 0.1, "rnn_type": "gru"}),
        ("Box", {"rnn_type": "gru", "shared_core": True, "prev_action": True, "encoder_sizes": (4,)}),
        ("Box", {"target_kl": 0.01, "update_epochs": 10, "num_minibatches": 1, "activation": "relu"}),
        ("MultiDiscrete", {"rnn_layers": 2, "prev_action": True}),
        ("MultiBinary", {"sequence_length": 3, "hidden_sizes": ()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_an_update_equals_the_plain_one(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run, agent, rb = learning(kind, tmp_path, **changes)
    args, updated = run.args, Updated(run, agent, rb)
    assert updated.spy.padded or args.num_minibatches == 1, "no minibatch was padded"
    plain = copy.deepcopy(updated.before)
    history = plain_update(plain, SPACES[kind], updated.data, rb.dones, args)
    moved = 0.0
    parameters = zip(agent.named_parameters(), plain.parameters(), updated.before.parameters(), strict=True)
    for (name, ours), theirs, before in parameters:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=name)
        moved = max(moved, (theirs - before).abs().max().item())
    assert moved > 0.01
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "old_approx_kl"):
        theirs = torch.tensor([numbers[name] for numbers in history], dtype=torch.float64)  # of each, in order
        torch.testing.assert_close(updated.metrics[f"losses/{name}"], theirs, rtol=1e-6, atol=1e-9, msg=name)
    if args.target_kl is not None:
        assert 1 < len(history) < args.update_epochs  # it did stop, and not at once


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("changes", [{"rnn_layers": 2}, {"rnn_type": "gru", "shared_core": True}], ids=str)
def test_a_recorded_update_equals_the_plain_one_however_the_sequences_fall(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    exact = {"clip_coef": 0.25, "ent_coef": 1 / 64, "sequence_length": 5}  # coefficients that float32 holds
    run, agent, rb = learning("Discrete", tmp_path, compile=True, **exact, **changes)
    updated = Updated(run, agent, rb)
    plain = copy.deepcopy(updated.before)
    history = plain_update(plain, SPACES["Discrete"], updated.data, rb.dones, run.args)
    for (name, ours), theirs in zip(agent.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)  # Adam counts its steps in float32
    losses = [numbers["policy_loss"] for numbers in history]
    assert updated.metrics["losses/policy_loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert run.runner.recordings == 1  # of 16 minibatches


@pytest.mark.parametrize("sequence_length", [3, 128])
@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_the_first_minibatch_sees_ratio_one(rnn_type: str, kind: str, sequence_length: int, tmp_path: Path) -> None:
    """In the precision that it runs in, though it is packed in another way than the rollout was, and cut elsewhere."""
    run, agent, rb = learning(
        kind, tmp_path, rnn_type=rnn_type, sequence_length=sequence_length, prev_action=True, prev_reward=True
    )
    logratios = Updated(run, agent, rb, exact=False).spy.logratios
    assert logratios[0].abs().max() < 1e-5
    assert logratios[1].abs().max() > 1e-4  # by the second, the policy has moved


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_the_first_minibatch_sees_ratio_one_in_half_precision_too(
    rnn_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences run in float32: autocast would have cuDNN take float16 for them, also in place of bfloat16."""
    kernel, calls = getattr(torch, rnn_type), []

    def watched(x: Tensor, *rest: Any) -> Any:
        calls.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return kernel(x, *rest)

    monkeypatch.setattr(torch, rnn_type, watched)
    changes: dict[str, Any] = {"rnn_type": rnn_type, "num_minibatches": 1, "update_epochs": 1}
    run, agent, rb = learning("Box", tmp_path, precision="bf16-mixed", **changes)
    updated = Updated(run, agent, rb, exact=False)
    assert updated.spy.logratios[0].abs().max() < 1e-5
    assert (updated.before.actor.out.weight != agent.actor.out.weight).any()
    assert updated.data.logprobs.dtype == updated.data.values.dtype == torch.float32
    assert set(calls) == {(False, torch.float32)}


def test_truncated_episodes_bootstrap_in_the_precision_of_the_run(tmp_path: Path) -> None:
    """As rollouts do that are cut off."""
    run, agent, rb = learning("Discrete", tmp_path, precision="bf16-mixed", gae_lambda=0.0)
    t, env, final_obs = rb.truncated_episodes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        final_values = agent.value(final_obs, rb.final_memory()).float()
    returns = returns_and_advantages(run, agent, rb)[0].returns.view(N, T).T  # [T, N]
    torch.testing.assert_close(returns[t, env] - rb.rewards[t, env], run.args.gamma * final_values)
    assert (final_values - agent.value(final_obs, rb.final_memory())).abs().max() > 1e-4


def test_sequences_begin_in_the_memory_that_was_stored_for_their_first_row(tmp_path: Path) -> None:
    """Another state stored for a row changes what follows it in its sequence, if it is the first, and nothing else."""
    run, agent, rb = learning("Discrete", tmp_path, sequence_length=4)
    sequences = Sequences(rb.dones, 4)
    starts = {sequence[0]: sequence for sequence in cut(rb.dones, 4)}

    def values() -> Tensor:
        return returns_and_advantages(run, agent, rb)[0].values

    before = values()
    assert sorted(starts) == sequences.in_order().first[: len(starts)].tolist()
    for row in range(T * N):
        stored = rb.memory[row % T, row // T].clone()
        rb.memory[row % T, row // T] += 1.0
        changed = (values() != before).nonzero()[:, 0].tolist()
        rb.memory[row % T, row // T] = stored
        assert changed == starts.get(row, []), row


# --- Ranks


def share_of(rank: int, world_size: int, envs: int = 4, steps: int = 12) -> tuple[Batch, Sequences]:
    """A rank's environments of a rollout, in which those of the second half live in another world."""
    rng = torch.Generator().manual_seed(5)
    second = (torch.arange(envs * steps) >= envs * steps // 2).float()
    data = {
        "obs": torch.randn(envs * steps, 3, generator=rng) + second[:, None],
        "actions": torch.randint(4, (envs * steps, 1), generator=rng),
        "previous": torch.empty(envs * steps, 0),
        "states": torch.randn(envs * steps, 24, generator=rng),
        "logprobs": -1.4 + 0.2 * torch.randn(envs * steps, generator=rng),
        "values": torch.randn(envs * steps, generator=rng),
        "advantages": torch.randn(envs * steps, generator=rng) * (1 + 3 * second) + 2 * second,
        "returns": torch.randn(envs * steps, generator=rng) + second,
    }
    own = slice(rank * envs // world_size, (rank + 1) * envs // world_size)
    rows = slice(own.start * steps, own.stop * steps)
    sequences = Sequences(random_dones(steps, envs, 0.2, 7)[:, own], 5)
    return Batch(valid=None, **{name: column[rows] for name, column in data.items()}), sequences


class GradientDescent(Adam):
    """At rate 1 it moves the parameters by the gradient itself."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            self.flat.vector.sub_(self.gradient)
        self.flat.grad = None


def train_share(rank: int, world_size: int, port: int, shared: bool, path: str) -> None:
    """One update on this rank's share, by gradient descent and by Adam; writes the parameters that come out of it."""
    import os

    if world_size > 1:  # Fabric takes the place in the group that the environment names, and starts nothing itself
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    fabric.launch()
    torch.set_num_threads(1)
    args = RecurrentPPOArgs(num_envs=8, num_steps=8, num_minibatches=1, update_epochs=1, max_grad_norm=0.05)
    for kind in (GradientDescent, Adam):
        torch.manual_seed(0)
        run = BareRun(args, fabric)
        agent = RecurrentPPOAgent(vectors(3), Discrete(4), rnn_hidden_size=12 if shared else 6, shared_core=shared)
        model, optimizer = run.setup(agent, kind(agent.parameters(), 1e-3))
        start = optimizer.flat.vector.clone()
        run.train_rng.manual_seed(rank)
        train(run, partial(update, run, model, optimizer), *share_of(rank, world_size), 0.2, 0.01)
        torch.save({"start": start, "end": optimizer.flat.vector}, f"{path}.{kind.__name__}.{world_size}.{rank}")


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_two_ranks_with_half_the_environments_each_make_the_update_of_one_rank_with_all(
    shared: bool, tmp_path: Path
) -> None:
    """Gradients are averaged and advantages normalised over all ranks, before the norm is clipped."""
    path, port = str(tmp_path / "parameters"), free_port()
    ranks = [FORKSERVER.Process(target=train_share, args=(rank, 2, port, shared, path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    train_share(0, 1, 0, shared, path)
    for rank in ranks:
        rank.join(LIMIT)
        rank.kill()
        assert rank.exitcode == 0
    for kind, error in ((GradientDescent, 1e-6), (Adam, 1e-5)):
        one, first, second = (load(f"{path}.{kind.__name__}.{place}") for place in ("1.0", "2.0", "2.1"))
        assert torch.equal(one["start"], first["start"])
        assert torch.equal(first["end"], second["end"])
        torch.testing.assert_close(first["end"], one["end"], rtol=0, atol=error)
        assert (one["end"] - one["start"]).abs().max() > 5e-4, "nothing has been learned"
