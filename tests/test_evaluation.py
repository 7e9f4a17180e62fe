"""Evaluation while training: training does not notice it, it is what evaluate.py plays, and it chooses the best."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos import evaluation
from fabricrl.algos.decoupled import Player, Trainers
from fabricrl.algos.decoupled import trainers as trainers_module
from fabricrl.algos.droq import droq
from fabricrl.algos.evaluation import Evaluation
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.agent import make_agent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.envs import make_envs
from fabricrl.envs.play import Episodes
from fabricrl.utils.decoupled import KEEPALIVE, TRAIN, Order, Outbox
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.seeding import EVAL_STREAM, FIRST_TRAINING_SEED, stream_seed
from tests.conftest import BareRun, on_ranks
from tests.process import Finished, call, differences, load, logged, run_team, saved_steps, stopped_in

ON_POLICY = ["--num-envs", 2, "--num-steps", 32, "--total-timesteps", 256, "--hidden-sizes", 8, "--norm-reward"]
OFF_POLICY = ["--num-envs", 2, "--total-timesteps", 64, "--learning-starts", 40, "--batch-size", 8]
OFF_POLICY += ["--hidden-sizes", 8, "--env-kwargs", '{"continuous": true}']
SCRIPTS: dict[str, tuple[Callable[[], int], list, int]] = {
    "ppo": (ppo.main, ON_POLICY, 128),
    "ppo_recurrent": (ppo_recurrent.main, [*ON_POLICY, "--rnn-hidden-size", 8, "--prev-action", "--prev-reward"], 128),
    "sac": (sac.main, OFF_POLICY, 32),
    "droq": (droq.main, [*OFF_POLICY, "--replay-ratio", 1], 32),
}
FEW = ["--env-id", "tests.envs:Counting-v0", "--num-envs", 2, "--num-steps", 32, "--hidden-sizes", 8]
FEW += ["--total-timesteps", 256, "--checkpoint-every", 0, "--env-kwargs", '{"terminate_after": 4}']


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes evaluations return these means, one after the other."""

    def score(*returns: float) -> None:
        left = iter(returns)
        monkeypatch.setattr(Evaluation, "charts", lambda self, played: {"eval/return_mean": next(left)})

    return score


def content(path: Path) -> dict[str, Any]:
    return {name: value for name, value in load(path).items() if name not in ("args", "best_return")}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_ends_with_the_same_bits_with_and_without_evaluation(
    name: str, vectorization: str, tmp_path: Path
) -> None:
    """Also where environments draw from the global generators of Python, NumPy and torch."""
    if vectorization == "async" and name != "ppo":
        pytest.skip("one algorithm is enough")
    main, flags, every = SCRIPTS[name]
    flags = ["--env-id", "tests.envs:Dicey-v0", "--norm-obs", *flags, "--vectorization", vectorization]
    if vectorization == "async":  # whose processes would take seconds to import torch
        flags += ["--env-kwargs", '{"torch_too": false}']
    without = call(main, *flags, "--log-dir", tmp_path / "without")
    drawn = random.random(), np.random.rand(), torch.rand(())
    beside = call(main, *flags, "--eval-every", every, "--eval-episodes", 3, "--log-dir", tmp_path / "with")
    assert len(logged(beside.folder)["eval/return_mean"]) == 2
    first, second = content(without.checkpoint), content(beside.checkpoint)
    # An entry of SAC's log sums up the rewards so far, and with more of them a return may have another last bit
    assert second["episodes"].pop("returns") == pytest.approx(first["episodes"].pop("returns"), rel=1e-12)
    assert differences(first, second) == []
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))  # the run leaves them the same, too


