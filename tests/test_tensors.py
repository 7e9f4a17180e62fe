"""`--vectorization torch`: rollouts that stay on the device of environments that take and return tensors."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from torch import Tensor

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo, ppo_decoupled
from fabricrl.algos.ppo.agent import make_agent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.algos.tensor_episodes import TensorEpisodes
from fabricrl.data import DeviceRolloutBuffer, RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.envs.tensors import TensorEnvs, trial_device
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError
from fabricrl.utils.metric import DeviceEpisodes, EpisodeStatistics
from fabricrl.utils.update import Runner
from tests.conftest import BareRun, NoValues, Trained, on_ranks
from tests.process import differences, load, run_folder, run_team, saved_steps, stopped_in
from tests.tensor_envs import Simulator

CPU = torch.device("cpu")
NUMBERED, SIMULATOR = "tests.tensor_envs:Numbered-v0", "tests.tensor_envs:Simulator-v0"
LATER = '{"autoreset_mode": "next_step"}'
MODES = pytest.mark.parametrize("kwargs", ["{}", LATER], ids=["same step", "next step"])
TINY: list[Any] = ["--num-envs", 8, "--num-steps", 16, "--total-timesteps", 640, "--hidden-sizes", 8]
NUMBERED_RUN = [*TINY, "--env-id", NUMBERED, "--norm-obs", "--norm-reward", "--gamma", 0.9]


# --- Statistics of episodes


def rollouts(count: int, steps: int, envs: int, seed: int) -> list[tuple[Tensor, ...]]:
    """Rewards, ends, skipped steps [T, N] and told numbers [T, N, 2] of some rollouts in a row."""
    rng, made, ended = torch.Generator().manual_seed(seed), [], torch.zeros(envs, dtype=torch.bool)
    for _ in range(count):
        rewards, ends = torch.randn(steps, envs, generator=rng), torch.rand(steps, envs, generator=rng) < 0.2
        skipped = torch.zeros_like(ends)
        for t in range(steps):
            skipped[t], ends[t] = ended, ends[t] & ~ended
            ended = ends[t]
        told = torch.randn(steps, envs, 2, generator=rng)
        told = told.where(ends[..., None] & (torch.rand(told.shape, generator=rng) < 0.7), torch.nan)
        made.append((rewards * ~skipped, ends, skipped, told))
    return made


@pytest.mark.parametrize(("steps", "envs"), [(5, 3), (1, 4), (40, 30)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_episodes_are_those_that_are_counted_in_memory(steps: int, envs: int, ranks: int) -> None:
    def count(fabric: Any, on_device: bool) -> tuple[Any, ...]:
        episodes, device = EpisodeStatistics(envs, ("one", "other")), DeviceEpisodes(envs, CPU)
        found: list[Any] = []
        for rewards, ends, skipped, told in rollouts(4, steps, envs, fabric.global_rank):
            if on_device:
                with NoValues():
                    summary = device.summary(rewards, ends, skipped, told)
                episodes.add_summary(fabric, summary)
            else:
                rows = told.flatten(0, 1)[ends.flatten()]
                episodes.update(fabric, rewards, ends, skipped, rows.numpy())
            found.append((list(episodes.returns), episodes.count, episodes.ended, episodes.told))
            if len(found) % 2 == 0:
                found.append(episodes.compute())
        return tuple(found)

    found = (on_ranks(ranks, partial(count, on_device=kind)) for kind in (True, False))
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(one, dict):
                assert one == pytest.approx(other)
            else:
                assert one[0] == pytest.approx(other[0])
                assert one[1:] == other[1:]


# --- Rollouts


def played(kwargs: str, steps: int = 12) -> tuple[Any, DeviceRolloutBuffer, list[tuple], Any]:
    """A rollout of numbered episodes on the device, the steps that it is made of, and an agent."""
    args = PPOArgs(env_id=NUMBERED, env_kwargs=kwargs, num_envs=8, num_steps=steps, hidden_sizes=(8,), norm_reward=True)
    envs: Any = make_envs(args, 0, Path())
    run = BareRun(args, action_space=envs.single_action_space)
    run.uses_tensor_envs, run._envs, run.obs_space = True, envs, envs.single_observation_space  # type: ignore[misc]
    agent, seen = make_agent(args, envs), []
    rb: Any = run.rollout_buffer(agent)
    obs, _ = envs.reset(seed=3)
    rb.start(obs)
    step = envs.step
    envs.step = lambda actions: seen.append((actions, step(actions))) or seen[-1][1]
    ppo.rollout(run, agent, envs, rb)
    return run, rb, seen, agent


@MODES
def test_advantages_are_those_of_the_same_steps_in_memory(kwargs: str) -> None:
    run, rb, seen, agent = played(kwargs)
    memory = RolloutBuffer(12, 8, run.obs_space, 1, torch.int64, skips=kwargs == LATER)
    memory.start(rb.obs[0].numpy())
    for t, (actions, (obs, rewards, terminated, truncated, infos)) in enumerate(seen):
        arrays = {name: infos[name].numpy() for name in infos.keys() & {"final_obs", "skipped"}}
        columns = (column.numpy() for column in (actions, obs, rewards, terminated, truncated))
        memory.add(t, *columns, arrays)
    assert memory.has_truncated
    assert memory.terminated.any()
    assert memory.skipped.any() == (kwargs == LATER)
    ours = ppo.returns_and_advantages(run, agent, agent, rb)
    agent.reward_normalizer.load_state_dict(type(agent.reward_normalizer)().state_dict())
    agent.reward_normalizer.discounted = None
    theirs = ppo.returns_and_advantages(run, agent, agent, memory)
    valid = torch.ones(96) if theirs.valid is None else theirs.valid
    assert ours.columns.keys() == theirs.columns.keys()
    for name, column in theirs.columns.items():
        if column is not None:
            torch.testing.assert_close(ours.columns[name][valid > 0], column[valid > 0], rtol=1e-5, atol=1e-5)


@MODES
def test_rows_are_what_happened_and_rows_that_only_reset_are_marked(kwargs: str) -> None:
    """Numbers that tell episodes apart show which row belongs to which."""
    _, rb, _, _ = played(kwargs, 40)
    for env in range(8):
        for t in range(40):
            (name, length, count), (next_name, _, next_count) = rb.obs[t, env].tolist(), rb.obs[t + 1, env].tolist()
            if rb.skipped[t, env]:
                assert rb.rewards[t, env] == 0
                assert not rb.ends[t, env]
                assert (next_count, next_name != name) == (0, True)
                continue
            final = rb.final_obs[t, env].tolist()
            assert final == [np.float32(name), length, count + 1]
            assert rb.rewards[t, env] == count + 1
            assert rb.terminated[t, env] == (count + 1 == length in (2, 4, 5))
            assert rb.truncated[t, env] == (count + 1 == 5)
            assert rb.ends[t, env] == (rb.terminated[t, env] | rb.truncated[t, env])
            told = rb.episode_infos[t, env, 0].item()
            assert told == np.float32(name) if rb.ends[t, env] else np.isnan(told)
            stays = not rb.ends[t, env] or kwargs == LATER
            assert (next_name == name) == stays


@MODES
@pytest.mark.parametrize("env_id", [NUMBERED, "torch/CartPole-v1", "torch/Reach-v0"])
def test_nothing_leaves_the_device_in_a_rollout_nor_in_the_update(
    env_id: str, kwargs: str, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuses all that would wait for a GPU, or copy from it, but for logs."""
    calls = []

    def refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            with NoValues():
                return function(*args)

        return call

    for name in ("returns_and_advantages", "train"):
        monkeypatch.setattr(ppo, name, refusing(name, getattr(ppo, name)))
    for name in ("take_tensor_steps", "update_normalizer"):
        monkeypatch.setattr(Run, name, refusing(name, getattr(Run, name)))
    result = train(ppo.main, *TINY, "--env-id", env_id, "--env-kwargs", kwargs, "--norm-obs", "--norm-reward")
    assert result.code == 0
    assert len(calls) == 20
    assert int(result.result["episodes"]) > 0 or "Reach" in env_id  # whose episodes are longer


