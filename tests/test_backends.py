"""Back ends of `--vectorization`: with each of them, a script learns from what truly happened."""

import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import SyncVectorEnv, VectorEnv

from fabricrl.algos import run as run_module
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, minibatches, with_moments
from fabricrl.data.rollout import RecurrentRolloutBuffer, RolloutBuffer
from fabricrl.data.transitions import record_type
from fabricrl.envs import backends, make_env, make_envs
from fabricrl.envs.backends import choose
from fabricrl.envs.native import NativeVectorEnv
from fabricrl.envs.spaces import odd_images
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.seeding import env_seeds
from tests import vector_envs
from tests.conftest import SINGLE
from tests.envs import vectors
from tests.process import Finished, call, differences, load, run_folder, run_team
from tests.test_decoupled_run import content
from tests.vector_envs import Slow, StaggeredVector, Step

NUM_STEPS, NUM_ENVS, ITERATIONS = 16, 3, 5
STAGGERED: list[object] = [
    "--env-id",
    "tests.vector_envs:Staggered-v0",
    "--vectorization",
    "native",
    "--num-threads",
    1,
]
STAGGERED += ["--num-envs", NUM_ENVS, "--num-steps", NUM_STEPS, "--num-minibatches", 3, "--update-epochs", 1]
STAGGERED += ["--hidden-sizes", 16, "--total-timesteps", NUM_STEPS * NUM_ENVS * ITERATIONS, "--log-every", 1]
STAGGERED += ["--logger", "csv"]
SCRIPTS = {"ppo": ppo, "ppo_recurrent": ppo_recurrent}
MODES = ["next_step", "same_step"]


def kwargs(**settings: Any) -> list[object]:
    return ["--env-kwargs", json.dumps(settings)]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    vector_envs.MADE.clear()
    Slow.failed = 0


@pytest.fixture
def learns_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Finished, list[Step]]]:
    """Runs a script and calls `look(agent, data, sequences, steps of the rollout)` before each of its updates."""

    def run(script: ModuleType, look: Callable[..., None] | None, *flags: object) -> tuple[Finished, list[Step]]:
        original, calls = script.train, 0

        def train(run: Run, step: Any, data: Batch, *rest: Any) -> Any:
            nonlocal calls
            first = calls * NUM_STEPS
            steps = [step for step in vector_envs.MADE[-1].history if first <= step.t < first + NUM_STEPS]
            if look is not None:
                with torch.no_grad():
                    look(run._parts["agent"], data, rest[0], steps)
            calls += 1
            return original(run, step, data, *rest)

        monkeypatch.setattr(script, "train", train)
        finished = call(script.main, *STAGGERED, "--log-dir", tmp_path, *flags)
        assert calls == ITERATIONS
        return finished, vector_envs.MADE[-1].history

    return run


def of_each_env(steps: list[Step]) -> list[list[Step]]:
    return [[step for step in steps if step.env == env] for env in range(NUM_ENVS)]


def episodes(history: list[Step]) -> list[list[Step]]:
    """Those that have ended, in the order in which they did."""
    ended: list[list[Step]] = []
    for steps in of_each_env(history):
        begin = 0
        for i, step in enumerate(steps):
            if step.done:
                ended.append(steps[begin : i + 1])
                begin = i + 1
    return sorted(ended, key=lambda episode: (episode[-1].t, episode[-1].env))


def estimates(steps: list[Step], values: list[float], after: list[float]) -> tuple[list[float], list[float]]:
    """Advantages and returns of one environment's steps; `after`: the value of what each step led to."""
    gamma, decay = 0.99, 0.95
    advantages, advantage = [0.0] * len(steps), 0.0
    for i in reversed(range(len(steps))):
        surprise = steps[i].reward + (0.0 if steps[i].terminated else gamma * after[i]) - values[i]
        advantage = surprise + (0.0 if steps[i].done else gamma * decay * advantage)
        advantages[i] = advantage
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


# --- Native


