"""Atari games played in C++, by ale-py and by EnvPool: what Gymnasium's wrappers show, to the last pixel."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.data import RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.envs.atari import AtariVectorEnv
from fabricrl.envs.backends import choose, cores_of_rank
from fabricrl.envs.vector import check_env
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.seeding import env_seeds
from tests.process import FORKSERVER, Finished, call, differences, load

ale_py = pytest.importorskip("ale_py")
pytest.importorskip("cv2")
gym.register_envs(ale_py)

ATARI = {name: value for name, value in PRESETS["atari"].items() if name not in ("num_threads", "env_id", "num_envs")}
# How an episode begins without chance: EnvPool does nothing once at the least, ale-py's vector environment never
CERTAIN = {"envpool": {"noop_max": 1}, "native": {"noop_max": 0}}


def environments(kind: str, env_id: str = "ALE/Pong-v5", num_envs: int = 1, **settings: Any) -> VectorEnv:
    return make_envs(PPOArgs(env_id=env_id, vectorization=kind, num_envs=num_envs, **ATARI | settings), 0, Path())


@pytest.fixture
def opened() -> Iterator[Callable[..., VectorEnv]]:
    """`environments` that are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(contextlib.closing(environments(*args, **settings)))


@pytest.fixture(params=["native", "envpool"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "envpool":
        pytest.importorskip("envpool")
    return request.param


@pytest.fixture
def games(kind: str, opened: Callable[..., VectorEnv]) -> Callable[..., tuple[VectorEnv, VectorEnv]]:
    """The same games without chance, by Gymnasium and in C++."""

    def both(env_id: str, num_envs: int = 1, **settings: Any) -> tuple[VectorEnv, VectorEnv]:
        theirs, ours = (opened(one, env_id, num_envs, **CERTAIN[kind] | settings) for one in ("sync", kind))
        assert ours.single_observation_space == theirs.single_observation_space
        return theirs, ours

    return both


def actions_of(envs: VectorEnv, steps: int) -> np.ndarray:
    """[steps, N]"""
    return np.random.default_rng(0).integers(envs.single_action_space.n, size=(steps, envs.num_envs))


# --- One frame, one game


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "ALE/Breakout-v5"])
def test_a_game_without_chance_is_gymnasiums_to_the_last_pixel(env_id: str, kind: str, games: Callable) -> None:
    """A whole game and the beginning of the next."""
    theirs, ours = games(env_id)
    found, expected = ours.reset(seed=[3])[0], theirs.reset(seed=[3])[0]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.uint8
    ends = lives = 0
    for action in actions_of(theirs, 1000):
        assert np.array_equal(found, expected)
        expected, *their_rest, their_infos = theirs.step(action)
        found, *our_rest, our_infos = ours.step(action)
        assert [part.tolist() for part in our_rest] == [part.tolist() for part in their_rest]
        assert "skipped" not in our_infos
        if their_rest[1][0]:
            ends += 1
            # EnvPool takes no maximum with an older frame if the game ends within a step of four
            most = 0 if kind == "native" else 1
            assert np.abs(our_infos["final_obs"][0].astype(int) - their_infos["final_obs"][0]).mean() <= most
            assert np.abs(our_infos["final_obs"][0].astype(int) - found[0]).mean() > 1
        else:  # at the end of a game the last life is lost, which nobody needs to be told
            lives += their_infos["life_lost"][0]
            assert our_infos["life_lost"][0] == their_infos["life_lost"][0]
        if ends and not np.any(their_rest):
            break
    assert ends == 1
    assert lives == (4 if "Breakout" in env_id else 0)


def test_colours_large_rewards_and_all_actions_are_the_same(games: Callable) -> None:
    settings = {"repeat_action_probability": 0.0, "full_action_space": True}
    theirs, ours = games("ALE/MsPacman-v5", grayscale=False, resize=64, env_kwargs=json.dumps(settings))
    assert ours.single_action_space.n == theirs.single_action_space.n == 18
    assert np.array_equal(ours.reset(seed=[3])[0], theirs.reset(seed=[3])[0])
    most = 0.0
    for action in actions_of(theirs, 100):
        (found, our_reward, *_), (expected, their_reward, *_) = ours.step(action), theirs.step(action)
        assert np.array_equal(found, expected)
        assert our_reward == their_reward
        most = max(most, their_reward[0])
    assert most >= 10
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 5


