"""Counts and times of a run."""

import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from fabricrl.utils import metric
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from tests.conftest import SINGLE, on_ranks


def test_episodes_equal_those_of_gymnasium_on_the_same_actions_whatever_the_rollout_length() -> None:
    steps, num_envs = 240, 3
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs = RecordEpisodeStatistics(envs)
    envs.reset(seed=3)
    rng = np.random.default_rng(0)
    rewards, dones = np.zeros((steps, num_envs), np.float32), np.zeros((steps, num_envs), bool)
    theirs: list[tuple[float, int]] = []
    for t in range(steps):
        _, reward, terminated, truncated, infos = envs.step(rng.integers(0, 2, num_envs))
        reward = reward * (1 + np.arange(num_envs))  # so that returns differ from lengths
        rewards[t], dones[t] = reward, terminated | truncated
        for env in np.flatnonzero(dones[t]):
            episode = infos["episode"]
            theirs.append((float(episode["r"][env]) * (1 + env), int(episode["l"][env])))
    assert len(theirs) > 20
    for length in (1, 7, 240):  # episodes cross borders of rollouts
        ours = EpisodeStatistics(num_envs)
        for start in range(0, steps, length):
            part = slice(start, start + length)
            ours.update(SINGLE, torch.from_numpy(rewards[part]), torch.from_numpy(dones[part]))
        assert ours.count == len(theirs)
        recent = theirs[-metric.WINDOW :]
        assert list(ours.returns) == [episode_return for episode_return, _ in recent]
        assert ours.mean_return == pytest.approx(np.mean([episode_return for episode_return, _ in recent]))
        assert ours.compute() == {
            "charts/episodic_return": pytest.approx(np.mean([r for r, _ in theirs])),
            "charts/episodic_length": pytest.approx(np.mean([n for _, n in theirs])),
        }
        assert ours.compute() == {}  # nothing has ended since


def test_two_ends_in_one_rollout_and_an_episode_over_three_rollouts_by_hand() -> None:
    episodes = EpisodeStatistics(2)
    no, yes = False, True
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    episodes.update(SINGLE, rewards, torch.tensor([[yes, no], [no, no], [yes, no]]))
    # Environment 0: 1 after one step, 2 + 4 after two
    assert list(episodes.returns) == [1.0, 6.0]
    assert episodes.compute()["charts/episodic_length"] == (1 + 2) / 2
    episodes.update(SINGLE, rewards, torch.tensor([[no, no], [no, no], [no, no]]))
    assert episodes.count == 2
    episodes.update(SINGLE, rewards, torch.tensor([[no, yes], [yes, no], [no, no]]))
    # Environment 1: 70 + 70 + 10 after seven steps; environment 0: 7 + 1 + 2 after five
    assert list(episodes.returns)[2:] == [150.0, 10.0]
    assert episodes.compute()["charts/episodic_length"] == (7 + 5) / 2
    assert np.isnan(EpisodeStatistics(1).mean_return)


@pytest.mark.parametrize("every", [1, 7, 50, 10_000])
def test_steps_noted_one_by_one_count_like_a_rollout_whenever_they_are_flushed(every: int) -> None:
    rng = np.random.default_rng(1)
    rewards, dones = rng.normal(size=(120, 3)), rng.random((120, 3)) < 0.1
    whole, noted = EpisodeStatistics(3), EpisodeStatistics(3)
    whole.update(SINGLE, torch.from_numpy(rewards), torch.from_numpy(dones))
    answer, ended = np.zeros(3), np.zeros(3, bool)  # overwritten by each step, as environments may
    for t in range(120):
        answer[:], ended[:] = rewards[t], dones[t]
        noted.add(answer, ended | False)
        if t % every == 0:
            noted.flush(SINGLE)
    noted.flush(SINGLE)
    noted.flush(SINGLE)  # nothing twice
    assert noted.count == whole.count > 20
    assert sorted(noted.returns) == pytest.approx(sorted(whole.returns))
    assert noted.compute() == pytest.approx(whole.compute())


