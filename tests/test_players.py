"""Several players: equal to one without lag, each with its share of the environments, ended together."""

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode
from torch import Tensor

from fabricrl.algos.ppo import ppo_decoupled
from fabricrl.algos.ppo_recurrent import ppo_recurrent_decoupled
from fabricrl.algos.sac import sac
from fabricrl.data import Batch
from fabricrl.envs import shared
from fabricrl.envs.shared import SharedEnvs
from fabricrl.envs.spaces import env_actions
from fabricrl.envs.vector import check_env, make_envs
from fabricrl.utils.decoupled import Packet
from fabricrl.utils.errors import EnvError, RunError
from tests.process import LIMIT, call, differences, load, run_folder, run_team, saved_steps, team
from tests.test_decoupled import Data, answered, some_messages, watched
from tests.test_decoupled_run import (
    COUPLED,
    FLAGS,
    MODULE,
    ON_POLICY,
    SHARED,
    assert_ended,
    assert_newest_loads,
    checkpoint,
    checkpoints,
    content,
    endless,
    loss_told,
    records,
    resume,
    table,
    wait_for_checkpoint,
)

FOUR: list[object] = ["--num-envs", 4]
# Checkpoints with which an episode of each environment ends
AT_EPISODES_ENDS = dict.fromkeys(("sac", "droq"), (96, 192, 240)) | dict.fromkeys(ON_POLICY, (192, 384, 576))
TWO_PLAYERS: list[object] = ["--players", 2]


def play(algo: str, tmp_path: Path, *flags: object, world_size: int, **options: Any) -> Path:
    line = [*SHARED, *FLAGS[algo], *FOUR, *flags, "--log-dir", tmp_path / "logs"]
    run_team(MODULE[algo], *line, folder=tmp_path, world_size=world_size, **options)
    return run_folder(tmp_path / "logs")


# --- Without lag, several players do what one does


@pytest.mark.parametrize("algo", COUPLED)
def test_two_players_without_lag_leave_the_checkpoints_of_the_coupled_script_to_the_last_bit(
    algo: str, tmp_path: Path
) -> None:
    """Environments, noise, statistics, memory and the order of replay buffers do not depend on who plays."""
    every = {"ppo": 96, "ppo_recurrent": 96, "sac": 48, "droq": 48}[algo]
    flags = ["--eval-every", every, "--eval-episodes", 3]
    one = call(COUPLED[algo].main, *SHARED, *FLAGS[algo], *FOUR, *flags, "--log-dir", tmp_path / "coupled")
    folder = play(algo, tmp_path, *flags, *TWO_PLAYERS, "--max-lag", 0, world_size=3)
    steps = saved_steps(one.folder)
    assert len(steps) >= 3
    assert saved_steps(folder) == steps
    for step in steps:
        assert differences(content(checkpoint(one.folder, step)), content(checkpoint(folder, step))) == [], step
    logs = [
        [{tag: value for tag, value in row.items() if not tag.startswith("time/") and tag != "charts/SPS"} for row in t]
        for t in (table(one.folder), table(folder))
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert theirs == pytest.approx(ours | {"charts/lag": 0}, rel=1e-6, abs=1e-9, nan_ok=True)
    assert any("eval/return_mean" in row for row in logs[0])


@pytest.mark.parametrize("algo", ["ppo_recurrent", "sac"])
def test_two_players_go_on_from_a_coupled_run_and_a_coupled_run_from_them(algo: str, tmp_path: Path) -> None:
    one = call(COUPLED[algo].main, *SHARED, *FLAGS[algo], *FOUR, "--log-dir", tmp_path / "coupled")
    first, second, last = AT_EPISODES_ENDS[algo]
    expected = content(checkpoint(one.folder, last))
    on = resume(algo, checkpoint(one.folder, first), tmp_path, "--max-lag", 0, *TWO_PLAYERS, world_size=3)
    assert differences(expected, content(checkpoint(on, last))) == []
    back = call(COUPLED[algo].main, "--resume", checkpoint(on, second), "--log-dir", tmp_path / "back")
    assert differences(expected, content(back.checkpoint)) == []


class Barrier:
    """Stands for `all_gather` among players that are threads."""

    def __init__(self, count: int) -> None:
        self.rows: list[Tensor] = [torch.empty(0)] * count
        self.wait = threading.Barrier(count, timeout=30).wait

    def __call__(self, players: Any, row: Tensor) -> Tensor:
        self.rows[players.global_rank] = row.clone()
        self.wait()
        rows = torch.stack(self.rows)
        self.wait()
        return rows


def in_threads(monkeypatch: pytest.MonkeyPatch, play: Callable[[int], Any]) -> list[Any]:
    """Results of `play`, one for each of two players."""
    monkeypatch.setattr(shared, "all_gather", Barrier(2))
    monkeypatch.setattr(shared, "seed_generators", lambda *_, **__: None)  # of the process, which they share
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(play, (0, 1)))