@pytest.mark.parametrize("mode", MODES)
def test_ppo_learns_from_what_truly_happened_with_the_returns_of_true_episodes(
    mode: str, learns_from: Callable
) -> None:
    def look(agent: Any, data: Batch, _: Any, steps: list[Step]) -> None:
        assert mode == "same_step" or len(steps) < NUM_STEPS * NUM_ENVS
        assert (data.valid is None) == (mode == "same_step")
        if data.valid is not None:  # the others weigh nothing
            data = data[data.valid > 0]
        assert len({(step.t, step.env) for step in steps}) == len(steps) == len(data.returns)
        assert np.array_equal(data.obs, [step.obs for step in steps])
        assert data.actions[:, 0].tolist() == [step.action for step in steps]
        for env, own in enumerate(of_each_env(steps)):
            values, after = (
                agent.value(torch.from_numpy(np.stack(obs))).tolist()
                for obs in ([step.obs for step in own], [step.next_obs for step in own])
            )
            advantages, returns = estimates(own, values, after)
            rows = [i for i, step in enumerate(steps) if step.env == env]
            close(data.values[rows], values)
            close(data.advantages[rows], advantages)
            close(data.returns[rows], returns)

    _, history = learns_from(ppo, look, *kwargs(mode=mode))
    kinds = {(episode[-1].terminated, episode[-1].truncated) for episode in episodes(history)}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert {len(episode) for episode in episodes(history)} == set(range(1, 8))


@pytest.mark.parametrize("mode", MODES)
def test_recurrent_ppo_remembers_nothing_of_another_episode_and_never_sees_a_step_that_only_resets(
    mode: str, learns_from: Callable
) -> None:
    def look(agent: Any, data: Batch, sequences: Any, steps: list[Step]) -> None:
        place = [step.env * NUM_STEPS + step.t % NUM_STEPS for step in steps]  # rows are counted environment by it
        assert (data.valid is None) == (mode == "same_step")
        counted = range(NUM_STEPS * NUM_ENVS) if data.valid is None else data.valid.nonzero()[:, 0].tolist()
        assert sorted(place) == list(counted), "what counts is not what happened"
        for count in (1, 3):
            order, layouts = sequences.minibatches(count, torch.Generator())
            assert sorted(order.flatten().tolist()) == list(range(NUM_STEPS * NUM_ENVS))
            for minibatch, layout in zip(order, layouts, strict=True):
                begins = [*layout.first[: layout.size[1]].tolist(), len(minibatch)]
                for first, end in itertools.pairwise(begins):
                    rows = minibatch[first:end].tolist()
                    if not set(rows) <= set(place):
                        assert len(rows) == 1, "a step that only resets stands in a sequence of others"
                        continue
                    own = [steps[place.index(row)] for row in rows]
                    assert len({(step.env, step.obs[1]) for step in own}) == 1, "a sequence of several episodes"
                    assert np.array_equal(np.diff([step.obs[0] for step in own]), np.ones(len(own) - 1))
        assert np.array_equal(data.obs[place], [step.obs for step in steps])
        assert data.actions[place, 0].tolist() == [step.action for step in steps]
        first = [row for row, step in zip(place, steps, strict=True) if step.obs[0] == 0]
        assert first
        assert not data.states[first].any()
        assert not data.previous[first].any()
        for env, own in enumerate(of_each_env(steps)):
            rows = [row for row, step in zip(place, steps, strict=True) if step.env == env]
            values, after = replayed(agent, data, rows, own)
            advantages, returns = estimates(own, values, after)
            close(data.values[rows], values)
            close(data.advantages[rows], advantages)
            close(data.returns[rows], returns)

    flags = ["--prev-action", "--prev-reward", "--rnn-hidden-size", 8, "--sequence-length", 4]
    learns_from(ppo_recurrent, look, *kwargs(mode=mode), *flags)