CASES: dict[str, tuple[Callable[[], int], list]] = {
    "ppo, normalised": (ppo.main, ["--env-id", "CartPole-v1", "--norm-obs", *ON_POLICY]),
    "ppo, frames stacked": (
        ppo.main,
        ["--env-id", "tests.envs:Picture-v0", "--frame-stack", 3, "--cnn-features", 8, *ON_POLICY],
    ),
    "ppo, dictionaries, continuous": (
        ppo.main,
        ["--env-id", "tests.envs:Odd-v0", "--env-kwargs", '{"obs": "dict", "action": "box"}', *ON_POLICY],
    ),
    "ppo_recurrent": (
        ppo_recurrent.main,
        ["--env-id", "CartPole-v1", "--mask-velocities", "--norm-obs", *SCRIPTS["ppo_recurrent"][1]],
    ),
    "sac": (sac.main, ["--env-id", "Pendulum-v1", "--norm-obs", *OFF_POLICY, "--env-kwargs", "{}"]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_evaluate_plays_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    main, flags = CASES[name]
    steps = int(flags[flags.index("--total-timesteps") + 1])
    run = call(main, *flags, "--eval-every", 10_000, "--eval-episodes", 5, "--log-dir", tmp_path)
    seed = stream_seed(1, EVAL_STREAM, steps, 0) % (FIRST_TRAINING_SEED - 2)
    shown = call(
        evaluate.main, run.checkpoint, "--episodes", 5, "--num-envs", 2, "--seed", seed, "--mode", "greedy", "--json"
    )
    found = json.loads(shown.out)["greedy"]
    events = logged(run.folder)
    for part in ("return_mean", "return_std", "return_min", "return_max", "length_mean"):
        assert events[f"eval/{part}"] == [(steps, pytest.approx(found[part], rel=1e-6))], part
    assert float(run.result["eval_return_mean"]) == pytest.approx(found["return_mean"], abs=0.005)


def test_it_comes_each_time_that_many_steps_have_passed_and_at_the_end_and_has_a_share_of_the_time(
    tmp_path: Path,
) -> None:
    """An iteration takes 64 steps: of the multiples of 100 it passes the first in step 128, the second in 256."""
    run = call(ppo.main, *FEW, "--eval-every", 100, "--log-every", 64, "--log-dir", tmp_path / "a")
    events = logged(run.folder)
    assert [step for step, _ in events["eval/return_mean"]] == [128, 256]
    assert [step for step, _ in events["time/eval"]] == [128, 192, 256]
    assert events["time/eval"][0][1] > 0
    assert events["time/eval"][1][1] == 0
    shares = [value for tag, values in events.items() if tag.startswith("time/") for s, value in values if s == 256]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    # Counting pays 1 + 2 + 3 + 4 in an episode of 4 steps
    assert {tag: values[0][1] for tag, values in events.items() if tag.startswith("eval/")} == {
        "eval/return_mean": 10, "eval/return_std": 0, "eval/return_min": 10, "eval/return_max": 10,
        "eval/length_mean": 4,
    }  # fmt: skip
    none = call(ppo.main, *FEW, "--log-dir", tmp_path / "b")
    assert not [tag for tag in logged(none.folder) if "eval" in tag]
    assert "eval" not in none.out


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path: Path, scored: Callable[..., None]) -> None:
    """Iterations of 64 steps; evaluations of 1, 5, 3 and 5: the second was the first to be that good."""
    scored(1.0, 5.0, 3.0, 5.0)
    run = call(ppo.main, *FEW, "--eval-every", 64, "--log-dir", tmp_path)
    best = load(run.folder / "checkpoints" / "best.ckpt")
    assert (best["global_step"], best["best_return"]) == (128, 5.0)
    assert saved_steps(run.folder) == [64, 128, 256]
    assert load(run.checkpoint)["best_return"] == 5.0


def test_a_resumed_run_remembers_the_best_evaluation_but_no_measure_of_another_kind(
    tmp_path: Path, scored: Callable[..., None]
) -> None:
    scored(7.0, 1.0, 2.0, 3.0)
    with stopped_in(2):
        run = call(ppo.main, *FEW, "--eval-every", 64, "--log-dir", tmp_path)
    assert run.code == 143
    resumed = call(ppo.main, "--resume", run.folder)
    assert load(resumed.folder / "checkpoints" / "best.ckpt")["global_step"] == 64
    with stopped_in(2):
        other = call(ppo.main, *FEW, "--log-dir", tmp_path)  # the best of it has a return of 10
    scored(2.0, 1.0)
    resumed = call(ppo.main, "--resume", other.folder, "--eval-every", 64)
    best = load(resumed.folder / "checkpoints" / "best.ckpt")
    assert (best["global_step"], best["best_return"]) == (192, 2.0)


def test_a_resumed_run_evaluates_as_the_straight_one(tmp_path: Path) -> None:
    flags = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 512]
    flags += ["--hidden-sizes", 8, "--learning-rate", 1e-2, "--norm-obs", "--eval-every", 128, "--log-every", 64]
    straight = call(ppo.main, *flags, "--log-dir", tmp_path / "straight")
    with stopped_in(3):
        stopped = call(ppo.main, *flags, "--log-dir", tmp_path / "stopped")
    resumed = call(ppo.main, "--resume", stopped.folder)
    assert differences(content(straight.checkpoint), content(resumed.checkpoint)) == []
    assert load(straight.checkpoint)["best_return"] == load(resumed.checkpoint)["best_return"]
    expected, found = logged(straight.folder), logged(resumed.folder)
    assert len(expected["eval/return_mean"]) == 4
    assert found["eval/return_mean"] == expected["eval/return_mean"]