SETTINGS: dict[str, Any] = {"env_id": "CartPole-v1", "env_kwargs": "{}", "vectorization": "sync", "seed": 1}
SETTINGS |= {"capture_video": False, "video_every": 1}


def history(envs: Any, num_steps: int) -> list[Any]:
    """Everything that environments return in a few steps, in which each takes the first action that it may."""
    obs, infos = envs.reset(seed=[100 + i for i in range(4)])
    masks = infos.get("action_mask")
    found: list[Any] = [obs.copy(), np.array(masks)]
    for t in range(num_steps):
        actions = env_actions(
            envs.single_action_space, (np.full(4, t % 2) if masks is None else masks.argmax(1))[:, None]
        )
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        masks = infos.get("action_mask")
        found += [obs.copy(), np.array(rewards), np.array(terminated), np.array(truncated), np.array(masks)]
        found += [np.array(infos["final_obs"][env]) for env in np.flatnonzero(terminated | truncated)]
        found += [np.array(infos.get(name, np.zeros(4, bool))) for name in ("skipped", "life_lost")]
    return [*found, envs.take_episode_infos(), envs.take_episode_infos()]  # each once


@pytest.mark.parametrize("env_id", ["tests.envs:Masked-v0", "tests.image_envs:Lives-v0", "CartPole-v1"])
def test_each_player_sees_what_one_player_of_all_environments_sees(
    env_id: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Masks, numbers that are told at the ends of episodes, lives, final observations."""
    settings: dict[str, Any] = {"env_id": env_id, "info_keys": ("half",) if "Masked" in env_id else ()}
    if "Lives" in env_id:
        settings |= {"life_loss": True, "env_kwargs": '{"truncate_after": 8}'}
    one, half = (SimpleNamespace(**SETTINGS | settings, num_envs=count) for count in (4, 2))
    mask_size = check_env(one, (Discrete,), None, images=True).mask_size
    expected = history(make_envs(one, 0, tmp_path, mask_size > 0), 25)

    def play(rank: int) -> list[Any]:
        envs = make_envs(half, rank, tmp_path, mask_size > 0, 2 * rank)
        group, keys = SimpleNamespace(global_rank=rank, world_size=2), envs.keys  # type: ignore[attr-defined]
        found = history(SharedEnvs(envs, group, False, mask_size, keys), 25)
        assert not len(envs.take_episode_infos())  # type: ignore[attr-defined]  # they do not pile up
        return found

    for found in in_threads(monkeypatch, play):
        assert len(found) == len(expected)
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    if "Masked" in env_id:
        assert len(expected[-2]) > 4
        assert len(expected[-1]) == 0
    if "Lives" in env_id:
        assert any(part.any() for part in expected[8::7] if part.dtype == bool)


def test_environments_that_reset_a_step_later_are_marked_for_all_players(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of a player draw from one generator, so that their episodes are others than those of one player."""
    args = SETTINGS | {"vectorization": "native"}

    def play(rank: int) -> tuple[list[Any], np.ndarray]:
        envs = make_envs(SimpleNamespace(**args, num_envs=2), rank, tmp_path, False, 2 * rank)
        whole = SharedEnvs(envs, SimpleNamespace(global_rank=rank, world_size=2), False, 0, ())
        assert whole.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        whole.reset(seed=[1, 2, 3, 4])
        seen = [whole.step(np.full(4, 1)) for _ in range(12)]
        return [step[0] for step in seen], np.array([step[-1].get("skipped", np.zeros(4, bool)) for step in seen])

    (obs, skipped), (other_obs, other_skipped) = in_threads(monkeypatch, play)
    assert skipped.any(0).all()
    assert (np.array(obs) == np.array(other_obs)).all()
    assert (skipped == other_skipped).all()


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_fault_of_one_players_environment_ends_the_step_of_all_and_only_that_player_says_why(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def play(rank: int) -> tuple[str, int]:
        envs: Any = make_envs(SimpleNamespace(**SETTINGS, num_envs=2), rank, tmp_path, False, 2 * rank)
        whole = SharedEnvs(envs, SimpleNamespace(global_rank=rank, world_size=2), False, 0, ())
        if where == "step":
            whole.reset(seed=[1, 2, 3, 4])
            whole.step(np.zeros(4, int))
        if rank == 1:
            envs.env.envs[0].index = 2
            setattr(envs.env.envs[0], where, broken)
        with pytest.raises(RunError) as caught:
            whole.step(np.zeros(4, int)) if where == "step" else whole.reset(seed=[1, 2, 3, 4])
        return str(caught.value), caught.value.exit_code

    def broken(*_: Any, **__: Any) -> tuple:
        raise EnvError("environment 2 failed")

    assert in_threads(monkeypatch, play) == [("", 4), ("environment 2 failed", 4)]


# --- With a lag, each has its share


@pytest.mark.parametrize(("algo", "lag"), [("ppo", 1), ("ppo_recurrent", 2), ("sac", 1), ("droq", 1)])
def test_a_run_of_two_players_and_two_trainers_is_repeatable_and_resumes_to_the_last_bit(
    algo: str, lag: int, tmp_path: Path
) -> None:
    flags = [*TWO_PLAYERS, "--max-lag", lag]
    folder = play(algo, tmp_path / "straight", *flags, world_size=4)
    middle, *_, last = AT_EPISODES_ENDS[algo]
    again = resume(algo, checkpoint(folder, middle), tmp_path / "again", world_size=4)
    expected = content(checkpoint(folder, last))
    assert differences(expected, content(checkpoint(again, last))) == []
    assert expected["world_size"] == 1
    assert load(checkpoint(folder, last))["args"]["num_envs"] == 4
    assert max(row["charts/lag"] for row in table(folder)) == lag
    finished = call(COUPLED[algo].main, "--resume", folder, "--total-timesteps", 640, "--log-dir", tmp_path / "on")
    assert (finished.code, finished.result["steps"]) == (0, "640")


def test_each_trainer_of_sac_keeps_transitions_of_every_player_and_all_are_kept_once(tmp_path: Path) -> None:
    """Before learning starts, several players play what one does. Each of two trainers has one environment of each."""
    one = call(sac.main, *SHARED, *FLAGS["sac"], *FOUR, "--log-dir", tmp_path / "coupled")
    folder = play("sac", tmp_path, *TWO_PLAYERS, "--max-lag", 1, world_size=4)
    whole = records(content(checkpoint(one.folder, 48))[".shard0"], 4)
    parts = content(checkpoint(folder, 48))
    for trainer in (0, 1):
        assert (records(parts[f".shard{trainer}"], 2) == whole[:, [trainer, trainer + 2]]).all()


def test_what_trainers_get_of_several_players_is_the_rollout_of_one_in_its_order() -> None:
    """For one trainer, and for two: PPO's rows step by step, those of a recurrent policy by environment."""
    num_steps, num_envs = 3, 8
    numbers = torch.arange(num_steps * num_envs)
    by_step = Batch(obs=numbers[:, None], valid=None, values=numbers * 1.0)
    by_env = numbers.view(num_steps, num_envs).T.flatten()

    def joined(script: Any, count: int, trainers: int, whole: bool) -> list[list[int]]:
        """Numbers of the rows that each trainer gets of `count` players, who see all or their own environments."""
        parts: list[list[Any]] = [[] for _ in range(trainers)]
        for player in range(count):
            own = slice(player * num_envs // count, (player + 1) * num_envs // count)
            run = SimpleNamespace(args=SimpleNamespace(num_steps=num_steps), trainers=SimpleNamespace(count=trainers))
            run.own_envs = own if whole else slice(0, num_envs // count)
            seen = numbers.view(num_steps, -1) if whole else numbers.view(num_steps, -1)[:, own]
            if script is ppo_decoupled:
                shares = [ppo_decoupled.Rollout(0.1, 0.2, 0.3, *s) for s in script.divide(run, by_step[seen.flatten()])]
            else:
                rows = seen.T.flatten()
                data = Batch(obs=rows[:, None], valid=None, values=rows * 1.0)
                shares = [
                    script.Rollout(0.1, 0.2, 0.3, *share)
                    for share in script.divide(run, data, rows >= (num_steps - 1) * num_envs)
                ]
            for part, share in zip(parts, shares, strict=True):
                part.append(share)
        merged = [first.joined(others) for first, *others in parts]
        for rollout in merged:
            assert rollout[:3] == (0.1, 0.2, 0.3)
            assert rollout.data.valid is None
            assert (rollout.data.obs[:, 0] == rollout.data.values).all()
            if script is ppo_recurrent_decoupled:  # a sequence is steps of one environment, one after the other
                follows = rollout.data.obs[1:, 0] == rollout.data.obs[:-1, 0] + num_envs
                assert (follows | rollout.ends[:-1]).all(), "a sequence goes on in another environment"
        return [rollout.data.obs[:, 0].tolist() for rollout in merged]

    for whole in (True, False):
        for count in (1, 2, 4):
            assert joined(ppo_decoupled, count, 1, whole) == [numbers.tolist()]
            assert joined(ppo_recurrent_decoupled, count, 1, whole) == [by_env.tolist()]
            for script in (ppo_decoupled, ppo_recurrent_decoupled):
                for trainers in (2, 3):
                    shares = joined(script, count, trainers, whole)
                    assert sorted(itertools.chain(*shares)) == numbers.tolist(), "a row is lost, or learned from twice"
                    assert len({len(share) for share in shares}) == 1
        assert joined(ppo_decoupled, 2, 2, whole) == joined(ppo_decoupled, 1, 2, whole)


# --- Weights


def test_weights_that_travel_in_bfloat16_take_half_the_bytes_and_a_checkpoint_has_them_whole() -> None:
    exact, rounded = some_messages(), some_messages()
    rounded.full_precision = False
    weights = torch.tensor([1.001, -2.003])
    for messages in (exact, rounded):
        messages.weights.copy_(weights)
    answers = [Packet(messages.answer()).fill(messages.answer()).read() for messages in (exact, rounded)]
    assert torch.equal(answers[0].weights, weights)
    assert torch.equal(answers[1].weights, weights.bfloat16())
    assert answers[1].weights.nbytes * 2 == answers[0].weights.nbytes
    assert len(rounded.learned) == len(exact.learned) + 1
    here = some_messages()
    here.full_precision = False
    here.weights.copy_(answers[1].weights)
    assert not torch.equal(here.weights, weights)
    here.load(Packet(rounded.state(1)).fill(rounded.state(1)).read().learned)
    assert torch.equal(here.weights, weights)


@pytest.mark.parametrize(("algo", "policy"), [("ppo", ""), ("sac", "actor."), ("droq", "actor.")])
def test_a_player_acts_with_rounded_weights_if_it_is_told_to_and_saves_those_that_are_not(
    algo: str, policy: str, tmp_path: Path
) -> None:
    """Without lag, and until the first update has come back, it is the run with whole weights."""
    whole, rounded = (
        play(algo, tmp_path / kind, "--max-lag", 0, "--weights-precision", kind, world_size=2)
        for kind in ("fp32", "bf16")
    )
    for step in saved_steps(rounded)[0 if algo == "ppo" else -1 :]:  # off-policy, the first ones are of random actions
        agents = [load(checkpoint(folder, step))["agent"] for folder in (whole, rounded)]
        tensors = [value for name, value in agents[1].items() if name.startswith(policy) and "weight" in name]
        assert any(not torch.equal(value, value.bfloat16().float()) for value in tensors), "rounded"
        assert differences(*agents), "it has acted with the same weights"


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_checkpoint_changes_nothing_where_weights_are_rounded(algo: str, tmp_path: Path) -> None:
    flags = ["--max-lag", 0, "--weights-precision", "bf16"]
    often = play(algo, tmp_path / "often", *flags, world_size=2)
    seldom = play(algo, tmp_path / "seldom", *flags, "--checkpoint-every", 0, world_size=2)
    last = saved_steps(seldom)[-1]
    assert len(saved_steps(often)) > 1
    assert differences(*(load(checkpoint(folder, last))["agent"] for folder in (often, seldom))) == []


# --- Messages


def test_players_other_than_the_first_send_data_alone() -> None:
    trainers, notes = watched(2, answered(0), max_lag=0)
    trainers.leads = False
    before = len(notes.sent)
    trainers.train([Data(1), Data(2)])
    trainers.stop()
    trainers.report_failure(5)
    assert [(name, to, sent.data.row) for name, to, _, sent in notes.sent[before:]] == [
        ("Order", 1, 1),
        ("Order", 2, 2),
    ]
    notes.answers.append(answered(0))
    trainers.save()
    assert len(notes.sent) == before + 2
    assert notes.answers == [], "it takes the Answer as the first does, or it would be behind"


# --- Ends


def break_environment(rank: int) -> None:
    """The second player's environments fail at some step."""
    from fabricrl.envs.failures import ReportFailures

    step, calls = ReportFailures.step, []

    def spoil(envs: Any, actions: Any) -> tuple:
        calls.append(1)
        if len(calls) > 330 and rank == 1:
            raise EnvError("the second player's environment failed")
        return step(envs, actions)

    ReportFailures.step = spoil  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(("algo", "lag"), [("ppo", 0), ("ppo", 1), ("sac", 0), ("sac", 1)])
def test_a_fault_of_the_second_player_ends_all_ranks_with_its_code_and_one_line(
    algo: str, lag: int, tmp_path: Path
) -> None:
    flags = [*endless(algo, tmp_path), *TWO_PLAYERS, "--max-lag", lag]
    ended = run_team(MODULE[algo], *flags, folder=tmp_path, code=4, world_size=3, prepare=break_environment)
    assert ended.errors == ["error: the second player's environment failed"], ended.report()
    assert_newest_loads(algo, tmp_path)


@pytest.mark.parametrize(("algo", "victim"), [("ppo", 0), ("droq", 1), ("sac", 2)])
def test_a_killed_rank_ends_players_and_trainers_with_code_7_and_a_line(algo: str, victim: int, tmp_path: Path) -> None:
    flags = [*endless(algo, tmp_path), *TWO_PLAYERS]
    with team(MODULE[algo], *flags, folder=tmp_path, world_size=3) as running:
        wait_for_checkpoint(running, tmp_path)
        os.kill(running.ranks[victim].pid or 0, signal.SIGKILL)
        assert_ended(running, [-9 if rank == victim else 7 for rank in range(3)], within=LIMIT)
    assert re.fullmatch(rf"rank {victim}, process {running.ranks[victim].pid} of \S+, has ended", loss_told(running))
    assert_newest_loads(algo, tmp_path)


@pytest.mark.parametrize(("algo", "rank"), [("ppo_recurrent", 1), ("sac", 2)])
def test_a_signal_to_any_rank_ends_all_players_after_the_same_iteration(algo: str, rank: int, tmp_path: Path) -> None:
    with team(MODULE[algo], *endless(algo, tmp_path), *TWO_PLAYERS, folder=tmp_path, world_size=3) as running:
        wait_for_checkpoint(running, tmp_path)
        os.kill(running.ranks[rank].pid or 0, signal.SIGTERM)
        assert_ended(running, [143] * 3, within=LIMIT)
    assert running.errors == []
    path = assert_newest_loads(algo, tmp_path)
    assert running.result["checkpoint"] == str(path)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_an_evaluation_that_is_good_enough_ends_all_players(algo: str, tmp_path: Path) -> None:
    flags = ["--eval-every", 96, "--eval-episodes", 1, "--stop-at-return", -1000, "--log-dir", tmp_path / "logs"]
    line = [*SHARED, *FLAGS[algo], *TWO_PLAYERS, *FOUR, *flags]
    ended = run_team(MODULE[algo], *line, folder=tmp_path, world_size=3)
    assert 96 <= int(ended.result["steps"]) <= 128
    assert len(checkpoints(tmp_path)) >= 1


@pytest.mark.parametrize(
    ("algo", "flags", "words"),
    [
        ("ppo", ["--num-envs", 3, "--players", 3],
         "--players is 3: it must be less than 3, the number of ranks (--devices), since the others train"),
        ("ppo", ["--players", 0], "--players is 0: it must be an integer of at least 1"),
        ("sac", ["--num-envs", 3], "--num-envs is 3: it must be a multiple of 2, the players"),
        ("ppo", ["--num-envs", 2, "--num-steps", 9, "--num-minibatches", 1, "--players", 2],
         "--num-envs is 2: it must be such that each of 2 trainers has an equal share of the 9 steps of each player"),
        ("sac", ["--num-envs", 2, "--players", 2],
         "--num-envs is 2: it must be a multiple of 4, so that 2 trainers have as many of each of 2 players"),
    ],
)  # fmt: skip
def test_what_players_cannot_share_is_refused_in_one_line(
    algo: str, flags: list[object], words: str, tmp_path: Path
) -> None:
    world_size = 4 if flags[-2:] == ["--players", 2] else 3
    line = [*endless(algo, tmp_path), *TWO_PLAYERS, *flags]
    ended = run_team(MODULE[algo], *line, folder=tmp_path, code=2, world_size=world_size)
    assert ended.errors == [f"error: {words}"], ended.report()
    assert not (tmp_path / "logs").exists()


# --- Players on the CPU beside trainers that own GPUs


def stand_in_for_gpus(rank: int) -> None:
    """Two GPUs, for which the CPU stands: each rank notes the one that it has, and how its group would average."""
    from lightning.fabric.accelerators import CUDAAccelerator
    from lightning.fabric.plugins.collectives import TorchCollective

    from fabricrl.algos.decoupled import ranks
    from fabricrl.utils.process import PLACE

    create_group, notes = TorchCollective.create_group, Path(os.environ["NOTES"])

    def noted(collective: TorchCollective, backend: str, **more: Any) -> Any:
        with (notes / str(rank)).open("a") as file:
            print(PLACE.gpu, backend, *more.get("ranks", ["all"]), file=file)
        return create_group(collective, backend="gloo", **more)

    def placed(fabric: Any) -> torch.device:
        return torch.device("cpu", PLACE.gpu)

    CUDAAccelerator.is_available = staticmethod(lambda: True)  # type: ignore[method-assign]
    CUDAAccelerator.parse_devices = staticmethod(lambda devices: [0, 1][: len(devices)])  # type: ignore[method-assign]
    torch.cuda.set_device = lambda gpu: None
    ranks.trainer_device = placed
    TorchCollective.create_group = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("algo", ["ppo", "droq"])
def test_players_on_the_cpu_take_no_gpu_and_change_nothing(algo: str, tmp_path: Path) -> None:
    plain = play(algo, tmp_path / "plain", "--max-lag", 0, world_size=3)
    on_gpus, notes = ["--accelerator", "cuda", "--player-device", "cpu"], {"NOTES": str(tmp_path)}
    options: dict[str, Any] = {"prepare": stand_in_for_gpus, "variables": notes}
    beside = play(algo, tmp_path / "beside", "--max-lag", 0, *on_gpus, world_size=3, **options)
    messages, gradients = "gloo all", "nccl 1 2"
    told = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(3)]
    assert told[0][0] == f"None {messages}"
    assert told[1:] == [[f"{gpu} {messages}", f"{gpu} {gradients}"] for gpu in (0, 1)]
    last = saved_steps(plain)[-1]
    assert saved_steps(beside) == saved_steps(plain)
    assert differences(content(checkpoint(plain, last)), content(checkpoint(beside, last))) == []
