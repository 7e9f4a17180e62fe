"""Recurrent PPO, SAC and DroQ on environments that are tensors: what PPO does in test_tensors.py."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl import evaluate
from fabricrl.algos.droq import droq, droq_decoupled
from fabricrl.algos.off_policy import replay as off_policy
from fabricrl.algos.off_policy.updates import SampleAndTrain
from fabricrl.algos.ppo_recurrent import ppo_recurrent, ppo_recurrent_decoupled
from fabricrl.algos.ppo_recurrent.agent import make_agent
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac, sac_decoupled
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.tensor_episodes import TensorEpisodes
from fabricrl.data import DeviceRecurrentRolloutBuffer, RecurrentRolloutBuffer, ReplayBuffer, TensorReplayBuffer
from fabricrl.envs import make_envs
from fabricrl.envs.spaces import rescale_actions
from fabricrl.envs.tensors import takes_tensors
from fabricrl.models.models import DropoutMasks
from fabricrl.models.recurrent import FixedSequences, RecurrentCore, Sequences
from fabricrl.utils.errors import CheckpointError, ConfigError, EnvError, NonFiniteError
from fabricrl.utils.metric import DeviceEpisodes
from tests.conftest import BareRun, NoValues, Trained
from tests.process import differences, load, run_folder, run_team
from tests.test_tensors import LATER, MODES, NUMBERED, SIMULATOR, rollouts

CPU = torch.device("cpu")
STEERED = "tests.tensor_envs:Steered-v0"
TINY: list[Any] = ["--hidden-sizes", 8, "--norm-obs"]
OFF_POLICY: list[Any] = [*TINY, "--num-envs", 4, "--total-timesteps", 320, "--learning-starts", 96, "--batch-size", 8]
OFF_POLICY += ["--n-step", 3, "--buffer-size", 120, "--gamma", 0.9, "--num-threads", 1]
RECURRENT: list[Any] = [*TINY, "--num-envs", 8, "--num-steps", 16, "--total-timesteps", 512, "--rnn-hidden-size", 8]
RECURRENT += ["--norm-reward", "--prev-reward", "--prev-action", "--update-epochs", 2, "--sequence-length", 8]
SCRIPTS: dict[str, tuple[Any, list[Any]]] = {
    "ppo_recurrent": (ppo_recurrent, [*RECURRENT, "--env-id", NUMBERED]),
    "sac": (sac, [*OFF_POLICY, "--env-id", STEERED]),
    "droq": (droq, [*OFF_POLICY, "--env-id", STEERED, "--replay-ratio", 1]),
}
ALGOS = pytest.mark.parametrize("algo", SCRIPTS)
OFF = pytest.mark.parametrize("algo", ["sac", "droq"])


@pytest.fixture(autouse=True)
def drawn_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a CPU asks how many units have been dropped."""
    monkeypatch.setattr(
        DropoutMasks, "draw", lambda masks, count, rng: (torch.rand(count, generator=rng) >= masks.rate).float()
    )


# --- Memory