def test_records_of_odd_size_are_padded(games: Callable) -> None:
    theirs, ours = games("ALE/Pong-v5", resize=85)
    found, expected = ours.reset(seed=[1])[0], theirs.reset(seed=[1])[0]
    assert found.shape == (1, 7228)
    assert np.array_equal(found[:, : 85 * 85], expected[:, : 85 * 85])
    assert not found[:, 85 * 85 :].any()


def ale_seed(seed: int) -> int:
    """The seed that Gymnasium's AtariEnv gives to the emulator."""
    return int(np.random.SeedSequence(seed).generate_state(2)[1])


NO_CHANCE = {"repeat_action_probability": 0.0}
PLAIN = {"action_repeat": 1, "noop_max": 0}  # the game repeats its actions, and draws on for frames after its end
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # flags, and --env-kwargs
    "preprocessed": ({"noop_max": 0}, {}),
    "whole screen": ({"noop_max": 0, "resize": None, "action_repeat": 2}, {"max_num_frames_per_episode": 250}),
    "all actions": ({"noop_max": 0}, {"full_action_space": True, "repeat_action_probability": 0.5}),
    "as the id says": (PLAIN | {"grayscale": False, "resize": None}, NO_CHANCE | {"max_num_frames_per_episode": 250}),
    "one frame": (PLAIN, {"frameskip": 1, "max_num_frames_per_episode": 70}),
}


@pytest.mark.parametrize(("flags", "kwargs"), SETTINGS.values(), ids=SETTINGS)
def test_sticky_games_are_gymnasiums_where_the_emulator_has_the_same_seed(
    flags: dict[str, Any], kwargs: dict[str, Any], opened: Callable[..., VectorEnv]
) -> None:
    """Games of Breakout that are cut after some hundred frames, and what follows."""
    settings = flags | {"env_kwargs": json.dumps({"max_num_frames_per_episode": 500} | kwargs)}
    theirs, ours = (opened(kind, "ALE/Breakout-v5", 2, **settings) for kind in ("sync", "native"))
    seeds = [1, 4]
    assert all(ale_seed(seed) < 2**31 for seed in seeds), "others are none for ale-py's vector environment"
    found, expected = ours.reset(seed=[ale_seed(seed) for seed in seeds])[0], theirs.reset(seed=seeds)[0]
    ends = np.zeros(2)
    for action in actions_of(theirs, 150):
        assert np.array_equal(found, expected)
        expected, *their_rest, their_infos = theirs.step(action)
        found, *our_rest, our_infos = ours.step(action)
        assert [part.tolist() for part in our_rest] == [part.tolist() for part in their_rest]
        done = their_rest[1] | their_rest[2]
        ends += done
        if not done.any():
            assert our_infos["life_lost"].tolist() == their_infos["life_lost"].tolist()
        for env in np.flatnonzero(done) if flags is not PLAIN and "grayscale" not in flags else ():
            assert np.array_equal(our_infos["final_obs"][env], their_infos["final_obs"][env])
    assert ends.min() >= 1


# --- Chance


def test_games_begin_with_up_to_noop_max_steps_of_nothing(opened: Callable[..., VectorEnv]) -> None:
    """Each number of them, none included, is met in eight games of Ms. Pac-Man, in which something always moves."""
    env = gym.make("ALE/MsPacman-v5", frameskip=1, repeat_action_probability=0.0)
    env.reset(seed=1)
    after = []  # the screen after so many steps of nothing
    for _ in range(5):
        screen = np.empty((210, 160), np.uint8)
        env.unwrapped.ale.getScreenGrayscale(screen)
        after.append(screen.tobytes())
        env.step(0)
    env.close()
    assert len(set(after)) == 5
    envs = opened("native", "ALE/MsPacman-v5", 8, noop_max=2, resize=None)
    counts = [after.index(row.tobytes()) for row in envs.reset(seed=env_seeds(1, 0, 8))[0]]
    assert set(counts) == {0, 1, 2}