def test_what_asks_for_a_value_in_a_rollout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceRolloutBuffer, "stacked_obs", lambda rb, t, device: rb.obs[t.item()])
    take_steps = Run.take_tensor_steps

    def refusing(*args: Any) -> None:
        with NoValues():
            take_steps(*args)

    monkeypatch.setattr(Run, "take_tensor_steps", refusing)
    with pytest.raises(RuntimeError, match="not permitted"):
        played("{}")


# --- Runs


@MODES
def test_a_run_that_is_captured_or_compiled_is_the_run_that_is_not(
    kwargs: str, train: Callable[..., Trained], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*NUMBERED_RUN, "--env-kwargs", kwargs]
    plain = train(ppo.main, *flags)
    request.getfixturevalue("traced")
    compiled = train(ppo.main, *flags, "--compile")
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=1e-5, atol=1e-6)  # sums in another order
    recorded: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: recorded.append((run, run.runner.recordings)) or reset(run))
    request.getfixturevalue("captured")
    captured = train(ppo.main, *flags)
    (run, at_start), *_ = recorded
    assert run.runner.recordings == at_start == 2  # an epoch and a rollout
    assert torch.equal(captured.weights, plain.weights)
    for other in (compiled, captured):
        assert differences(other.state["episodes"], plain.state["episodes"]) == []