def some_dones(steps: int, envs: int) -> Tensor:
    return torch.rand(steps, envs, generator=torch.Generator().manual_seed(4)) < 0.2


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_memory_that_is_zeroed_within_sequences_teaches_what_sequences_cut_at_ends_do(kind: str, layers: int) -> None:
    """Outputs and gradients, of sequences as long as the rollout."""
    dones, core = some_dones(12, 5), RecurrentCore(kind, 3, 4, layers)
    rng = torch.Generator().manual_seed(1)
    x, weights = torch.randn(60, 3, generator=rng), torch.randn(60, 4, generator=rng)
    states = torch.randn(60, core.state_size, generator=rng)
    states[1:][dones.T.flatten()[:-1]] = 0.0  # as memory is stored
    found = []
    for sequences in (Sequences(dones, 12), Sequences.cut(dones, 12, 1, stays=True)):
        layout = sequences.in_order()
        outputs = core(x, states[layout.first], layout)
        core.zero_grad()
        (outputs * weights).sum().backward()
        found.append([outputs.detach(), *(parameter.grad.clone() for parameter in core.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "envs", "length", "count", "expected"),
    [(16, 8, 128, 4, 16), (16, 8, 5, 4, 4), (7, 8, 128, 4, 7), (12, 3, 128, 4, 3), (5, 2, 128, 5, 1), (6, 4, 4, 2, 3)],
)
def test_sequences_of_one_length_hold_each_row_once(
    steps: int, envs: int, length: int, count: int, expected: int
) -> None:
    """As many steps as divide a rollout and a minibatch; memory is zeroed at first rows of episodes but a rollout's."""
    dones = some_dones(steps, envs)
    sequences = FixedSequences(dones, length, count)
    assert sequences.length == expected
    with NoValues():
        rows, layouts = sequences.minibatches(count, torch.Generator().manual_seed(1))
    assert sorted(rows.flatten().tolist()) == list(range(steps * envs))
    begins = torch.cat((torch.zeros(1, envs, dtype=torch.bool), dones[:-1])).T.flatten()
    for minibatch, layout in zip(rows, layouts, strict=True):
        size, number = layout.size
        assert (size, size * number) == (expected, len(minibatch))
        assert torch.equal(layout.resets, begins[minibatch])
        side_by_side = torch.empty(size * number, dtype=torch.int64)
        side_by_side[layout.place] = minibatch
        table = side_by_side.view(size, number)
        assert torch.equal(table[0], minibatch[layout.first[:number]])
        assert torch.equal(table, table[0] + torch.arange(size)[:, None])
        assert torch.equal(table[0] // steps, table[-1] // steps), "a sequence goes on in another environment"


# --- Rollouts


def played(kwargs: str, steps: int = 12) -> tuple[Any, DeviceRecurrentRolloutBuffer, list[tuple], Any]:
    """A rollout of numbered episodes on the device, the steps that it is made of, and an agent that remembers."""
    args = RecurrentPPOArgs(
        env_id=NUMBERED, env_kwargs=kwargs, num_envs=8, num_steps=steps, hidden_sizes=(8,), norm_reward=True,
        rnn_hidden_size=4, prev_action=True, prev_reward=True, sequence_length=steps, num_minibatches=1,
    )  # fmt: skip
    envs: Any = make_envs(args, 0, Path())
    run = BareRun(args, action_space=envs.single_action_space)
    run.uses_tensor_envs, run._envs, run.obs_space = True, envs, envs.single_observation_space  # type: ignore[misc]
    agent, seen = make_agent(args, envs), []
    rb: Any = run.rollout_buffer(agent)
    rb.start(envs.reset(seed=3)[0])
    step = envs.step
    envs.step = lambda actions: seen.append((actions, step(actions))) or seen[-1][1]
    ppo_recurrent.rollout(run, agent, envs, rb)
    return run, rb, seen, agent


@MODES
def test_memory_and_advantages_are_those_of_the_same_steps_in_memory(kwargs: str) -> None:
    run, rb, seen, agent = played(kwargs)
    memory = RecurrentRolloutBuffer(12, 8, run.obs_space, 1, torch.int64, agent.memory_size, skips=kwargs == LATER)
    memory.start(rb.obs[0].numpy())
    for t, (actions, (obs, rewards, terminated, truncated, infos)) in enumerate(seen):
        arrays = {name: infos[name].numpy() for name in infos.keys() & {"final_obs", "skipped"}}
        columns = (column.numpy() for column in (actions, obs, rewards, terminated, truncated))
        memory.add(t, *columns, arrays)
        with torch.inference_mode():
            inputs, before = memory.stacked_obs(t), memory.memory_at(t)
            _, states = agent.greedy(inputs, before)  # which do not depend on the action
            memory.remember(t, agent.remember(actions, memory.rewards_at(t), states))
    assert memory.has_truncated
    assert memory.skipped.any() == (kwargs == LATER)
    torch.testing.assert_close(rb.memory, memory.memory)
    assert (rb.memory[1:][rb.ends | rb.skipped] == 0).all()
    assert (rb.memory[1:][~(rb.ends | rb.skipped)] != 0).any(1).all()
    ours, _ = ppo_recurrent.returns_and_advantages(run, agent, rb)
    agent.reward_normalizer.load_state_dict(type(agent.reward_normalizer)().state_dict())
    agent.reward_normalizer.discounted, run.uses_tensor_envs = None, False
    theirs, _ = ppo_recurrent.returns_and_advantages(run, agent, memory)
    valid = torch.ones(96) if theirs.valid is None else theirs.valid
    assert ours.columns.keys() == theirs.columns.keys()
    for name, column in theirs.columns.items():
        if column is not None:
            torch.testing.assert_close(ours.columns[name][valid > 0], column[valid > 0], rtol=1e-5, atol=1e-5)


def test_a_rollout_begins_with_the_memory_that_the_last_one_ended_with() -> None:
    _, rb, _, _ = played("{}")
    last = rb.memory[-1].clone()
    assert last.any()
    rb.start()
    assert torch.equal(rb.memory[0], last)
    rb.start(rb.obs[0].clone())
    assert not rb.memory[0].any()


# --- Replay


def stored(env_id: str, kwargs: str, steps: int, capacity: int, n_step: int = 1) -> tuple[Any, Any, list[tuple], Any]:
    """A buffer of tensors and one of arrays after the same random steps, those steps, and the first observations.

    That of arrays gets none that only reset, and is None where there are some.
    """
    args = SACArgs(env_id=env_id, env_kwargs=kwargs, num_envs=4)
    envs: Any = make_envs(args, 0, Path())
    space, rng = envs.single_observation_space, torch.Generator().manual_seed(1)
    shape = capacity * 4, 4, space, envs.single_action_space.shape[0], 0.9, n_step
    tensors, arrays = TensorReplayBuffer(*shape, CPU), None if kwargs == LATER else ReplayBuffer(*shape)
    first, _ = envs.reset(seed=3)
    tensors.start(first)
    seen: list[tuple] = []
    if arrays is not None:
        arrays.start(first.numpy())
    for _ in range(steps):
        actions = 2 * torch.rand(4, shape[3], generator=rng) - 1
        *columns, infos = envs.step(actions)
        seen.append((actions, *columns, infos))
        with NoValues():
            tensors.add(actions, *columns, infos)
        if arrays is not None:
            given = (column.numpy() for column in (actions, *columns))
            arrays.add(*given, {"final_obs": infos["final_obs"].numpy()})
    return tensors, arrays, seen, first


@pytest.mark.parametrize("env_id", [STEERED, "torch/Pendulum-v1"])
@pytest.mark.parametrize("steps", [0, 5, 11, 12, 13, 40])
def test_records_are_those_of_a_buffer_of_arrays(env_id: str, steps: int) -> None:
    """Byte by byte, also where its ring is full, and both go on from each other's state."""
    tensors, arrays, _, _ = stored(env_id, '{"max_episode_steps": 3}', steps, 12)
    assert differences(tensors.state_dict(), arrays.state_dict()) == []
    other = stored(env_id, '{"max_episode_steps": 3}', 3, 12)
    other[0].load_state_dict(arrays.state_dict())
    assert differences(other[0].state_dict(), arrays.state_dict()) == []
    assert torch.equal(other[0].newest_obs(), arrays.newest_obs())


@MODES
@pytest.mark.parametrize(("steps", "capacity"), [(9, 30), (30, 30), (100, 30)])
def test_what_is_drawn_is_every_step_that_was_played_and_no_other(kwargs: str, steps: int, capacity: int) -> None:
    """Numbers that tell episodes apart show which observation belongs to which, and actions what led to it."""
    tensors, _, seen, first = stored(STEERED, kwargs, steps, capacity)
    batch = tensors.sample(1, 50_000, torch.Generator().manual_seed(5))[0]
    names, lengths, counts = batch.obs[:, :3].unbind(1)
    assert torch.equal(batch.next_obs[:, 0], names)
    assert torch.equal(batch.next_obs[:, 2], counts + 1)
    assert torch.equal(batch.rewards, counts + 1)
    assert torch.equal(batch.terminated > 0, (counts + 1 == lengths) & (lengths != 3))
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 10.0])
    torch.testing.assert_close(batch.next_obs[:, 3:], low + (batch.actions + 1) / 2 * (high - low))
    expected: list[dict] = [{} for _ in range(4)]  # of each environment: (name, count) of its steps, in order
    obs = first
    for _, next_obs, _, _, _, infos in seen:
        for env in range(4):
            if not infos.get("skipped", torch.zeros(4))[env]:
                expected[env][obs[env, 0].item(), obs[env, 2].item()] = None
        obs = next_obs
    newest = {step for env in range(4) for step in list(expected[env])[-capacity:]}
    drawn = list(zip(names.tolist(), counts.tolist(), strict=True))
    assert set(drawn) == newest
    share = np.unique(np.array(drawn), axis=0, return_counts=True)[1] * len(newest) / len(drawn)
    assert 0.6 < share.min() < share.max() < 1.5  # uniform: 50 000 draws of at most 120