def test_games_differ_by_how_long_nothing_is_done_at_their_beginning(games: Callable) -> None:
    for envs in games("ALE/Pong-v5", 3, noop_max=30):
        envs.reset(seed=[1, 2, 3])
        obs = [envs.step(np.zeros(3, np.int64))[0].copy() for _ in range(20)][-1]
        assert len(np.unique(obs, axis=0)) > 1


@pytest.mark.parametrize("sticky", [False, True])
def test_sticky_actions_are_carried_over(sticky: bool, games: Callable) -> None:
    """With them, three games that begin alike and are played alike diverge; they are what an id has by default."""
    for envs in games("ALE/Breakout-v5", 3, env_kwargs="{}" if sticky else ATARI["env_kwargs"]):
        envs.reset(seed=[1, 2, 3])
        played = [envs.step(np.full(3, action))[0].copy() for action in actions_of(envs, 40)[:, 0]]
        assert any((obs != obs[0]).any() for obs in played) == sticky


def test_the_time_limit_of_a_game_is_carried_over(monkeypatch: pytest.MonkeyPatch, games: Callable) -> None:
    """400 frames are 100 steps of four, of which the steps of doing nothing take a part."""
    limits = gym.registry["ALE/Pong-v5"].kwargs
    assert limits["max_num_frames_per_episode"] == 108_000
    monkeypatch.setitem(limits, "max_num_frames_per_episode", 400)
    for envs in games("ALE/Pong-v5"):
        envs.reset(seed=[1])
        (end,) = [t for t in range(1, 110) if envs.step(np.zeros(1, np.int64))[3][0]]
        assert 98 <= end <= 101


def test_the_time_limit_of_a_game_begins_natively_after_the_steps_of_nothing(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[..., VectorEnv]
) -> None:
    """In Gymnasium 1 to 30 of the 400 frames pass with them."""
    monkeypatch.setitem(gym.registry["ALE/Pong-v5"].kwargs, "max_num_frames_per_episode", 400)
    ends = {}
    for kind in ("native", "sync"):
        envs = opened(kind, "ALE/Pong-v5", 4, noop_max=30)
        envs.reset(seed=[1, 2, 3, 4])
        truncated = np.array([envs.step(np.zeros(4, np.int64))[3] for _ in range(100)])
        assert truncated.any(0).all()
        ends[kind] = 1 + truncated.argmax(0)
    assert ends["native"].tolist() == [100] * 4
    assert ends["sync"].min() >= (400 - 30) // 4
    assert ends["sync"].max() <= 100
    assert len(set(ends["sync"].tolist())) > 1


def test_a_game_without_a_time_limit_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("ale_py.vector_env.AtariVectorEnv", lambda game, num_envs, **given: told.update(given))
    monkeypatch.setitem(gym.registry["ALE/Pong-v5"].kwargs, "max_num_frames_per_episode", None)
    environments("native").close()
    assert told["max_num_frames_per_episode"] > 2e9  # ale-py's own, if it is told none, is 30 minutes


def test_policies_that_draw_their_actions_earn_alike(games: Callable) -> None:
    """Games are given the same actions in pairs, so that points lost at Pong differ by chance alone, and by little."""
    lost = []
    for envs in games("ALE/Pong-v5", 12, env_kwargs="{}", noop_max=30):
        envs.reset(seed=list(range(1, 13)))
        rewards = np.array([envs.step(action)[1] for action in actions_of(envs, 400)])
        assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
        lost.append(-rewards.sum(0))
    difference = lost[0] - lost[1]
    most = 3 * difference.std(ddof=1) / math.sqrt(12)
    assert most < 0.35 * np.mean(lost)
    assert abs(difference.mean()) < most