@pytest.mark.parametrize(("main", "flags", "steps"), [(ppo.main, ON_POLICY, 64), (sac.main, OFF_POLICY, 50)])
def test_a_run_stops_with_success_once_the_return_is_reached_and_has_nothing_more_to_do(
    main: Callable[[], int], flags: list, steps: int, tmp_path: Path, scored: Callable[..., None]
) -> None:
    scored(-3.5, 1.0, 9.0)
    env = ["--env-id", "tests.envs:Dicey-v0", *flags, "--eval-every", steps // 2, "--stop-at-return", -3.5]
    run = call(main, *env, "--log-dir", tmp_path)
    # SAC takes 2 steps an iteration, and so passes 25 in step 26
    assert (run.code, run.result["steps"]) == (0, "64" if main is ppo.main else "26")
    assert run.result["eval_return_mean"] == "-3.50"
    assert load(run.checkpoint)["global_step"] == int(run.result["steps"])
    again = call(main, "--resume", run.folder)
    assert again.code == 0
    assert "steps are done, and --stop-at-return is reached" in again.err
    assert again.result["steps"] == run.result["steps"]
    further = call(main, "--resume", run.folder, "--stop-at-return", 5)
    assert int(further.result["steps"]) > int(run.result["steps"])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"eval_every": -1}, "--eval-every is -1: it must be between 0 and"),
        ({"eval_episodes": 0}, "--eval-episodes is 0: it must be an integer of at least 1"),
        ({"stop_at_return": 5.0}, "--stop-at-return is 5.0: it must be left out, or given with --eval-every"),
        ({"eval_every": 9, "stop_at_return": float("nan")}, "--stop-at-return is nan: it must be between"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(values: dict[str, Any], text: str) -> None:
    for kind in (PPOArgs, SACArgs):
        with pytest.raises(ConfigError, match=text):
            kind(**values)


def test_an_environment_that_fails_in_an_evaluation_ends_the_run(tmp_path: Path) -> None:
    """Of Fault's environments only those fail that are played in evaluations: their seeds are below 2^30."""
    seed = stream_seed(1, EVAL_STREAM, 64, 0) % (FIRST_TRAINING_SEED - 2) + 1
    kwargs = f'{{"kind": "raise_step", "only_seed": {seed}}}'
    flags = ["--env-id", "tests.envs:Fault-v0", *ON_POLICY, "--env-kwargs", kwargs, "--eval-every", 64]
    with pytest.raises(EnvError, match="environment 1 failed in step: RuntimeError: this environment cannot step"):
        call(ppo.main, *flags, "--log-dir", tmp_path)


class Slow(Evaluation):
    """Takes many steps on rank 0, none on others, and is interrupted or fails if that is wanted."""

    def __init__(self, fabric: Any, fails: int | None = None) -> None:
        self._fabric, self._keys, self.fails, self.steps = fabric, (), fabric.global_rank == fails, 0

    def _play_share(self, agent: Any, step: int) -> torch.Tensor:
        if self._fabric.global_rank > 0:
            if self.fails:
                raise EnvError("broken at once")
            return torch.empty(0, 2, dtype=torch.float64)
        for _ in range(20):
            self.steps += 1
            self._after_step(0)
        if self.fails:
            raise EnvError("broken")
        return torch.tensor([[4.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("end", ["all played", "a signal to the waiting rank", "a fault", "a fault of another"])
def test_ranks_that_wait_hear_often_from_the_one_that_plays(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """One that plays for longer than a collective may take is not given up by the others, and hears of signals."""
    monkeypatch.setattr(evaluation, "AGREE_EVERY", 0.0)

    def work(fabric: Any) -> tuple[BareRun, int, str]:
        run = BareRun(PPOArgs(eval_every=1), fabric)
        slow = Slow(fabric, {"a fault": 0, "a fault of another": 1}.get(end))
        run._evaluation, run._evaluated_step, run.global_step = slow, 0, 1
        agreements, agree = [], slow._agree

        def counted(playing: bool, failed: bool = False) -> bool:
            agreements.append(1)
            if end == "a signal to the waiting rank" and fabric.global_rank == 1 and len(agreements) == 5:
                run._signals.code = 143  # type: ignore[misc]
            return agree(playing, failed)

        slow._agree = counted  # type: ignore[method-assign]
        try:
            run.evaluate(torch.nn.Linear(1, 1))
        except EnvError as error:
            return run, len(agreements), f"fault: {error}"
        except Exception as error:
            return run, len(agreements), f"code {error.exit_code}"  # type: ignore[attr-defined]
        return run, len(agreements), "done"

    (first, count, ended), (second, other, there) = on_ranks(2, work)
    assert count == other
    if end == "all played":
        assert (ended, there, count) == ("done", "done", 21)
        assert first._score == second._score == 4
    elif end == "a fault":
        assert (ended, there) == ("fault: broken", "code 4")
    elif end == "a fault of another":
        assert (ended, there, count) == ("code 4", "fault: broken at once", 2)
    else:
        assert (ended, there, first.exit_code, second.exit_code) == ("done", "done", 143, 143)
        assert count == 6
        assert first.is_last
        assert second.is_last
        assert np.isnan(first._score)


def test_a_player_that_evaluates_for_long_has_its_trainers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a minute that they wait for a message, a quarter passes at most without one; it is no iteration."""
    clock, sent = [100.0], []
    monkeypatch.setattr(trainers_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run: Any = SimpleNamespace(args=SimpleNamespace(timeout=1.0, players=1), fabric=SimpleNamespace(global_rank=0))
    order = Order(TRAIN, 0, 0, 0, False, False, False, torch.zeros(2))
    channel: Any = SimpleNamespace(rank=0, world_size=3)
    channel.send = lambda packet, to, iteration: sent.append((to, packet.read()))
    trainers = Trainers(run, channel)
    trainers._orders, trainers._spoke = {False: Outbox(order, 8)}, 100.0
    for clock[0] in range(100, 140, 4):
        run.while_evaluating()
    assert [(to, message.command) for to, message in sent] == [(1, KEEPALIVE), (2, KEEPALIVE)] * 2  # at 116 and 132
    assert trainers.iteration == 0

    messages = iter([message for _, message in sent] + [order._replace(iteration=7)])
    player = Player(run, SimpleNamespace(receive=lambda *_: next(messages)))  # type: ignore[arg-type]
    player._orders = {False: [None]}  # type: ignore[list-item]
    assert player._receive_order().iteration == 7


def test_two_ranks_share_the_episodes_and_train_as_without(tmp_path: Path) -> None:
    flags = ["--env-id", "tests.envs:Dicey-v0", "--norm-obs", *ON_POLICY]
    flags += ["--env-kwargs", '{"length": 5}']
    without = run_team("fabricrl.algos.ppo.ppo", *flags, "--log-dir", tmp_path / "a", folder=tmp_path / "out_a")
    more = ["--eval-every", 128, "--eval-episodes", 3, "--log-dir", tmp_path / "b"]
    beside = run_team("fabricrl.algos.ppo.ppo", *flags, *more, folder=tmp_path / "out_b")
    first, second = (Path(run.result["checkpoint"]) for run in (without, beside))
    assert differences(content(first), content(second)) == []
    events = logged(second.parent.parent)
    assert [step for step, _ in events["eval/return_mean"]] == [128, 256]
    assert events["eval/length_mean"][0][1] == 5
    assert events["eval/return_std"][0][1] > 0


def test_ranks_play_different_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[int, list[int]] = {}

    def note(envs: Any, policy: Any, episodes: int, seed: int, after_step: Any) -> Episodes:
        seeds[len(seeds)] = [seed + i for i in range(envs.num_envs)]
        return Episodes(np.zeros(episodes), np.zeros(episodes), {})

    monkeypatch.setattr(evaluation, "play", note)
    args = PPOArgs(env_id="tests.envs:Counting-v0", num_envs=2, eval_every=64, eval_episodes=6)
    for rank in range(3):
        envs = make_envs(args, rank, Path())
        beside = Evaluation(args, "ppo", SimpleNamespace(global_rank=rank, world_size=3), envs)
        assert beside._play_share(make_agent(args, envs), 64).shape == (2, 2)
    assert len({seed for own in seeds.values() for seed in own}) == 6


def test_numbers_that_its_episodes_tell_do_not_pile_up() -> None:
    args = PPOArgs(env_id="tests.envs:Dicey-v0", info_keys=("bias",), num_envs=2, eval_every=64, eval_episodes=4)
    envs = make_envs(args, 0, Path())
    beside: Any = Evaluation(args, "ppo", SimpleNamespace(global_rank=0, world_size=1), envs)
    assert not beside._play_share(make_agent(args, envs), 64)[:, -1].isnan().any()
    assert len(beside._envs.take_episode_infos()) == 0


def test_a_resumed_run_resets_its_environments_to_other_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else it would relive its first episodes."""
    seeds: list[list[int]] = []
    reset = gym.vector.SyncVectorEnv.reset

    def noted(self: Any, *, seed: Any = None, options: Any = None) -> Any:
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", noted)
    finished: Finished = call(ppo.main, *FEW, "--vectorization", "sync", "--log-dir", tmp_path)
    call(ppo.main, "--resume", finished.checkpoint, "--total-timesteps", 512)
    assert len({seed for of_a_run in seeds for seed in of_a_run}) == 4


def test_its_episodes_are_those_of_no_training_and_of_no_other_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[Any] = []
    reset = gym.vector.SyncVectorEnv.reset

    def noted(self: Any, *, seed: Any = None, options: Any = None) -> Any:
        seeds.append([seed] if isinstance(seed, int) else seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", noted)
    finished: Finished = call(ppo.main, *FEW, "--eval-every", 128, "--log-dir", tmp_path)
    assert finished.code == 0
    training, *evaluations = seeds
    assert all(seed >= FIRST_TRAINING_SEED for seed in training)
    assert len(evaluations) == 2
    assert evaluations[0] != evaluations[1]
    assert all(0 <= seed < FIRST_TRAINING_SEED - 2 for one in evaluations for seed in one)