@MODES
def test_returns_over_several_steps_end_with_the_episode_or_the_newest_step(kwargs: str) -> None:
    tensors, _, seen, _ = stored(STEERED, kwargs, 50, 30, n_step=3)
    played: dict[float, int] = {}  # steps of each episode so far
    for _, _, _, _, _, infos in seen:
        for name, _, count, *_ in infos["final_obs"].tolist():
            played[name] = max(played.get(name, 0), int(count))
    batch = tensors.sample(1, 5_000, torch.Generator().manual_seed(5))[0]
    for i in range(5_000):
        name, _, count = batch.obs[i, :3].tolist()
        steps = min(3, played[name] - int(count))
        rewards = [0.9**k * (count + 1 + k) for k in range(steps)]
        assert batch.rewards[i].item() == pytest.approx(sum(rewards))
        assert batch.discounts[i].item() == pytest.approx(0.9**steps)
        assert batch.next_obs[i, [0, 2]].tolist() == [name, count + steps]


def test_a_buffer_with_steps_left_out_goes_on_where_it_was_and_is_taken_by_no_other() -> None:
    tensors, _, seen, _ = stored(STEERED, LATER, 40, 30)
    other = stored(STEERED, LATER, 3, 30)[0]
    other.load_state_dict(tensors.state_dict())
    assert differences(other.state_dict(), tensors.state_dict()) == []
    for buffer in (tensors, other):
        buffer.add(*seen[-1])
    batches = [buffer.sample(2, 100, torch.Generator().manual_seed(5)).columns for buffer in (tensors, other)]
    assert differences(*batches) == []
    arrays = ReplayBuffer(120, 4, make_envs(SACArgs(env_id=STEERED), 0, Path()).single_observation_space, 2)
    with pytest.raises(CheckpointError, match="keep its arguments"):
        arrays.load_state_dict(tensors.state_dict())