def test_the_seed_of_a_game_says_what_happens_in_it(opened: Callable[..., VectorEnv]) -> None:
    def played(seeds: list[int]) -> np.ndarray:
        envs.reset(seed=seeds)
        return np.stack([envs.step(np.full(3, action))[0] for action in actions_of(envs, 12)[:, 0]], 1)

    envs = opened("native", "ALE/Breakout-v5", 3, env_kwargs="{}", num_steps=8)
    first = played(env_seeds(1, 0, 3))
    assert np.array_equal(played(env_seeds(1, 0, 3)), first)
    assert np.array_equal(played(env_seeds(1, 0, 3)[::-1])[::-1], first)
    both = np.concatenate((first, played(env_seeds(1, 1, 3))))  # of two ranks
    assert len({row.tobytes() for row in both}) == 6


def begin_at_once() -> None:
    settings = {name: value for name, value in ATARI.items() if name != "noop_max"}
    args = PPOArgs(env_id="ALE/Pong-v5", vectorization="envpool", num_envs=2, **settings)
    assert make_envs(args, 0, Path()).reset(seed=[1, 2])[0].any()


def test_a_game_that_begins_at_once_is_played_in_envpool_too() -> None:
    """Without --noop-max; in a process of its own, since memory is at stake."""
    pytest.importorskip("envpool")
    process = FORKSERVER.Process(target=begin_at_once)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


# --- From the threads into the rollout