def test_steps_are_counted_on_all_ranks() -> None:
    def count(fabric: Any) -> EpisodeStatistics:
        episodes = EpisodeStatistics(1)
        episodes.add(np.array([1.0]), np.array([False]))
        episodes.add(np.array([float(fabric.global_rank)]), np.array([fabric.global_rank > 0]))
        episodes.flush(fabric)
        return episodes

    for episodes in on_ranks(3, count):
        assert list(episodes.returns) == [2.0, 3.0]


def test_the_mean_return_looks_back_on_the_last_hundred_episodes() -> None:
    episodes = EpisodeStatistics(1)
    rewards = torch.arange(150.0)[:, None]
    episodes.update(SINGLE, rewards, torch.ones(150, 1, dtype=torch.bool))
    assert episodes.count == 150
    assert episodes.mean_return == np.arange(50, 150).mean()


def test_all_ranks_have_the_episodes_of_all_ranks() -> None:
    def count(fabric: Any) -> EpisodeStatistics:
        episodes = EpisodeStatistics(1)
        rank = fabric.global_rank
        dones = torch.zeros(4, 1, dtype=torch.bool)
        dones[:rank] = True  # as many episodes as the rank's number: none on rank 0
        episodes.update(fabric, torch.full((4, 1), 1.0 + rank), dones)
        return episodes

    for episodes in on_ranks(3, count):
        assert list(episodes.returns) == [2.0, 3.0, 3.0]
        assert episodes.count == 3
        assert episodes.compute()["charts/episodic_return"] == pytest.approx(8 / 3)


def test_where_many_episodes_end_at_once_the_last_hundred_are_of_all_ranks() -> None:
    """150 episodes of one step on each of three ranks; the return tells step and rank."""

    def count(fabric: Any) -> list[float]:
        episodes = EpisodeStatistics(1)
        rewards = 10 * torch.arange(150.0)[:, None] + fabric.global_rank
        episodes.update(fabric, rewards, torch.ones(150, 1, dtype=torch.bool))
        return list(episodes.returns)

    in_time = [10.0 * step + rank for step in range(150) for rank in range(3)]
    assert on_ranks(3, count) == [in_time[-metric.WINDOW :]] * 3


def test_statistics_go_on_after_they_were_stored_and_loaded() -> None:
    episodes, resumed = EpisodeStatistics(1), EpisodeStatistics(1)
    episodes.update(SINGLE, torch.arange(5.0)[:, None], torch.ones(5, 1, dtype=torch.bool))
    resumed.load_state_dict(episodes.state_dict())
    assert (resumed.count, resumed.mean_return) == (5, 2.0)
    assert resumed.returns.maxlen == metric.WINDOW


def test_loss_means_weigh_every_element_alike_and_are_forgotten_after_compute() -> None:
    losses = MeanMetrics()
    losses.update({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[1.0], [3.0]])})
    losses.update({"a": torch.tensor(6.0)})
    assert losses.compute() == {"a": 3.0, "b": 2.0}  # (1 + 2 + 6)/3, (1 + 3)/2
    assert losses.compute() == {}


def test_shares_of_time_sum_to_one_and_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metric, "perf_counter", lambda: now[0])
    clock = Stopwatch("env", "train", "idle")
    for name, seconds in (("env", 1.0), ("train", 2.0), ("env", 5.0)):
        now[0] += seconds
        clock.lap(name)
    assert clock.shares() == {"time/env": 0.75, "time/train": 0.25, "time/idle": 0.0}
    now[0] += 3.0
    clock.lap("idle")
    assert clock.shares() == {"time/env": 0.0, "time/train": 0.0, "time/idle": 1.0}
    assert set(clock.shares().values()) == {0.0}  # no time has passed: no 0/0


def test_shares_of_real_time_sum_to_one() -> None:
    clock = Stopwatch("a", "b")
    time.sleep(0.001)
    clock.lap("a")
    clock.lap("b")
    assert sum(clock.shares().values()) == pytest.approx(1.0)