def test_parts_of_other_ranks_are_put_together_and_taken_apart() -> None:
    whole = stored(STEERED, LATER, 40, 30)[0]
    space = make_envs(SACArgs(env_id=STEERED), 0, Path()).single_observation_space
    parts = []
    for first in (0, 2):
        part = TensorReplayBuffer(60, 2, space, 2, 0.9, 1, CPU)
        part.load_shards([whole.state_dict()], first, 4)
        assert torch.equal(part.newest_obs(), whole.newest_obs()[first : first + 2])
        parts.append(part.state_dict())
    again = TensorReplayBuffer(120, 4, space, 2, 0.9, 1, CPU)
    again.load_shards(parts, 0, 4)
    (one, records), (other, others) = (
        (state, state.pop("records")) for state in (again.state_dict(), whole.state_dict())
    )
    assert differences(one, other) == []
    for name in whole._record.names or ():  # the bytes between them are of no matter
        columns = (rows.numpy().view(whole._record)[name] for rows in (records, others))
        assert np.array_equal(*columns)


def test_steps_before_a_reset_lead_nowhere() -> None:
    """A run that begins new episodes when it is resumed: no return reaches across."""
    tensors, arrays, _, first = stored(STEERED, '{"max_episode_steps": 3}', 5, 12, n_step=3)
    tensors.start(first)
    arrays.start(first.numpy())
    assert differences(tensors.state_dict(), arrays.state_dict()) == []
    before = tensors.newest_obs().clone()
    tensors.start(None)
    assert torch.equal(tensors.newest_obs(), before)
    assert differences(tensors.state_dict(), arrays.state_dict()) == []