def test_rows_are_views_of_what_the_threads_have_written(
    opened: Callable[..., VectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = opened("native", "ALE/Pong-v5", 3, env_kwargs='{"max_num_frames_per_episode": 12}')
    inner = envs.unwrapped._games
    written = []
    monkeypatch.setattr(
        envs.unwrapped,
        "_games",
        SimpleNamespace(reset=inner.reset, step=lambda actions: written.append(inner.step(actions)) or written[-1]),
    )
    envs.reset(seed=[1, 2, 3])
    for _ in range(4):
        obs, *_, infos = envs.step(np.zeros(3, np.int64))
        assert obs.shape == (3, 84 * 84)
        assert np.shares_memory(obs, written[-1][0])
        if "final_obs" in infos:
            assert np.shares_memory(infos["final_obs"], written[-1][-1]["final_obs"])
    assert any("final_obs" in row[-1] for row in written)
    assert written[0][0].shape == (3, 1, 84, 84), "one frame, no stack"


def test_a_life_is_lost_against_the_step_before_or_the_reset() -> None:
    """One that is won is none, and a game that has begun again has all."""
    told = iter([3, 2, 2, 5, 4])
    envs: Any = AtariVectorEnv.__new__(AtariVectorEnv)
    envs.num_envs, envs.single_observation_space = 1, Box(0, 255, (4,), np.uint8)
    envs._life_loss, envs._lives, obs = True, np.zeros(1, np.int32), np.zeros((1, 1, 2, 2), np.uint8)
    info = lambda: {"lives": np.array([next(told)], np.int32)}  # noqa: E731
    step = lambda actions: (obs, np.zeros(1), np.zeros(1, bool), np.zeros(1, bool), info())  # noqa: E731
    envs._games = SimpleNamespace(reset=lambda seed: (obs, info()), step=step)
    envs.reset()
    assert [envs.step([0])[-1]["life_lost"].item() for _ in range(4)] == [True, False, False, True]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_end_with_the_environments() -> None:
    before = len(os.listdir("/proc/self/task"))
    envs = environments("native", "ALE/Pong-v5", 4)
    envs.reset(seed=[1, 2, 3, 4])
    threads = min(4, cores_of_rank(envs))
    assert len(os.listdir("/proc/self/task")) >= before + threads
    envs.close()
    assert len(os.listdir("/proc/self/task")) <= before + 1, "the watch stays"


@pytest.mark.parametrize("truncated", [False, True])
def test_a_rollout_is_the_same_to_the_last_byte(truncated: bool, opened: Callable[..., VectorEnv]) -> None:
    """Stacks, lives, ends, and the final observations that are bootstrapped."""
    kwargs = {"repeat_action_probability": 0.0} | ({"max_num_frames_per_episode": 250} if truncated else {})
    settings = {"noop_max": 0, "env_kwargs": json.dumps(kwargs)}
    kept = []
    for kind in ("sync", "native"):
        envs = opened(kind, "ALE/Breakout-v5", 2, **settings)
        rb = RolloutBuffer(200, 2, envs.single_observation_space, 1, torch.int64, frame_stack=4)
        rb.start(envs.reset(seed=[1, 2])[0])
        for t, action in enumerate(actions_of(envs, 200)):
            rb.add(t, action[:, None], *envs.step(action))
        ends = rb.truncated_episodes() if truncated else ()
        kept.append([rb.frames, rb.rewards, rb.terminated, rb.truncated, rb.ends, rb.skipped, rb.stacks, *ends])
    assert all(torch.equal(first, second) for first, second in zip(*kept, strict=True))
    rewards, terminated, cut, ends, skipped = kept[1][1:6]
    assert rewards.sum() > 0
    assert terminated.sum() > 4
    assert (cut.sum() == 6) == truncated
    assert ends.sum() < (terminated | cut).sum(), "no life was lost within a game"
    assert not skipped.any()


# --- Whole runs

SMALL = ["--num-envs", 2, "--num-steps", 32, "--num-minibatches", 2, "--update-epochs", 1, "--num-threads", 1]
SMALL += ["--cnn-features", 16, "--total-timesteps", 128, "--checkpoint-every", 64, "--keep-checkpoints", 9]
BREAKOUT = ["--preset", "atari", "--env-id", "ALE/Breakout-v5", *SMALL, "--noop-max", 0, "--learning-rate", 1e-2]
SHORT = ["--env-kwargs", '{"repeat_action_probability": 0.0, "max_num_frames_per_episode": 120}']


def weights(finished: Finished) -> dict[str, Any]:
    state = load(finished.checkpoint)
    return {name: state[name] for name in ("agent", "optimizer", "episodes", "generators", "global_step")}


@pytest.mark.parametrize("script", [ppo, ppo_recurrent], ids=["ppo", "ppo_recurrent"])
def test_a_run_without_chance_learns_what_gymnasiums_does(script: Any, tmp_path: Path) -> None:
    flags = ["--env-id", "ALE/Breakout-v5", *SMALL, "--noop-max", 0, "--learning-rate", 1e-2, *SHORT]
    flags += ["--grayscale", "--resize", 84, "--frame-stack", 2, "--action-repeat", 4, "--life-loss"]
    first, second = (
        call(script.main, *flags, "--vectorization", kind, "--log-dir", tmp_path / kind) for kind in ("sync", "native")
    )
    assert first.result["episodes"] == second.result["episodes"] == "4"
    assert differences(weights(first), weights(second)) == []


def test_a_resumed_run_goes_on_with_other_games_the_same_each_time(tmp_path: Path) -> None:
    flags = [*BREAKOUT, "--noop-max", 30, "--vectorization", "native"]
    whole = call(ppo.main, *flags, "--log-dir", tmp_path / "whole")
    half = whole.folder / "checkpoints" / "step_000000000064.ckpt"
    first, second = (call(ppo.main, "--resume", half, "--log-dir", tmp_path / name) for name in ("first", "second"))
    assert first.result["steps"] == second.result["steps"] == "128"
    assert "vectorization" not in first.err
    assert differences(weights(first), weights(second)) == []


def test_a_policy_learned_natively_is_evaluated_in_gymnasiums_games(tmp_path: Path) -> None:
    trained = call(ppo.main, *BREAKOUT, *SHORT, "--log-dir", tmp_path, "--eval-every", 64, "--eval-episodes", 1)
    assert "vectorization: native" in trained.err
    played = call(evaluate.main, trained.folder, "--episodes", 2, "--mode", "greedy")
    assert played.code == 0
    assert "greedy" in played.out


def test_an_emulator_that_fails_ends_the_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the cartridge is dusty")

    monkeypatch.setattr("ale_py.vector_env.AtariVectorEnv.step", fail)
    with pytest.raises(EnvError, match="environments failed in step: RuntimeError: the cartridge is dusty") as caught:
        call(ppo.main, *BREAKOUT, "--vectorization", "native", "--log-dir", tmp_path)
    assert caught.value.exit_code == 4


# --- What cannot be had is said before anything starts


def complaint(*flags: object, script: Any = ppo) -> str:
    with pytest.raises(ConfigError) as caught:
        call(script.main, *flags, "--log-dir", "/nowhere/at/all")
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


NATIVE = ["--preset", "atari", "--vectorization", "native"]


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the mistake was not noticed before anything started")

    monkeypatch.setattr("fabricrl.algos.run.launch", forbidden)
    monkeypatch.setattr(PPOArgs, "_check_log_dir", lambda self: None)


@pytest.mark.usefixtures("nothing_starts")
def test_what_single_games_have_alone_is_refused() -> None:
    pytest.importorskip("moviepy")
    message = complaint(*NATIVE, "--capture-video")
    assert message == "--capture-video is set: it needs --vectorization sync or async, not native"
    message = complaint(*NATIVE, "--env-kwargs", '{"mode": 1}')
    assert message.startswith("--env-kwargs has 'mode': games of --vectorization native take frameskip, full_")
    assert "--env-kwargs has 'difficulty'" in complaint(*NATIVE, "--env-kwargs", '{"difficulty": 0}')


@pytest.mark.usefixtures("nothing_starts")
def test_frames_that_are_drawn_and_an_old_emulator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--env-id", "ale_py:Pong-v4", "--vectorization", "native"]
    assert "draws how often an action is repeated; --action-repeat says it" in complaint(*flags)

    def old(self: Any, game: str, num_envs: int, num_threads: int = 0) -> None: ...

    monkeypatch.setattr("ale_py.vector_env.AtariVectorEnv.__init__", old)
    assert "Atari games take ale-py 0.11.1 or newer" in complaint(*NATIVE)


def test_a_game_in_wrappers_of_ones_own_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym.registry["ALE/Pong-v5"], "max_episode_steps", 100)
    args = PPOArgs(env_id="ALE/Pong-v5", vectorization="native")
    with pytest.raises(ConfigError, match=r"ALE/Pong-v5 has no native form, unlike .*CartPole-v1.* and Atari games"):
        check_env(args, (gym.spaces.Discrete,), None, images=True)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("flags", [[], ["--resize", 84], ["--action-repeat", 4]])
def test_envpool_needs_to_know_how_a_game_is_shrunk_and_repeated(flags: list[object]) -> None:
    pytest.importorskip("envpool")
    message = complaint("--env-id", "ALE/Pong-v5", "--vectorization", "envpool", *flags)
    for word in ("--vectorization envpool", "--resize", "--action-repeat", "--preset atari"):
        assert word in message


def test_off_policy_algorithms_have_no_native_form() -> None:
    assert "--vectorization" in complaint("--vectorization", "native", script=sac)


# --- auto


def chosen(**settings: Any) -> str:
    args = PPOArgs(**{"env_id": "ALE/Pong-v5", "num_envs": 2} | settings)
    plain = SimpleNamespace(**vars(args) | {"vectorization": "sync", "capture_video": False})
    with contextlib.closing(make_envs(plain, 0, Path())) as envs:
        return choose(args, envs.unwrapped.envs[0])


def test_auto_is_native_for_games_unless_something_is_done_to_them_that_only_gymnasium_can(tmp_path: Path) -> None:
    assert chosen(**ATARI) == "native"
    assert chosen(**ATARI | {"num_envs": 1}) == "native"
    assert chosen() == "native"
    assert chosen(**ATARI | {"env_kwargs": '{"difficulty": 0}'}) in ("sync", "async")
    assert chosen(**ATARI | {"capture_video": True}) in ("sync", "async")