def replayed(agent: Any, data: Batch, rows: list[int], steps: list[Step]) -> tuple[list[float], list[float]]:
    """Values at each step and behind it: the critic is taken through the steps, with nothing known where one begins."""

    def value(obs: np.ndarray, previous: torch.Tensor, state: torch.Tensor) -> tuple[float, torch.Tensor]:
        inputs = torch.cat((torch.from_numpy(obs), previous))[None]
        features, state = agent.critic_core.step(inputs, state[None])
        return agent.critic(features).item(), state[0]

    values, after = [], []
    nothing = torch.zeros(agent.num_prev), torch.zeros(agent.state_size)
    previous, state = data.previous[rows[0]], data.states[rows[0], agent.state_size :]
    for step in steps:
        if step.obs[0] == 0:
            previous, state = nothing
        found, state = value(step.obs, previous, state)
        values.append(found)
        previous = torch.tensor([*np.eye(3)[step.action], step.reward], dtype=torch.float32)
        after.append(value(step.next_obs, previous, state)[0])
    return values, after


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_statistics_of_episodes_and_normalisers_are_those_of_true_steps(
    name: str, mode: str, learns_from: Callable
) -> None:
    finished, history = learns_from(SCRIPTS[name], None, *kwargs(mode=mode), "--norm-obs", "--norm-reward")
    ended = episodes(history)
    state = load(finished.checkpoint)
    assert state["episodes"]["returns"] == [sum(step.reward for step in episode) for episode in ended][-100:]
    assert state["episodes"]["count"] == int(finished.result["episodes"]) == len(ended)
    with (finished.folder / "metrics.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert len(entries) == ITERATIONS
    for i, entry in enumerate(entries):
        own = [episode for episode in ended if episode[-1].t // NUM_STEPS == i]
        lengths, sums = [len(episode) for episode in own], [sum(step.reward for step in episode) for episode in own]
        assert float(entry["charts/episodic_length"]) == pytest.approx(np.mean(lengths))
        assert float(entry["charts/episodic_return"]) == pytest.approx(np.mean(sums))

    discounted = []
    for steps in of_each_env(history):
        total = 0.0
        for step in steps:
            total = step.reward + 0.99 * total
            discounted.append([total])
            total = 0.0 if step.done else total
    seen = {"obs_normalizer": np.array([step.obs for step in history]), "reward_normalizer": np.array(discounted)}
    for name, rows in seen.items():
        assert state["agent"][f"{name}.count"] == len(history)
        np.testing.assert_allclose(state["agent"][f"{name}.mean"], rows.mean(0, dtype=float), rtol=1e-5)
        np.testing.assert_allclose(state["agent"][f"{name}.var"], rows.var(0, dtype=float), rtol=1e-5)


def test_a_step_that_only_resets_earns_nothing_whatever_the_environment_says(learns_from: Callable) -> None:
    finished, history = learns_from(ppo, None, *kwargs(reset_reward=1000.0), "--norm-reward")
    state = load(finished.checkpoint)
    assert state["episodes"]["returns"] == [sum(step.reward for step in episode) for episode in episodes(history)]
    assert state["agent"]["reward_normalizer.mean"] < 100


def test_minibatches_that_skipped_steps_leave_too_small_end_no_run(learns_from: Callable) -> None:
    """Of 24 minibatches with two rows some keep one, of which no advantage can be normalised: refused, or fewer."""
    with contextlib.suppress(ConfigError):
        assert learns_from(ppo, None, "--num-minibatches", NUM_STEPS * NUM_ENVS // 2)[0].code == 0


def test_minibatches_of_one_step_or_none_have_no_advantage_and_no_weight() -> None:
    data = Batch(advantages=torch.tensor([3.0, 5.0, 7.0, 9.0]), valid=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    (epoch,) = with_moments(SINGLE, data, torch.arange(4).view(1, 2, 2))
    first, second = minibatches(data.with_columns(obs=torch.zeros(4)), epoch, norm_adv=True)
    assert (first.weights.tolist(), second.weights.tolist()) == ([1, 0], [0, 0])
    assert first.advantages[0] == 0
    assert second.advantages.isfinite().all()


def test_a_native_environment_that_is_never_reset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--vectorization native") as caught:
        call(ppo.main, *STAGGERED, *kwargs(mode="disabled"), "--log-dir", tmp_path)
    assert caught.value.exit_code == 2


def test_arguments_that_a_native_environment_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--env-kwargs") as caught:
        call(ppo.main, *STAGGERED, *kwargs(colour="red"), "--log-dir", tmp_path)
    assert caught.value.exit_code == 2


# --- Native on several ranks


def note_updates(rank: int) -> None:
    """Notes how many steps of a rollout were skipped, how many rows are learned from, and what comes out of it."""
    original, estimate = ppo.train, ppo.returns_and_advantages
    skipped = 0

    def returns_and_advantages(run: Any, model: Any, agent: Any, rb: Any) -> Any:
        nonlocal skipped
        skipped = int(rb.skipped.sum())
        return estimate(run, model, agent, rb)

    def train(run: Run, epoch: Any, data: Batch, *rest: Any) -> Any:
        result = original(run, epoch, data, *rest)
        digest = hashlib.sha256(run._optimizers[0].flat.vector.numpy().tobytes()).hexdigest()
        with open(f"{os.environ['NOTES']}.{rank}", "a") as file:
            rows = len(data.returns) if data.valid is None else int(data.valid.sum())
            print(json.dumps([skipped, rows, digest]), file=file)
        return result

    ppo.returns_and_advantages, ppo.train = returns_and_advantages, train


def test_two_ranks_that_skip_differing_numbers_of_steps_stay_equal(tmp_path: Path) -> None:
    flags = [*STAGGERED, "--norm-obs", "--norm-reward", "--log-dir", tmp_path / "logs", "--total-timesteps", 480]
    run_team(ppo.__name__, *flags, folder=tmp_path, prepare=note_updates, variables={"NOTES": str(tmp_path / "notes")})
    notes = [[json.loads(line) for line in (tmp_path / f"notes.{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert len(notes[0]) == len(notes[1]) == ITERATIONS
    assert any(first[0] != second[0] for first, second in zip(*notes, strict=True))
    for first, second in zip(*notes, strict=True):
        assert [first[1], second[1]] == [NUM_STEPS * NUM_ENVS - skipped for skipped in (first[0], second[0])]
        assert first[2] == second[2], "parameters differ"


NATIVE_CARTPOLE: list[object] = ["--env-id", "CartPole-v1", "--vectorization", "native", "--num-envs", 4]
NATIVE_CARTPOLE += ["--num-steps", 32, "--hidden-sizes", 16, "--num-threads", 1, "--total-timesteps", 640]
NATIVE_CARTPOLE += ["--checkpoint-every", 128, "--keep-checkpoints", 9, "--norm-obs", "--norm-reward"]
NATIVE_CARTPOLE += ["--learning-rate", 1e-2]


PICTURES: list[object] = [
    "--env-id",
    "tests.envs:PictureDict-v0",
    "--num-envs",
    2,
    "--num-steps",
    16,
    "--num-threads",
    1,
]
PICTURES += ["--frame-stack", 3, "--cnn-features", 16, "--clip-reward", "--total-timesteps", 160]
PICTURES += ["--checkpoint-every", 32, "--keep-checkpoints", 9, "--norm-obs", "--norm-reward", "--learning-rate", 1e-2]


@pytest.mark.parametrize("script", [ppo, ppo_recurrent], ids=["ppo", "ppo_recurrent"])
@pytest.mark.parametrize("flags", [NATIVE_CARTPOLE, PICTURES], ids=["native", "images"])
def test_decoupled_ppo_without_lag_is_coupled_ppo(script: Any, flags: list[object], tmp_path: Path) -> None:
    """On native environments, of which it leaves steps out, and on stacks of images, which travel put together."""
    one = call(script.main, *flags, "--log-dir", tmp_path / "coupled")
    apart = [*flags, "--max-lag", 0, "--log-dir", tmp_path / "logs"]
    run_team(f"{script.__name__}_decoupled", *apart, folder=tmp_path)
    checkpoints = sorted((one.folder / "checkpoints").glob("step_*"))
    assert len(checkpoints) == 5
    for path in checkpoints:
        other = run_folder(tmp_path / "logs") / "checkpoints" / path.name
        assert differences(content(path), content(other)) == []
    seen, steps = load(checkpoints[-1])["agent"]["obs_normalizer.count"], load(checkpoints[-1])["global_step"]
    assert seen < steps if flags is NATIVE_CARTPOLE else seen == steps, "steps that only reset are left out"


def test_two_ranks_learn_the_same_from_images(tmp_path: Path) -> None:
    flags = [*PICTURES, "--log-dir", tmp_path / "logs"]
    run_team(ppo.__name__, *flags, folder=tmp_path, prepare=note_updates, variables={"NOTES": str(tmp_path / "notes")})
    notes = [[json.loads(line) for line in (tmp_path / f"notes.{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert [note[2] for note in notes[0]] == [note[2] for note in notes[1]]
    assert len({str(note[2]) for note in notes[0]}) == 2, "nothing was learned"


def test_two_trainers_share_what_was_not_skipped(tmp_path: Path) -> None:
    flags = [*STAGGERED, "--num-steps", 32, "--max-lag", 1, "--log-dir", tmp_path / "logs", "--total-timesteps", 960]
    ranks = run_team("fabricrl.algos.ppo.ppo_decoupled", *flags, folder=tmp_path, world_size=3)
    assert ranks.result["steps"] == "960"
    assert load(ranks.result["checkpoint"])["optimizer"]["state"][0]["step"] == 30


# --- EnvPool


def environments(kind: str, env_id: str, num_envs: int = 1, **settings: Any) -> VectorEnv:
    return make_envs(PPOArgs(env_id=env_id, vectorization=kind, num_envs=num_envs, **settings), 0, Path())


@pytest.fixture
def pool() -> Any:
    return pytest.importorskip("envpool")


def test_envpool_has_no_step_that_only_resets(pool: Any) -> None:
    """Beside an EnvPool that is driven by hand, with the same actions in each environment's own steps."""
    num_envs, steps = 3, 80
    actions = np.random.default_rng(0).integers(2, size=(num_envs, steps)).astype(np.int32)
    theirs = pool.make("CartPole-v1", env_type="gymnasium", num_envs=num_envs, seed=5, env_seed=[5, 6, 7])
    obs, _ = theirs.reset()
    taken, ended = np.zeros(num_envs, int), np.zeros(num_envs, bool)
    expected: list[list[tuple]] = [[] for _ in range(num_envs)]
    while taken.min() < steps:
        before = obs
        obs, rewards, terminated, truncated, _ = theirs.step(actions[range(num_envs), taken.clip(max=steps - 1)])
        for env in np.flatnonzero(~ended):
            expected[env].append((before[env], rewards[env], terminated[env], truncated[env], obs[env]))
        taken += ~ended
        ended = terminated | truncated

    envs = environments("envpool", "CartPole-v1", num_envs)
    obs, _ = envs.reset(seed=[5, 6, 7])
    finals = 0
    for t in range(steps):
        before = obs.copy()
        obs, rewards, terminated, truncated, infos = envs.step(actions[:, t])
        assert "skipped" not in infos
        for env in range(num_envs):
            done = terminated[env] or truncated[env]
            finals += done
            after = infos["final_obs"][env] if done else obs[env]
            for ours, true in zip(
                (before[env], rewards[env], terminated[env], truncated[env], after), expected[env][t], strict=True
            ):
                assert np.array_equal(ours, true), (t, env)
    assert finals > 6


def trajectory(envs: VectorEnv, seeds: list[int], steps: int = 40) -> np.ndarray:
    obs = [envs.reset(seed=seeds)[0].copy()]
    rng = np.random.default_rng(0)
    for _ in range(steps):
        obs.append(envs.step(np.repeat(rng.integers(2, size=1), len(seeds)))[0].copy())
    return np.stack(obs, 1)  # [N, steps + 1, D]


def test_in_envpool_the_seed_of_an_environment_says_what_happens_in_it(pool: Any) -> None:
    envs = environments("envpool", "CartPole-v1", 3)
    first, again = (trajectory(envs, env_seeds(1, 0, 3)) for _ in range(2))
    assert np.array_equal(first, again)
    both = np.concatenate((first, trajectory(envs, env_seeds(1, 1, 3))))  # of two ranks
    assert len(np.unique(both[:, 0], axis=0)) == 6
    assert np.array_equal(trajectory(envs, env_seeds(1, 0, 3)[::-1])[::-1], first)


def test_the_largest_seed_is_one_for_envpool_too(pool: Any) -> None:
    envs = environments("envpool", "CartPole-v1", 3)
    assert len(np.unique(envs.reset(seed=env_seeds(2**31 - 1, 0, 3))[0], axis=0)) == 3


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5"])
def test_envpool_has_the_spaces_of_gymnasium_and_its_observations_are_of_them(env_id: str, pool: Any) -> None:
    if env_id.startswith("LunarLander"):
        pytest.importorskip("Box2D")
    if env_id.startswith("HalfCheetah"):
        pytest.importorskip("mujoco")
    theirs, ours = (environments(kind, env_id, 2) for kind in ("sync", "envpool"))
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.single_action_space == theirs.single_action_space
    theirs.action_space.seed(0)
    for envs in (ours, theirs):
        obs, _ = envs.reset(seed=[1, 2])
        assert obs.shape == (2, *envs.single_observation_space.shape)
        for _ in range(3):
            obs, rewards, terminated, truncated, _ = envs.step(theirs.action_space.sample())
            assert envs.observation_space.contains(obs.astype(envs.single_observation_space.dtype))
            assert rewards.shape == terminated.shape == truncated.shape == (2,)
    theirs.close()
    ours.close()


def test_half_a_cheetah_that_starts_without_noise_runs_alike_in_envpool_and_gymnasium(pool: Any) -> None:
    pytest.importorskip("mujoco")
    settings = {"env_kwargs": '{"reset_noise_scale": 0.0}'}
    theirs, ours = (environments(kind, "HalfCheetah-v5", **settings) for kind in ("sync", "envpool"))
    action = np.linspace(-1, 1, 6, dtype=np.float32)[None]
    np.testing.assert_allclose(ours.reset(seed=[0])[0], theirs.reset(seed=[0])[0], atol=1e-6)
    for _ in range(20):
        found, expected = ours.step(action), theirs.step(action)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
    assert np.abs(expected[0]).max() > 0.5, "it has not moved"


def test_a_lander_falls_alike_in_envpool_and_gymnasium(pool: Any) -> None:
    """Landscape and first push are drawn: what sixteen landers earn on their way down has a mean, and that an error."""
    pytest.importorskip("Box2D")
    earned = []
    for kind in ("sync", "envpool"):
        envs = environments(kind, "LunarLander-v3", 16)
        envs.reset(seed=list(range(16)))
        steps = [envs.step(np.zeros(16, np.int64)) for _ in range(40)]
        earned.append(np.sum([step[1] for step in steps], 0))
    error = math.sqrt(sum(rewards.var() / 15 for rewards in earned))
    assert abs(earned[0].mean() - earned[1].mean()) < 4 * error
    assert 1 / 4 < earned[0].std() / earned[1].std() < 4


def test_what_fits_gymnasium_and_not_envpool_is_refused(pool: Any) -> None:
    for env_kwargs in ('{"sutton_barto_reward": true}', '{"max_episode_steps": "many"}'):
        with pytest.raises(ConfigError, match="--env-kwargs") as caught:
            environments("envpool", "CartPole-v1", env_kwargs=env_kwargs)
        assert caught.value.exit_code == 2


# --- What cannot be had is said before anything starts


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(*flags: object, script: ModuleType = ppo) -> str:
        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("the mistake was not noticed before anything started")

        monkeypatch.setattr(run_module, "launch", forbidden)
        with pytest.raises(ConfigError) as caught:
            call(script.main, *flags)
        assert caught.value.exit_code == 2
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return run


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )


def test_native_names_the_environments_that_have_such_a_form(complaint: Callable) -> None:
    message = complaint("--env-id", "Acrobot-v1", "--vectorization", "native")
    assert "--vectorization native: Acrobot-v1 has no native form" in message
    assert "CartPole-v1" in message
    assert "ALE/" not in message
    assert "phys2d" not in message


def test_envpool_names_the_nearest_of_its_environments(complaint: Callable, pool: Any) -> None:
    message = complaint("--env-id", "CartPool-v1", "--vectorization", "envpool")
    assert "--vectorization envpool: CartPool-v1" in message
    assert "CartPole-v1" in message


@pytest.mark.parametrize("script", [ppo, sac])
def test_a_missing_envpool_is_reported_with_the_command_that_installs_it(
    script: ModuleType, complaint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "envpool")
    message = complaint("--env-id", "Pendulum-v1", "--vectorization", "envpool", script=script)
    assert "--vectorization envpool" in message
    assert "pip install -e '.[envpool]'" in message


def test_a_missing_ale_is_reported_with_the_command_that_installs_it(
    complaint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "ale_py")
    message = complaint("--preset", "atari")
    assert "--env-id ALE/Pong-v5" in message
    assert "pip install -e '.[atari]'" in message


@pytest.mark.parametrize("flag", ["--mask-velocities", "--capture-video", "--action-repeat=2"])
@pytest.mark.parametrize("kind", ["native", "envpool"])
def test_options_for_single_environments_are_refused_by_vector_back_ends(
    flag: str, kind: str, complaint: Callable
) -> None:
    if kind == "envpool":
        pytest.importorskip("envpool")
    if flag == "--capture-video":
        pytest.importorskip("moviepy")
    message = complaint("--env-id", "CartPole-v1", "--vectorization", kind, flag)
    assert message.startswith(flag.partition("=")[0])
    assert "--vectorization sync or async" in message
    assert kind in message


def test_sac_has_no_native_form(complaint: Callable) -> None:
    assert "--vectorization" in complaint("--vectorization", "native", script=sac)


# --- auto


def chosen(env_id: str, num_envs: int, kind: type = PPOArgs, **settings: Any) -> str:
    args = kind(env_id=env_id, num_envs=num_envs, **settings)
    return backends.choose(args, gym.make(env_id, **json.loads(args.env_kwargs)))


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


def test_auto_is_native_where_many_environments_have_that_form_and_nothing_is_done_to_them(cores: Callable) -> None:
    cores(2)
    assert chosen("CartPole-v1", 64) == "native"
    assert chosen("CartPole-v1", 2) == "sync"
    assert chosen("Acrobot-v1", 64) in ("sync", "async")
    assert chosen("CartPole-v1", 64, mask_velocities=True) in ("sync", "async")
    assert chosen("CartPole-v1", 64, capture_video=True) in ("sync", "async")
    assert chosen("tests.vector_envs:SlowSteps-v0", 64) == "sync"


def test_auto_is_never_native_where_transitions_are_replayed(cores: Callable) -> None:
    cores(2)
    assert chosen("CartPole-v1", 64, SACArgs) in ("sync", "async")


SLOW = {"env_id": "tests.vector_envs:SlowSteps-v0", "env_kwargs": '{"seconds": 0.005}'}


def test_auto_is_async_where_steps_are_slow_and_there_are_cores_for_them(cores: Callable) -> None:
    cores(2)
    assert chosen(num_envs=8, **SLOW) == "async"
    assert chosen(num_envs=1, **SLOW) == "sync"
    assert chosen("CartPole-v1", 1) == "sync"
    assert chosen("tests.vector_envs:SlowSteps-v0", 8) == "sync"
    cores(1)
    assert chosen(num_envs=8, **SLOW) == "sync"


@pytest.mark.parametrize(
    ("expected", "flags"),
    [
        ("native", ["--env-id", "CartPole-v1", "--num-envs", 16]),
        ("sync", ["--env-id", "tests.vector_envs:SlowSteps-v0", "--num-envs", 2]),
        ("async", ["--env-id", SLOW["env_id"], "--env-kwargs", SLOW["env_kwargs"], "--num-envs", 2]),
    ],
)
def test_a_run_says_what_was_chosen(
    expected: str, flags: list[object], tmp_path: Path, cores: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(2)
    made = []
    kinds = {"native": NativeVectorEnv, "sync": SyncVectorEnv, "async": WorkerVectorEnv}
    reset = kinds[expected].reset
    monkeypatch.setattr(kinds[expected], "reset", lambda self, **rest: made.append(self) or reset(self, **rest))
    sizes = ["--num-steps", 8, "--total-timesteps", 8 * int(str(flags[-1])), "--num-minibatches", 2]
    finished = call(ppo.main, *flags, *sizes, "--num-threads", 1, "--log-dir", tmp_path)
    assert finished.code == 0
    said = [line for line in finished.err.splitlines() if line.startswith("vectorization:")]
    assert said == [f"vectorization: {expected}"]
    assert len(made) == 1


def test_an_environment_that_fails_in_the_trial_does_not_end_the_run_there(tmp_path: Path, cores: Callable) -> None:
    cores(2)
    flags = ["--env-id", "tests.vector_envs:SlowSteps-v0", "--num-envs", 2, "--num-steps", 8, "--total-timesteps", 32]
    flags += ["--num-minibatches", 2, "--num-threads", 1, "--log-dir", tmp_path]
    finished = call(ppo.main, *flags, *kwargs(fails=1))
    assert finished.code == 0
    assert "warning: environment failed in a trial: RuntimeError: a cable is loose" in finished.err
    assert finished.result["steps"] == "32"
    Slow.failed = 0
    with pytest.raises(EnvError, match="environment 0 failed in step: RuntimeError: a cable is loose"):
        call(ppo.main, *flags, *kwargs(fails=2))


# --- SAC

PENDULUM: list[object] = ["--vectorization", "envpool", "--num-envs", 2, "--num-threads", 1, "--batch-size", 8]
PENDULUM += ["--hidden-sizes", 16, "--replay-ratio", 0.05, "--learning-starts", 100, "--buffer-size", 2000]


def swung(obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Observations after actions in [-1, 1], by the equation of motion of a rod of length and mass 1, g = 10."""
    angle, speed, dt = np.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2], 0.05
    speed = (speed + (15 * np.sin(angle) + 3 * 2 * actions[:, 0]) * dt).clip(-8, 8)
    angle = angle + speed * dt
    return np.stack((np.cos(angle), np.sin(angle), speed), 1)


@pytest.mark.parametrize("implicit", [False, True])
def test_sac_keeps_what_truly_followed_at_the_ends_of_episodes_and_goes_on_from_there(
    implicit: bool, tmp_path: Path, pool: Any
) -> None:
    flags = [*PENDULUM, "--log-dir", tmp_path, "--implicit-next-obs" if implicit else "--no-implicit-next-obs"]
    finished = call(sac.main, *flags, "--total-timesteps", 900)
    assert finished.result["episodes"] == "4"
    longer = call(sac.main, "--resume", finished.checkpoint, "--total-timesteps", 1400, "--log-dir", tmp_path)
    assert longer.result["steps"] == "1400"
    envs = environments("sync", "Pendulum-v1")
    for end, steps in ((finished, 450), (longer, 700)):
        shard = load(end.checkpoint)["shard"]
        kind = record_type(envs.single_observation_space, 1, implicit)
        rows = shard["records"].numpy().view(kind).reshape(-1, 2)
        ends = [199, 399] + ([449, 649] if steps == 700 else [])  # it was resumed in the middle of an episode
        assert shard["size"] == steps
        assert np.flatnonzero(rows["ended"][:steps, 0]).tolist() == ends
        assert not rows["terminated"].any()
        for env in (0, 1):
            own = rows[:steps, env]
            if implicit:
                next_obs = np.concatenate((rows["obs"][1:steps, env], rows["obs"][steps : steps + 1, env]))
                apart = own["final"] >= 0
                assert np.flatnonzero(apart).tolist() == ends
                next_obs[apart] = shard["finals"].numpy()[own["final"][apart]]
            else:
                next_obs = own["next_obs"]
            np.testing.assert_allclose(next_obs, swung(own["obs"], own["actions"]), atol=2e-3)
            assert np.abs(next_obs[ends] - rows["obs"][np.array(ends) + 1, env]).max(1).min() > 1e-2


# --- What environments tell and return


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_an_environment_tells_does_not_reach_the_buffer(kind: str) -> None:
    with contextlib.closing(environments(kind, "tests.envs:Telling-v0", 2)) as envs:
        envs.reset(seed=[1, 2])
        rb = RolloutBuffer(8, 2, envs.single_observation_space, 1, torch.int64)
        rb.start(envs.reset(seed=[1, 2])[0])
        for t in range(8):
            rb.add(t, np.zeros((2, 1), np.int64), *envs.step(np.zeros(2, np.int64)))
    assert not rb.skipped.any()
    assert rb.ends.sum() == 2, "episodes of five steps"
    assert torch.equal(rb.terminated, rb.ends)


class Broken(StaggeredVector):
    """Returns something of another shape than its spaces say."""

    def __init__(self, num_envs: int = 1, what: str = "obs") -> None:
        super().__init__(num_envs)
        self.what = what

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        obs, infos = super().reset(seed=seed, options=options)
        return (obs[:, :1] if self.what == "first" else obs), infos

    def step(self, actions: np.ndarray) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        if self.what == "obs":
            obs = obs[:, :1]
        return obs, (1.0 if self.what == "rewards" else rewards), terminated, truncated, infos


gym.register("Broken-v0", entry_point=Broken, vector_entry_point=Broken)


@pytest.mark.parametrize("what", ["first", "obs", "rewards"])
def test_native_environments_that_return_another_shape_end_the_run(what: str) -> None:
    envs = Broken(3, what)
    single = SimpleNamespace(observation_space=envs.single_observation_space, action_space=envs.single_action_space)
    args = PPOArgs(env_id="Broken-v0", env_kwargs=json.dumps({"what": what}), num_envs=3)
    native = NativeVectorEnv(args, single)  # type: ignore[arg-type]
    call = native.reset if what == "first" else partial(native.step, np.zeros(3, np.int64))
    if what != "first":
        native.reset(seed=[1])
    with pytest.raises(EnvError, match=r"native environments returned .* shape"):
        call()


def test_an_episode_that_fails_at_envpools_limit_is_terminated(pool: Any) -> None:
    """Its value must not be bootstrapped; EnvPool itself calls it cut."""
    ends = {}
    for limit in (500, 8, 6):
        kwargs = json.dumps({"max_episode_steps": limit})
        envs = environments("envpool", "CartPole-v1", env_kwargs=kwargs)
        envs.reset(seed=[3])
        for step in range(1, 20):
            *_, terminated, truncated, _ = envs.step(np.ones(1, np.int64))
            if terminated[0] or truncated[0]:
                ends[limit] = step, bool(terminated[0]), bool(truncated[0])
                break
    assert ends == {500: (8, True, False), 8: (8, True, True), 6: (6, False, True)}


def test_auto_goes_on_without_a_native_form_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"env_id": "tests.vector_envs:SlowSteps-v0", "num_envs": 64, "num_steps": 8}
    with contextlib.closing(make_env(PPOArgs(**settings))) as env:
        args = PPOArgs(**settings | {"env_id": "Broken-v0"})  # whose spaces are others than those of `env`
        assert choose(args, env) in ("sync", "async")


def test_memory_outlives_a_lost_life() -> None:
    """The game goes on, in training as in evaluation, which hears of no lives."""
    rb = RecurrentRolloutBuffer(2, 2, vectors(1), 1, torch.int64, 3)
    rb.start(np.zeros((2, 1)))
    no = np.zeros(2, bool)
    lost = {"life_lost": np.array([True, False])}
    rb.add(0, np.zeros((2, 1), np.int64), np.zeros((2, 1)), np.zeros(2), no, no, lost)
    rb.remember(0, torch.ones(2, 3))
    assert rb.dones[0].tolist() == [True, False]
    assert torch.equal(rb.memory[1], torch.ones(2, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other ways to draw")
def test_mujoco_without_a_screen_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="MUJOCO_GL=egl"):
        make_env(PPOArgs(env_id="Hopper-v5"), "rgb_array")


def test_images_that_are_not_uint8_are_reported() -> None:
    images = {"camera": Box(0, 1, (40, 40, 3), np.float32), "right": Box(0, 255, (40, 40, 3), np.uint8)}
    (text,) = odd_images(Dict(images | {"speed": Box(0, 1, (3,)), "grid": Box(0, 1, (7, 7, 3))}))
    assert "'camera' float32 (40, 40, 3) is taken as a vector" in text