def test_actions_are_rescaled_as_they_are_for_arrays() -> None:
    envs: Any = make_envs(SACArgs(env_id=STEERED, num_envs=4), 0, Path())
    actions = torch.tensor([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0], [-0.3, 0.7]])
    expected = torch.from_numpy(rescale_actions(envs.single_action_space, actions.numpy()))
    torch.testing.assert_close(envs.env._taken(actions), expected)
    assert rescale_actions(envs.single_action_space, actions) is actions  # type: ignore[arg-type]


def test_episodes_of_steps_that_are_noted_are_those_of_a_rollout() -> None:
    steps, whole = DeviceEpisodes(4, CPU, 2, max_steps=20), DeviceEpisodes(4, CPU)
    for columns in rollouts(3, 9, 4, 1):
        for rewards, ends, skipped, told in zip(*columns, strict=True):
            with NoValues():
                steps.add(rewards, ends, {"skipped": skipped, "episode_info": told})
        assert torch.equal(steps.take_summary(9).nan_to_num(-1), whole.summary(*columns).nan_to_num(-1))
        assert torch.equal(steps.returns, whole.returns)
    steps.add(torch.ones(4), torch.ones(4, dtype=torch.bool), {})
    told = steps.take_summary(1)[:8]
    assert told.tolist() == [(whole.returns + 1).sum(), (whole.lengths + 1).sum(), 0, 0, 4, 4, 0, 0]


# --- Runs


@ALGOS
@MODES
@pytest.mark.parametrize("simulated", [False, True], ids=["code", "simulator"])
def test_nothing_leaves_the_device_while_a_script_plays_and_learns(
    algo: str, kwargs: str, simulated: bool, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuses all that would wait for a GPU, or copy from it, but for logs."""
    calls = []

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            calls.append(function.__name__)
            with NoValues():
                return function(*args, **settings)

        return call

    script, flags = SCRIPTS[algo]
    if algo == "ppo_recurrent":
        for name in ("returns_and_advantages", "train"):
            monkeypatch.setattr(script, name, refusing(getattr(script, name)))
    monkeypatch.setattr(SampleAndTrain, "__call__", refusing(SampleAndTrain.__call__))
    for name in ("take_tensor_steps", "take_tensor_step", "update_normalizer", "count"):
        monkeypatch.setattr(Run, name, refusing(getattr(Run, name)))
    if simulated:
        if kwargs == LATER:
            pytest.skip("has one mode")
        monkeypatch.setattr("tests.tensor_envs.Simulator.looks", False)
        flags = [*flags, "--env-id", SIMULATOR]
    result = train(script.main, *flags, "--env-kwargs", kwargs)
    assert result.code == 0
    expected = {"take_tensor_step", "__call__", "count"}
    if algo == "ppo_recurrent":
        expected = {"take_tensor_steps", "returns_and_advantages", "train", "update_normalizer"}
    assert set(calls) == expected
    assert int(result.result["episodes"]) > 0


def plain_and(fixture: str, request: pytest.FixtureRequest, train: Any, script: Any, *flags: Any) -> list[Trained]:
    """The same run as it is, and with what the fixture stands in for."""
    plain = train(script.main, *flags)
    request.getfixturevalue(fixture)
    return [train(script.main, *flags, *(["--compile"] if fixture == "traced" else [])), plain]


@ALGOS
@MODES
def test_a_run_that_is_compiled_is_the_run_that_is_not(
    algo: str, kwargs: str, train: Callable[..., Trained], request: pytest.FixtureRequest
) -> None:
    script, flags = SCRIPTS[algo]
    compiled, plain = plain_and("traced", request, train, script, *flags, "--env-kwargs", kwargs)
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=1e-4, atol=1e-5)  # sums in another order
    assert differences(compiled.state["envs"]["env.state"][..., :3], plain.state["envs"]["env.state"][..., :3]) == []
    assert compiled.result["episodes"] == plain.result["episodes"]


@ALGOS
@MODES
def test_a_run_that_is_captured_is_the_run_that_is_not(
    algo: str,
    kwargs: str,
    train: Callable[..., Trained],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit; and all is captured before the first step."""
    script, flags = SCRIPTS[algo]
    recorded: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: recorded.append((run, run.runner.recordings)) or reset(run))
    captured, plain = plain_and("captured", request, train, script, *flags, "--env-kwargs", kwargs)
    run, at_start = recorded[1]
    assert run.runner.recordings == at_start > 1
    for name in ("agent", "envs", "episodes"):
        assert differences(captured.state[name], plain.state[name]) == [], name


