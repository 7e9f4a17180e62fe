"""Evaluation: the numbers are those of a loop that a reader would write, and every episode counts once."""

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fabricrl import evaluate
from fabricrl.algos.ppo.ppo import main
from fabricrl.utils.errors import CheckpointError, ConfigError, EnvError, OutputError
from tests.envs import Counting
from tests.process import Finished, call, load

KEYS = {f"{name}_{part}" for name in ("return", "length") for part in ("mean", "std", "min", "max")} | {"episodes"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A short run with normalised observations, whose statistics evaluation has to use and must not change."""
    flags = ["--total-timesteps", 4096, "--norm-obs", "--norm-reward", "--learning-rate", 1e-3]
    return call(main, *flags, "--log-dir", tmp_path_factory.mktemp("trained"))


def played(path: Path, *flags: object) -> dict[str, Any]:
    finished = call(evaluate.main, path, "--json", *flags)
    assert finished.code == 0
    assert len(finished.out.splitlines()) == 1
    return json.loads(finished.out)


def greedy_action(agent: dict[str, torch.Tensor], obs: np.ndarray) -> int:
    """The policy written out with NumPy: normalise, two tanh layers, the largest logit."""
    weights = {name: tensor.numpy() for name, tensor in agent.items()}
    mean, var = weights["obs_normalizer.mean"], weights["obs_normalizer.var"]
    x = np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)
    for layer in ("actor.hidden.0", "actor.hidden.1"):
        x = np.tanh(weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"])
    return int((weights["actor.out.weight"] @ x + weights["actor.out.bias"]).argmax())


def test_greedy_results_equal_a_loop_written_by_hand(trained: Finished) -> None:
    """3 environments play 3, 2 and 2 of 7 episodes, one after the other, environment i seeded with seed + i once."""
    agent = load(trained.checkpoint)["agent"]
    returns, lengths = [], []
    for seed, episodes in ((50, 3), (51, 2), (52, 2)):
        env = gym.make("CartPole-v1")
        for episode in range(episodes):
            obs, _ = env.reset(seed=seed if episode == 0 else None)
            score, length, done = 0.0, 0, False
            while not done:
                obs, reward, terminated, truncated, _ = env.step(greedy_action(agent, obs))
                score, length, done = score + float(reward), length + 1, terminated or truncated
            returns.append(score)
            lengths.append(length)
    result = played(trained.checkpoint, "--episodes", 7, "--num-envs", 3, "--seed", 50)["greedy"]
    assert len(set(returns)) > 1, "all episodes alike: nothing is compared"
    assert result == {
        "return_mean": np.mean(returns), "return_std": np.std(returns), "return_min": min(returns),
        "return_max": max(returns), "length_mean": np.mean(lengths), "length_std": np.std(lengths),
        "length_min": min(lengths), "length_max": max(lengths), "episodes": 7,
    }  # fmt: skip


def test_json_has_both_modes_with_all_keys_and_is_the_same_when_repeated(trained: Finished) -> None:
    before = trained.checkpoint.read_bytes()
    result = played(trained.checkpoint, "--episodes", 12)
    assert result.keys() == {"greedy", "sampled"}
    assert all(mode.keys() == KEYS and mode["episodes"] == 12 for mode in result.values())
    assert result["greedy"] != result["sampled"]
    assert played(trained.folder, "--episodes", 12) == result  # of a run folder the newest checkpoint is played
    assert played(trained.checkpoint, "--episodes", 12, "--seed", 5) != result
    assert trained.checkpoint.read_bytes() == before


def test_without_a_screen_no_window_is_tried(trained: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(EnvError, match="--render needs a screen, and there is none"):
        call(evaluate.main, trained.checkpoint, "--episodes", 1, "--render")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    evaluate.check_screen()


def test_one_mode_can_be_chosen(trained: Finished) -> None:
    assert played(trained.checkpoint, "--episodes", 2, "--mode", "sampled").keys() == {"sampled"}


def test_sampled_actions_follow_the_probabilities_of_the_policy(trained: Finished) -> None:
    """A policy whose logits are constant, 0 and log 3, takes action 1 three times out of four, greedily always."""
    from fabricrl.algos.ppo.args import PPOArgs
    from fabricrl.algos.ppo.utils import make_agent, make_policy

    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")])
    agent = make_agent(PPOArgs(), envs)
    with torch.no_grad():
        agent.actor.out.weight.zero_()
        agent.actor.out.bias.copy_(torch.tensor([0.0, np.log(3.0)]))
    obs, dones = np.zeros((4000, 4), np.float32), np.zeros(4000, bool)
    assert make_policy(agent, envs, True, 0)(obs, dones, dones).mean() == 1
    # A share of 0.75 among 4000 draws has a standard deviation of 0.0068; five of them
    assert make_policy(agent, envs, False, 0)(obs, dones, dones).mean() == pytest.approx(0.75, abs=0.035)
    envs.close()


def test_short_episodes_do_not_count_more_often_than_long_ones() -> None:
    """Environments of episode lengths 1, 2, 30 and 31, two episodes each: the first eight to end would be short ones.

    Counting pays 1 + 2 + … + L in an episode of L steps.
    """
    lengths = (1, 2, 30, 31)
    makers = [lambda length=length: Counting(terminate_after=length) for length in lengths]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    returns, played_lengths, _ = evaluate.play(
        envs, lambda obs, rewards, dones: np.zeros(4, dtype=np.int64), episodes=8, seed=0
    )
    assert sorted(played_lengths) == [1, 1, 2, 2, 30, 30, 31, 31]
    assert sorted(returns) == [1, 1, 3, 3, 465, 465, 496, 496]


def test_the_policy_is_told_which_episodes_have_just_begun() -> None:
    """Environments of 2 and 3 steps; recurrent policies reset their state by this."""
    seen = []

    def policy(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        seen.append(dones.tolist())
        # Counting's reward: the steps taken, and so those shown unless the episode has just begun
        assert (rewards[~dones] == obs[~dones, 0]).all()
        assert (dones == (obs[:, 0] == 0)).all()  # Counting's observation: steps taken in this episode
        return np.zeros(2, dtype=np.int64)

    makers = [lambda length=length: Counting(truncate_after=length) for length in (2, 3)]
    evaluate.play(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), policy, episodes=4, seed=0)
    assert seen == [[True, True], [False, False], [True, False], [False, True], [True, False], [False, False]]


def test_the_table_has_a_line_for_each_mode(trained: Finished) -> None:
    lines = call(evaluate.main, trained.checkpoint, "--episodes", 3).out.splitlines()
    assert "CartPole-v1" in lines[0]
    assert str(trained.checkpoint) in lines[0]
    assert "4096 steps" in lines[0]
    numbers = played(trained.checkpoint, "--episodes", 3)
    for line, mode in zip(lines[1:], ("greedy", "sampled"), strict=True):
        assert line.split()[0] == mode
        for key in ("return_mean", "return_std", "return_min", "return_max"):
            assert f"{numbers[mode][key]:.2f}" in line
        assert f"{numbers[mode]['length_mean']:.1f}" in line


def test_every_episode_is_recorded_into_the_run_folder(trained: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    finished = call(evaluate.main, folder, "--episodes", 2, "--capture-video", "--mode", "sampled")
    videos = sorted((folder / "videos").rglob("*.mp4"))
    assert [video.name for video in videos] == ["sampled-episode-0.mp4", "sampled-episode-1.mp4"]
    assert all(b"ftyp" in video.read_bytes()[:16] for video in videos)
    assert str(videos[0].parent) in finished.out


def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(trained: Finished, tmp_path: Path) -> None:
    from fabricrl.utils.checkpoint import save_checkpoint

    def refusal(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            call(evaluate.main, path, "--json")
        assert caught.value.exit_code == 3
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    stored = load(trained.checkpoint)
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(trained.checkpoint.read_bytes()[:-500])
    assert "truncated" in refusal(damaged)
    assert "nosuchalgo" in refusal(save_checkpoint(tmp_path, 1, stored | {"algo": "nosuchalgo"}, keep=9))
    other = save_checkpoint(tmp_path, 2, stored | {"args": stored["args"] | {"env_id": "Acrobot-v1"}}, keep=9)
    assert "obs space" in refusal(other)
    narrow = save_checkpoint(tmp_path, 3, stored | {"args": stored["args"] | {"hidden_sizes": [64, 8]}}, keep=9)
    assert "actor.hidden.1" in refusal(narrow)


def test_a_folder_of_videos_that_cannot_be_made_is_no_fault_of_the_environment(trained: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    (folder / "videos").touch()
    with pytest.raises(OutputError, match=r"cannot write .*videos.*: "):
        call(evaluate.main, folder, "--episodes", 2, "--capture-video")


def test_more_environments_than_there_are_seeds_are_refused(trained: Finished) -> None:
    with pytest.raises(ConfigError, match="num-envs is 3000000000: it must be at least 1, at most 1048576"):
        call(evaluate.main, trained.folder, "--num-envs", 3_000_000_000)