@MODES
@pytest.mark.parametrize("capture", [False, True])
def test_a_resumed_run_is_the_straight_run_to_the_bit(
    kwargs: str, capture: bool, train: Callable[..., Trained], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if capture:
        request.getfixturevalue("captured")
    straight = train(
        ppo.main, *NUMBERED_RUN, "--env-kwargs", kwargs, "--checkpoint-every", 128, "--keep-checkpoints", 9
    )
    half = straight.folder / "checkpoints" / f"step_{256:012d}.ckpt"
    resumed = train(ppo.main, "--resume", half, "--log-dir", tmp_path / "more")
    assert differences(load(half)["agent"], straight.state["agent"])
    assert differences(straight.state["agent"], resumed.state["agent"]) == []
    assert differences(straight.state["envs"], resumed.state["envs"]) == []
    assert straight.result["return_mean"] == resumed.result["return_mean"]


@MODES
def test_a_signal_saves_a_run_on_tensors_which_goes_on_as_if_there_had_been_none(
    kwargs: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    flags = [*NUMBERED_RUN, "--env-kwargs", kwargs]
    straight = train(ppo.main, *flags)
    with stopped_in(2):
        stopped = train(ppo.main, *flags, "--log-dir", tmp_path / "stopped")
    assert (stopped.code, stopped.result["steps"]) == (143, "256")
    assert saved_steps(stopped.folder) == [256]
    assert "envs" in stopped.state
    resumed = train(ppo.main, "--resume", stopped.folder)
    assert (resumed.code, resumed.result["steps"]) == (0, "640")
    for part in ("agent", "optimizer", "episodes", "envs", "generators"):
        assert differences(straight.state[part], resumed.state[part]) == [], part


def test_a_resumed_run_of_two_ranks_is_the_straight_run_to_the_bit(tmp_path: Path) -> None:
    flags = ["--env-id", NUMBERED, "--num-envs", 2, "--num-steps", 16, "--total-timesteps", 256, "--norm-reward"]
    flags += ["--checkpoint-every", 128, "--keep-checkpoints", 9]
    straight = run_team("fabricrl.algos.ppo.ppo", *flags, "--log-dir", tmp_path / "straight", folder=tmp_path)
    folder = run_folder(tmp_path / "straight")
    half, end = (folder / "checkpoints" / f"step_{step:012d}.ckpt" for step in (128, 256))
    resumed = run_team("fabricrl.algos.ppo.ppo", "--resume", half, "--log-dir", tmp_path / "more", folder=tmp_path)
    more = run_folder(tmp_path / "more") / "checkpoints" / end.name
    assert straight.code == resumed.code == 0
    for name in ("agent", "optimizer", "envs", "generators"):
        assert differences(load(end)[name], load(more)[name]) == [], name


def test_episodes_of_other_environments_are_not_gone_on_with() -> None:
    """Of another kind of device, of ranks that had none, of another number."""
    loaded: list[dict[str, Tensor]] = []
    envs: Any = SimpleNamespace(load_state_dict=loaded.append)
    underway = TensorEpisodes(SimpleNamespace(global_rank=1, world_size=2, device=CPU), envs, 2, 0)  # type: ignore[arg-type]
    rb = DeviceRolloutBuffer(4, 2, Box(-1, 1, (3,)), 1, torch.float32, False, 0, CPU)
    state = {"device": "cpu", "obs": torch.ones(2, 2, 3)}
    state |= dict.fromkeys(("returns", "lengths"), torch.ones(2, 2))
    for other in ({"device": "cuda"}, {"obs": torch.ones(1, 2, 3)}, {"obs": torch.ones(2, 4, 3)}):
        assert not underway.load_state_dict(state | other, rb, None, None)
    assert not loaded
    assert not rb.obs.any()
    assert underway.load_state_dict(state, rb, None, None)
    assert (rb.obs[-1] == 1).all()
    assert len(loaded) == 1


def test_a_reset_begins_with_all_environments_anew() -> None:
    """Also where one had ended, and would have reset in the next step."""
    envs = make_envs(PPOArgs(env_id=NUMBERED, env_kwargs=LATER, num_envs=4, vectorization="torch"), 0, Path())
    envs.reset(seed=[1])
    ended, steps = torch.zeros(4, dtype=torch.bool), 0
    while not ended.any():
        *_, terminated, truncated, _ = envs.step(torch.zeros(4, 1))
        ended, steps = terminated | truncated, steps + 1
        assert steps < 100
    envs.reset(seed=[1])
    assert not envs.step(torch.zeros(4, 1))[-1]["skipped"].any()


@pytest.mark.parametrize(
    ("given", "variable", "there", "kind"),
    [
        ({}, None, True, "cpu"), ({"cuda": True}, None, True, "cuda"), ({"accelerator": "cuda"}, None, True, "cuda"),
        ({}, "cuda", True, "cuda"), ({"accelerator": "cpu"}, "cuda", True, "cpu"), ({}, "cuda", False, "cpu"),
    ],
)  # fmt: skip
def test_environments_are_tried_where_the_run_will_train(
    given: dict[str, Any], variable: str | None, there: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fabric run --accelerator=cuda` says so in a variable."""
    monkeypatch.delenv("LT_ACCELERATOR", raising=False)
    if variable:
        monkeypatch.setenv("LT_ACCELERATOR", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert trial_device(PPOArgs(**given)).type == kind


@pytest.mark.parametrize(
    ("devices", "variables", "gpu"),
    [
        (None, {}, 0), ("4", {"LOCAL_RANK": "3"}, 3), ("0,2", {}, 0), ("0,2", {"LOCAL_RANK": "1"}, 2), ("1,", {}, 1),
        (None, {"SLURM_LOCALID": "2"}, 2), ("9,", {}, 0),
    ],
)  # fmt: skip
def test_each_rank_tries_its_environments_on_its_own_gpu(
    devices: str | None, variables: dict[str, str], gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert trial_device(PPOArgs(accelerator="cuda", devices=devices)) == torch.device("cuda", gpu)


def test_a_simulator_that_tells_no_state_begins_new_episodes_when_resumed(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    first = train(ppo.main, *TINY, "--env-id", SIMULATOR)
    assert "envs" not in first.state
    second = train(ppo.main, "--resume", first.folder, "--total-timesteps", 1280, "--log-dir", tmp_path / "more")
    assert (second.code, second.result["steps"]) == (0, "1280")


@pytest.mark.usefixtures("captured")
def test_of_a_simulator_only_the_policy_is_captured(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append(run) or reset(run))
    captured = train(ppo.main, *TINY, "--env-id", SIMULATOR)
    assert runs[0].runner.recordings == 2  # an epoch and acting
    monkeypatch.setattr("fabricrl.algos.run.Runner", lambda compile, capture, *rest: Runner(False, False, *rest))
    assert torch.equal(captured.weights, train(ppo.main, *TINY, "--env-id", SIMULATOR).weights)


@MODES
def test_evaluation_plays_whole_episodes(
    kwargs: str, train: Callable[..., Trained], script: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """An episode of n steps earns 1 + 2 + … + n."""
    trained = train(ppo.main, *NUMBERED_RUN, "--env-kwargs", kwargs, "--eval-every", 320, "--eval-episodes", 9)
    assert "eval_return=" in trained.line or trained.state["best_return"] > 0
    assert script(evaluate.main, trained.folder, "--episodes", 20, "--mode", "greedy") == 0
    shown = capsys.readouterr().out
    low, high = map(float, re.findall(r"\((?:min) (\S+), max (\S+)\)", shown)[0])
    assert low >= 1 + 2
    assert high <= sum(range(6))
    assert "is_success" in shown
    mean, length = (float(re.findall(rf"{name} +(\S+) ±", shown)[0]) for name in ("return", "length"))
    assert length * (length + 1) / 2 <= mean + 0.1 <= 15.1


def test_auto_takes_environments_that_say_that_they_are_tensors(train: Callable[..., Trained]) -> None:
    output = train(ppo.main, *TINY, "--env-id", "torch/CartPole-v1").output
    assert "vectorization: torch" in output
    assert isinstance(make_envs(PPOArgs(env_id="torch/CartPole-v1"), 0, Path()).reset(seed=1)[0], Tensor)
    single = PPOArgs(env_id="torch/CartPole-v1", vectorization="sync")
    assert isinstance(make_envs(single, 0, Path()).reset(seed=1)[0], np.ndarray)


def test_velocities_are_masked() -> None:
    args = PPOArgs(env_id="torch/Pendulum-v1", mask_velocities=True, num_envs=4)
    envs = make_envs(args, 0, Path())
    obs, _ = envs.reset(seed=1)
    assert (obs[:, 2] == 0).all()
    obs, *_, infos = envs.step(torch.ones(4, 1))
    assert (torch.cat((obs, infos["final_obs"]))[:, 2] == 0).all()
    assert (obs[:, :2] != 0).all()


def test_actions_are_clipped_and_counted_from_the_start_of_their_space() -> None:
    envs: Any = make_envs(PPOArgs(env_id=SIMULATOR, num_envs=4), 0, Path())
    envs.reset(seed=1)
    assert envs.step(torch.full((4, 2), 7.0))[1].tolist() == [-2.0] * 4
    numbered: Any = make_envs(PPOArgs(env_id=NUMBERED, num_envs=4), 0, Path())
    assert numbered.env._taken(torch.tensor([[0], [1]])).tolist() == [1, 2]
    assert numbered.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    wide = Simulator(2)
    wide.single_action_space = Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32))
    taken = TensorEnvs(wide, PPOArgs(env_id=SIMULATOR, num_envs=2))._taken(torch.tensor([[5.0, 5.0], [-5.0, -5.0]]))
    assert taken.tolist() == [[1, 2], [-1, -2]]


def test_a_step_that_only_resets_counts_for_nothing() -> None:
    """No matter what environments return with it; and of an episode that goes on no number is told."""
    envs: Any = make_envs(PPOArgs(env_id=NUMBERED, env_kwargs=LATER, num_envs=2), 0, Path()).env
    envs.reset(seed=1)
    obs, ones, first, both = torch.zeros(2, 3), torch.ones(2), torch.tensor([True, False]), torch.tensor([True, True])
    *_, infos = envs.answer(obs, ones, first, ~both, {"is_success": ones})
    assert infos["episode_info"][:, 0].isnan().tolist() == [False, True]
    _, rewards, terminated, truncated, infos = envs.answer(obs, ones, both, both, {"is_success": ones})
    assert (rewards.tolist(), infos["skipped"].tolist()) == ([0, 1], [True, False])
    assert terminated.tolist() == truncated.tolist() == [False, True]
    assert infos["episode_info"][:, 0].isnan().tolist() == [True, False]


def test_the_numbers_of_an_episode_that_ended_are_told_not_those_of_the_next() -> None:
    envs: Any = make_envs(PPOArgs(env_id=NUMBERED, num_envs=4), 0, Path()).env
    envs.reset(seed=1)
    number, ended = torch.arange(4.0), torch.tensor([True, False, True, False])
    given = {"is_success": 0 * number, "final_info": {"is_success": number}, "final_obs": torch.zeros(4, 3)}
    *_, infos = envs.answer(torch.zeros(4, 3), number, ended, ~ended, given)
    assert infos["episode_info"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    device = torch.device("meta")  # as of a simulator that has no attribute of this name
    assert TensorEnvs(envs.env, PPOArgs(env_id=NUMBERED, num_envs=4), device).device == device


def test_what_does_not_count_in_a_rollout_of_tensors_may_be_anything() -> None:
    """NaN as final observations where an episode has not been truncated, and numbers that only one step has told."""
    rb = DeviceRolloutBuffer(2, 2, Box(-1, 1, (1,)), 1, torch.float32, False, 1, torch.device("cpu"))
    rb.start(torch.zeros(2, 1))
    final_obs, truncated = torch.tensor([[math.nan], [0.5]]), torch.tensor([False, True])
    for t in range(2):
        infos = {"final_obs": final_obs} | ({} if t else {"episode_info": torch.ones(2, 1)})
        rb.add(torch.tensor([t]), torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), ~truncated, truncated, infos)
    assert (rb.bootstraps * rb.truncated_episodes()[2][:, 0]).tolist() == [0.0, 0.5, 0.0, 0.5]
    assert rb.is_finite()
    assert rb.episode_infos[:, 0, 0].isnan().tolist() == [False, True]
    with pytest.raises(EnvError), rb.checked():
        raise EnvError("it has failed")
    rb.final_obs[1, 1] = math.inf  # that of an episode that was truncated
    assert not rb.is_finite()
    with pytest.raises(NonFiniteError, match="a final observation is not finite"), rb.checked():
        raise EnvError("it has failed for that")


@pytest.mark.parametrize("main", [ppo.main, sac.main], ids=["ppo", "sac"])
def test_last_observations_may_be_told_only_where_an_episode_ends(
    main: Callable[[], int], train: Callable[..., Trained], tmp_path: Path
) -> None:
    """As Gymnasium's vector environments do."""
    size = (
        TINY
        if main is ppo.main
        else ["--num-envs", 8, "--total-timesteps", 320, "--batch-size", 8, "--learning-starts", 64]
    )
    states = []
    for fault in ("", "final at ends"):
        kwargs = f'{{"fault": "{fault}"}}'
        flags = [*size, "--env-id", SIMULATOR, "--env-kwargs", kwargs, "--log-dir", tmp_path / f"logs{len(states)}"]
        states.append(train(main, *flags).state)
    for part in ("agent", "generators"):
        assert differences(*(state[part] for state in states)) == []


# --- Faults


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("raises", EnvError, "environments failed in step: RuntimeError: the motor is broken"),
        ("array", EnvError, "returned observations from step as ndarray, not as a tensor"),
        ("shape", EnvError, r"returned rewards from step of shape \[1\] on cpu, not \[8\] on cpu"),
        ("no final", EnvError, "returned no `final_obs`"),
        ("masks", EnvError, "action masks, which --vectorization torch does not take"),
        ("nan", NonFiniteError, "observation of environment 1 is not finite after step 4 of the rollout"),
        ("nan reward", NonFiniteError, "reward of environment 1 is not finite after step 4 of the rollout"),
    ],
)
def test_faults_of_environments_are_told_in_a_line(
    fault: str, kind: type[Exception], words: str, train: Callable[..., Trained]
) -> None:
    with pytest.raises(kind, match=words) as caught:
        train(ppo.main, *TINY, "--env-id", SIMULATOR, "--env-kwargs", f'{{"fault": "{fault}"}}')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "given", "allowed"),
    [
        ("column", r"rewards as torch.float32 of shape \[8, 1\]", "a tensor of numbers"),
        ("mean", r"rewards as torch.float32 of shape \[\]", "a tensor of numbers"),
        ("number", "rewards as float", "a tensor of numbers"),
        ("float", r"terminated as torch.float32 of shape \[8\]", "a tensor of torch.bool"),
        ("bool column", r"terminated as torch.bool of shape \[8, 1\]", "a tensor of torch.bool"),
        ("all", r"terminated as torch.bool of shape \[\]", "a tensor of torch.bool"),
    ],
)
@pytest.mark.parametrize("compiles", [False, True])
def test_what_a_task_returns_by_mistake_is_told_with_what_is_allowed(
    fault: str, given: str, allowed: str, compiles: bool, train: Callable[..., Trained], traced: None
) -> None:
    flags = ["--env-id", "tests.tensor_envs:Mistaken-v0", "--env-kwargs", f'{{"fault": "{fault}"}}']
    with pytest.raises(EnvError, match=rf"next_state returned {given}: it must be {allowed} of shape \[8\]") as caught:
        train(ppo.main, *TINY, *flags, *["--compile"] * compiles)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "Acrobot-v1"], "Acrobot-v1 has no vector_entry_point, unlike torch/Acrobot-v1, "),
        (
            ["--env-id", "CartPole-v1"],
            "CartPole-v1 does not take tensors: its vector_entry_point has no argument `device`",
        ),
        (["--env-id", "tests.tensor_envs:Ignorant-v0"], "has no argument `device`"),
        (["--env-id", "tests.tensor_envs:TensorPictures-v0"], "observations must be a Box of real numbers"),
        (["--env-id", "tests.tensor_envs:None-v0"], "is not a known environment"),
        (
            ["--env-id", "no_such_module:None-v0"],
            "there is no module no_such_module; your own modules are",
        ),
        (["--env-kwargs", '{"wind": 1}'], "does not fit torch/CartPole-v1"),
        (["--capture-video"], "--capture-video is set: .* evaluate.py --capture-video"),
        (["--action-repeat", 2], "--action-repeat is set: it needs --vectorization sync or async"),
        (["--check-spaces"], "--check-spaces is set: it needs another --vectorization than torch"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags: list[Any], words: str, train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match=words):
        train(ppo.main, *TINY, "--env-id", "torch/CartPole-v1", "--vectorization", "torch", *flags)


@pytest.mark.parametrize("flag", ["--render", "--capture-video"])
def test_what_tensors_alone_take_is_not_drawn(
    flag: str, train: Callable[..., Trained], script: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gymnasium's single CartPole, which draws, has no `dtype`."""
    monkeypatch.setenv("DISPLAY", ":0")
    flags = ["--env-id", "torch/CartPole-v1", "--env-kwargs", '{"dtype": "float64"}']
    folder = train(ppo.main, *TINY, *flags).folder
    with pytest.raises(ConfigError) as caught:
        script(evaluate.main, folder, "--episodes", 1, flag)
    assert str(caught.value) == (
        f"{flag} draws a single environment, which this run's arguments do not make: --env-kwargs "
        """{"dtype": "float64"} does not fit torch/CartPole-v1: CartPoleEnv.__init__() got an unexpected keyword """
        "argument 'dtype'"
    )


def test_a_run_on_tensors_is_filmed_by_the_single_environment_of_its_id(
    train: Callable[..., Trained], script: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("moviepy")
    folder = train(ppo.main, *TINY, "--env-id", "torch/CartPole-v1").folder
    assert script(evaluate.main, folder, "--episodes", 2, "--capture-video", "--mode", "greedy") == 0
    videos = sorted((folder / "videos").rglob("*.mp4"))
    assert [video.name for video in videos] == ["greedy-episode-0.mp4", "greedy-episode-1.mp4"]
    assert all(b"ftyp" in video.read_bytes()[:16] for video in videos)
    assert str(videos[0].parent) in capsys.readouterr().out


def test_native_is_another_thing(train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match=r"torch/CartPole-v1 has no native form, unlike .*CartPole-v0, CartPole-v1"):
        train(ppo.main, *TINY, "--env-id", "torch/CartPole-v1", "--vectorization", "native")


def test_a_script_that_plays_on_the_cpu_takes_the_single_form(train: Callable[..., Trained]) -> None:
    """Refused in a line where it is told to do otherwise, before any rank is started."""
    flags = ["--env-id", "torch/CartPole-v1", *TINY[:6]]
    with pytest.raises(ConfigError, match="--vectorization torch: decoupled scripts play on the CPU"):
        train(ppo_decoupled.main, *flags, "--vectorization", "torch", "--devices", 2)
    with pytest.raises(ConfigError, match="torch/Reach-v0 is registered only as a vector environment"):
        train(ppo_decoupled.main, *TINY[:6], "--env-id", "torch/Reach-v0", "--devices", 2)