@ALGOS
@MODES
@pytest.mark.parametrize("how", ["plain", "captured", "without its buffer"])
def test_a_resumed_run_is_the_straight_run_to_the_bit(
    algo: str, kwargs: str, how: str, train: Callable[..., Trained], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the middle of episodes; without its buffer it plays on in them."""
    script, flags = SCRIPTS[algo]
    if how == "captured":
        request.getfixturevalue("captured")
    if how == "without its buffer":
        if algo == "ppo_recurrent":
            pytest.skip("it has none")
        flags = [*flags, "--no-checkpoint-buffer"]
    saves = ["--env-kwargs", kwargs, "--checkpoint-every", 128, "--keep-checkpoints", 9]
    straight = train(script.main, *flags, *saves)
    half = straight.folder / "checkpoints" / f"step_{256:012d}.ckpt"
    resumed = train(script.main, "--resume", half, "--log-dir", tmp_path / "more")
    assert load(half)["envs"]["env.steps"].any(), "no episode was under way"
    assert straight.result["return_mean"] == resumed.result["return_mean"] or how == "without its buffer"
    names = ["agent", "envs", "episodes", "generators"] if how != "without its buffer" else []
    for name in names:
        assert differences(straight.state[name], resumed.state[name]) == [], name
    assert differences(load(half)["agent"], straight.state["agent"])
    if names and algo != "ppo_recurrent":
        assert differences(straight.state["shard"], resumed.state["shard"]) == []


@ALGOS
def test_equal_seeds_make_equal_runs_and_others_do_not(algo: str, train: Callable[..., Trained]) -> None:
    script, flags = SCRIPTS[algo]
    one, same, other = (train(script.main, *flags, "--seed", seed).state for seed in (1, 1, 2))
    for name in ("agent", "envs", "episodes"):
        assert differences(one[name], same[name]) == []
        assert differences(one[name], other[name])


@ALGOS
def test_a_resumed_run_of_two_ranks_is_the_straight_run_to_the_bit(algo: str, tmp_path: Path) -> None:
    script, flags = SCRIPTS[algo]
    flags = [*flags, "--num-envs", 2, "--total-timesteps", 256, "--checkpoint-every", 128, "--keep-checkpoints", 9]
    straight = run_team(script.__name__, *flags, "--log-dir", tmp_path / "straight", folder=tmp_path)
    folder = run_folder(tmp_path / "straight")
    half, end = (folder / "checkpoints" / f"step_{step:012d}.ckpt" for step in (128, 256))
    resumed = run_team(script.__name__, "--resume", half, "--log-dir", tmp_path / "more", folder=tmp_path)
    more = run_folder(tmp_path / "more") / "checkpoints" / end.name
    assert straight.code == resumed.code == 0
    assert load(end)["envs"]["obs"].shape[:2] == (2, 2)
    for name in ("agent", "envs", "generators"):
        assert differences(load(end)[name], load(more)[name]) == [], name


@pytest.mark.parametrize(
    ("ranks", "num_envs", "going_on", "said"),
    [
        (2, 3, 2, ""),
        (1, 3, 1, ""),
        (4, 3, 2, "episodes: they continue on 2 of 4 ranks; the others start new ones\n"),
        (2, 6, 0, "episodes: all start anew\n"),
    ],
)
def test_rank_0_says_on_how_many_ranks_episodes_go_on(
    ranks: int, num_envs: int, going_on: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    """A checkpoint has episodes of two ranks with three environments each."""
    state = {"obs": torch.zeros(2, 3, 4), "returns": torch.ones(2, 3), "lengths": torch.ones(2, 3), "device": "cpu"}
    envs: Any = SimpleNamespace(load_state_dict=lambda own: None)
    rb: Any = SimpleNamespace(running=lambda: {"obs": torch.zeros(num_envs, 4)}, go_on=lambda own: None)
    for rank in reversed(range(ranks)):  # rank 0 is the last
        assert capsys.readouterr().err == ""
        fabric: Any = SimpleNamespace(global_rank=rank, world_size=ranks, device=CPU)
        underway = TensorEpisodes(fabric, envs, num_envs, 0)
        assert underway.load_state_dict(state, rb, None, None) == (rank < going_on)
        assert underway.episodes.lengths.sum() == num_envs * (rank < going_on)
    assert capsys.readouterr().err == said


@ALGOS
def test_evaluation_plays_whole_episodes(
    algo: str, train: Callable[..., Trained], script: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """An episode of n steps earns 1 + 2 + … + n."""
    module, flags = SCRIPTS[algo]
    trained = train(module.main, *flags, "--eval-every", 160, "--eval-episodes", 5)
    assert 1 + 2 <= trained.state["best_return"] <= sum(range(6))
    assert script(evaluate.main, trained.folder, "--episodes", 10, "--mode", "greedy") == 0
    shown = capsys.readouterr().out
    low, high = map(float, re.findall(r"\((?:min) (\S+), max (\S+)\)", shown)[0])
    assert 1 + 2 <= low <= high <= sum(range(6))
    assert "is_success" in shown


@OFF
def test_a_simulator_that_tells_no_state_begins_new_episodes_when_resumed(
    algo: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    script, flags = SCRIPTS[algo]
    first = train(script.main, *flags, "--env-id", SIMULATOR)
    assert "envs" not in first.state
    second = train(script.main, "--resume", first.folder, "--total-timesteps", 480, "--log-dir", tmp_path / "more")
    assert (second.code, second.result["steps"]) == (0, "480")


@pytest.mark.usefixtures("captured")
@ALGOS
def test_of_a_simulator_only_acting_and_learning_are_captured(
    algo: str, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, flags = SCRIPTS[algo]
    runs: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append((run, run.runner.recordings)) or reset(run))
    assert train(script.main, *flags, "--env-id", SIMULATOR).code == 0
    run, at_start = runs[0]
    assert run.runner.recordings == at_start


# --- Faults


@ALGOS
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("raises", EnvError, "environments failed in step: RuntimeError: the motor is broken"),
        ("shape", EnvError, r"returned rewards from step of shape \[1\] on cpu, not \[[48]\] on cpu"),
        ("nan", NonFiniteError, "observation of environment 1 is not finite"),
        ("nan reward", NonFiniteError, "reward of environment 1 is not finite"),
    ],
)
def test_faults_of_environments_are_told_in_a_line(
    algo: str, fault: str, kind: type[Exception], words: str, train: Callable[..., Trained]
) -> None:
    script, flags = SCRIPTS[algo]
    room = [] if algo == "ppo_recurrent" else ["--buffer-size", 1000]  # for what came first
    with pytest.raises(kind, match=words) as caught:
        train(script.main, *flags, *room, "--env-id", SIMULATOR, "--env-kwargs", f'{{"fault": "{fault}"}}')
    assert "\n" not in str(caught.value)


@OFF
@pytest.mark.parametrize("flag", ["--buffer-memmap", "--implicit-next-obs", "--check-spaces"])
def test_what_keeps_steps_elsewhere_is_refused(algo: str, flag: str, train: Callable[..., Trained]) -> None:
    script, flags = SCRIPTS[algo]
    with pytest.raises(ConfigError, match=f"{flag} is set: it needs another --vectorization than torch"):
        train(script.main, *flags, "--vectorization", "torch", flag)


@pytest.mark.parametrize("twin", [ppo_recurrent_decoupled, sac_decoupled, droq_decoupled])
def test_decoupled_scripts_take_no_tensors(twin: Any, train: Callable[..., Trained]) -> None:
    env_id = "torch/CartPole-v1" if twin is ppo_recurrent_decoupled else "torch/Pendulum-v1"
    with pytest.raises(ConfigError, match="--vectorization torch: decoupled scripts play on the CPU"):
        train(twin.main, "--env-id", env_id, "--vectorization", "torch", "--devices", 2)


def test_a_gpu_with_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer lies where environments are, however much it takes of that."""
    fabric = SimpleNamespace(device=torch.device("cuda"))
    run: Any = SimpleNamespace(args=SACArgs(env_id=STEERED, buffer_size=10_000), uses_tensor_envs=True, fabric=fabric)
    run.obs_space = make_envs(run.args, 0, Path()).single_observation_space
    run.action_space = make_envs(run.args, 0, Path()).single_action_space
    for free, fits in ((2**30, True), (700_000, True), (2**10, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        if fits:
            assert off_policy.buffer_device(run) == (torch.device("cuda"), "")
        else:
            with pytest.raises(ConfigError, match="--buffer-size is 10000: the buffer would take"):
                off_policy.buffer_device(run)
    run.args = SACArgs(env_id=STEERED, buffer_device="cpu")
    with pytest.raises(ConfigError, match="--buffer-device is cpu: it must be cuda or auto where environments are"):
        off_policy.buffer_device(run)


@pytest.mark.parametrize("flag", ["--implicit-next-obs", "--capture-video", "--check-spaces"])
def test_auto_plays_the_single_form_where_an_argument_needs_it(flag: str) -> None:
    name = flag[2:].replace("-", "_")
    assert takes_tensors(SACArgs(env_id="torch/Pendulum-v1"))
    assert not takes_tensors(SACArgs(env_id="torch/Pendulum-v1", **{name: True}))
    assert takes_tensors(SACArgs(env_id="torch/Reach-v0", **{name: True}))  # which has no other; that is refused


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--env-id", "torch/Pendulum-v1"], "a smaller one may fit"),
        (["--env-id", "Pendulum-v1"], "--buffer-memmap keeps the buffer on disk, --implicit-next-obs takes less"),
        (["--env-id", "Pendulum-v1", "--implicit-next-obs"], "--buffer-memmap keeps the buffer on disk"),
    ],
)
def test_advice_for_a_buffer_that_is_too_large_is_one_that_helps(
    flags: list[str], advice: str, train: Callable[..., Trained]
) -> None:
    with pytest.raises(ConfigError, match=rf"GiB; {advice}$"):
        train(sac.main, *flags, "--buffer-size", 10**12)


def test_shorter_sequences_than_asked_for_are_told(train: Callable[..., Trained]) -> None:
    flags = ["--env-id", "torch/CartPole-v1", "--num-envs", 2, "--num-steps", 17, "--total-timesteps", 34]
    shorter = train(ppo_recurrent.main, *flags, "--sequence-length", 16, "--num-minibatches", 1)
    assert "sequences have 1 step, not --sequence-length 16" in shorter.output
    as_asked = train(ppo_recurrent.main, *flags, "--sequence-length", 17, "--num-minibatches", 2)
    assert "sequences have" not in as_asked.output


@pytest.mark.parametrize(("value", "kind"), [(0.0, EnvError), (float("nan"), NonFiniteError)])
def test_an_environment_that_fails_after_nan_fails_for_that(value: float, kind: type[Exception]) -> None:
    rb, no = TensorReplayBuffer(8, 2, Box(-1, 1, (3,), np.float32), 1, 0.9, 1, torch.device("cpu")), torch.zeros(2)
    rb.start(torch.zeros(2, 3))
    obs, ends = torch.full((2, 3), value), no.bool()
    rb.add(torch.zeros(2, 1), obs, no, ends, ends, {"final_obs": obs})
    with pytest.raises(kind), rb.checked():
        raise EnvError("the motor is broken")
