"""The example of an environment of one's own: what it promises, its registrations, and the commands in its README."""

import itertools
import re
import shlex
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit

from examples.warehouse import LIMIT, ShapeReward, Slip, Warehouse
from examples.warehouse.env import CELLS, GATE, MOVES
from fabricrl import evaluate
from fabricrl.algos.args import StandardArgs
from fabricrl.algos.command_line import parse
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.envs import make_env
from tests.pixel_envs import Catch
from tests.process import FORKED, ROOT, call, load, run

README = ROOT / "examples/warehouse/README.md"
IDS = ("Warehouse-v0", "ShapedWarehouse-v0", "OilyWarehouse-v0")
ARGS: dict[str, type[StandardArgs]] = {
    "fabricrl/algos/ppo/ppo.py": PPOArgs,
    "fabricrl/algos/ppo_recurrent/ppo_recurrent.py": RecurrentPPOArgs,
}


def commands(script: str = "") -> list[list[str]]:
    """The words after `python` of each command in the README that starts this script, or any."""
    lines = re.findall(r"^python (.*)$", README.read_text(), re.MULTILINE)
    return [words for words in map(shlex.split, lines) if words[0].startswith(script)]


def parsed(words: list[str]) -> Any:
    with mock.patch.object(sys, "argv", words):
        return parse(ARGS[words[0]], Path(words[0]).stem, PRESETS)


def solve(env: gym.Env) -> Iterator[int]:
    """Moves that end an episode by the shortest way, found by trying all ways."""
    base = env.unwrapped
    for goal in (base.parcel, GATE):
        ways = deque([(base.robot, ())])
        seen = {base.robot}
        while ways[0][0] != goal:
            (row, column), way = ways.popleft()
            for action, (down, right) in enumerate(MOVES):
                cell = (row + down, column + right)
                if cell not in seen and 0 <= min(cell) <= max(cell) < CELLS:
                    seen.add(cell)
                    ways.append((cell, (*way, action)))
        yield from ways[0][1]


# --- The environment


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_finds_nothing_to_complain_about(env_id: str) -> None:
    env = gym.make(f"examples.warehouse:{env_id}", render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(env)
        check_env(env.unwrapped)


@pytest.mark.parametrize("seed", range(20))
def test_the_shortest_way_earns_one_and_takes_as_many_moves_as_the_distance_says(seed: int) -> None:
    env = gym.make("examples.warehouse:Warehouse-v0")
    env.reset(seed=seed)
    distance = env.unwrapped.distance
    outcomes = [env.step(action)[1:] for action in solve(env)]
    assert len(outcomes) == distance
    assert [reward for reward, *_ in outcomes] == [0.0] * (distance - 1) + [1.0]
    assert [terminated for _, terminated, *_ in outcomes] == [False] * (distance - 1) + [True]
    assert not any(truncated for *_, truncated, _ in outcomes)


def test_an_empty_battery_terminates_and_the_limit_of_the_registration_truncates() -> None:
    for battery, terminated, truncated in ((7, True, False), (10**6, False, True)):
        env = gym.make("examples.warehouse:Warehouse-v0", battery=battery)
        env.reset(seed=3)
        env.unwrapped.robot, env.unwrapped.parcel = (0, 0), (3, 3)
        for moves in itertools.count(1):
            obs, reward, *ends, _ = env.step(0)  # against the wall
            assert obs["status"] == pytest.approx([0.0, 1.0 - moves / battery])
            if any(ends):
                break
        assert (moves, reward, ends) == (min(battery, LIMIT), 0.0, [terminated, truncated])


def test_the_camera_shows_parcel_gate_and_robot() -> None:
    env = Warehouse()
    env.reset(seed=0)
    env.robot, env.parcel = (1, 2), (1, 3)
    colors = {"robot": (255, 255, 255), "parcel": (255, 160, 0), "gate": (0, 120, 255)}

    def shown(obs: dict[str, np.ndarray]) -> dict[str, tuple[int, int, int]]:
        """First row, first column and number of the pixels of each color."""
        places = {name: np.argwhere((obs["camera"] == color).all(-1)) for name, color in colors.items()}
        return {name: (*map(int, pixels.min(0)), len(pixels)) for name, pixels in places.items()}

    assert shown(env.step(3)[0]) == {"robot": (8, 8, 64), "parcel": (8, 24, 64), "gate": (32, 16, 64)}
    env.step(1)
    assert shown(env.step(1)[0]) == {"robot": (8, 24, 48), "parcel": (10, 26, 16), "gate": (32, 16, 64)}


# --- Wrappers and registrations


@pytest.mark.parametrize("seed", range(10))
def test_shaped_rewards_add_up_to_the_way_that_is_left_no_matter_how_it_was_gone(seed: int) -> None:
    env = ShapeReward(Warehouse(battery=25), scale=0.125)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    first, total, terminated = env.unwrapped.distance, 0.0, False
    while not terminated:
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        total += reward
    assert total == info["delivered"] + 0.125 * (first - env.unwrapped.distance)


def test_each_id_has_the_wrappers_that_it_promises() -> None:
    def wrappers(env: gym.Env) -> list[type]:
        return [] if env is env.unwrapped else [type(env), *wrappers(env.env)]

    found = {env_id: wrappers(gym.make(f"examples.warehouse:{env_id}")) for env_id in IDS}
    optional = (TimeLimit, ShapeReward, Slip)
    kept = {env_id: [kind for kind in kinds if kind in optional] for env_id, kinds in found.items()}
    assert kept == {
        "Warehouse-v0": [TimeLimit],
        "ShapedWarehouse-v0": [ShapeReward, TimeLimit],
        "OilyWarehouse-v0": [TimeLimit, ShapeReward, Slip],
    }
    env = gym.make("examples.warehouse:OilyWarehouse-v0", slip=0.75, battery=12)
    assert (env.get_wrapper_attr("probability"), env.unwrapped.battery) == (0.75, 12)


def test_slipping_is_as_frequent_as_said_and_repeats_with_the_seed() -> None:
    def moves(probability: float) -> list[int]:
        env = Slip(Warehouse(), probability)
        env.reset(seed=5)
        return [int(env.action(2)) for _ in range(4000)]

    assert moves(0.0) == [2] * 4000
    assert moves(0.4) == moves(0.4)
    others = np.mean(np.array(moves(0.4)) != 2)
    assert abs(others - 0.4 * 3 / 4) < 5 * np.sqrt(0.3 * 0.7 / 4000)  # one of four directions is the one that was meant


# --- The README


def test_the_commands_of_the_readme_parse_and_name_environments_that_can_be_made() -> None:
    trained = [parsed(words) for script in ARGS for words in commands(script)]
    assert {args.env_id for args in trained} == {f"examples.warehouse:{env_id}" for env_id in IDS}
    assert len(trained) + len(commands("fabricrl/evaluate.py")) == len(commands())
    for args in trained:
        with make_env(args) as env:
            env.reset(seed=0)


def test_the_first_command_trains_in_small_and_those_after_it_play_what_it_made(tmp_path: Path) -> None:
    small = ["--num-envs", 2, "--num-steps", 16, "--total-timesteps", 64, "--log-dir", tmp_path]
    finished = run(*FORKED, *commands()[0], *small)
    assert finished.code == 0, finished.report()
    checkpoint = Path(finished.result["checkpoint"])
    assert load(checkpoint)["args"]["env_id"] == "examples.warehouse:ShapedWarehouse-v0"
    folder = checkpoint.parent.parent
    played = commands("fabricrl/evaluate.py")
    assert played
    for words in played:
        flags = [str(folder) if word == "<run>" else word for word in words[1:]]
        assert str(folder) in flags
        if "--episodes" not in flags:
            flags += ["--episodes", "2"]
        assert call(evaluate.main, *flags).code == 0
    assert len(list(folder.rglob("*.mp4"))) == 3


# --- The image tasks of the benchmarks, which do what their docstring says


def test_an_image_task_and_its_masked_form_pass_the_check_of_gymnasium() -> None:
    for env_id in ("Catch-v0", "MaskedCatch-v0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gym.make(f"tests.pixel_envs:{env_id}", render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("masked", [False, True])
def test_moving_to_the_column_of_the_ball_always_catches_it(masked: bool) -> None:
    env = Catch(masked)
    starts = set()
    for seed in range(300):
        first, _ = env.reset(seed=seed)
        starts.add((env.column, env.paddle))
        assert np.flatnonzero(first[0]).tolist() == list(range(4 * env.column, 4 * env.column + 4))
        column, rewards, terminated = env.column, [], False
        while not terminated:
            obs, reward, terminated, truncated, _ = env.step(1 + np.sign(column - env.paddle))
            rewards.append(reward)
            assert not truncated
            assert obs.sum() / 255 == (16 if masked or terminated else 32)  # ball and paddle, which meet at the end
        assert rewards == [0.0] * 7 + [1.0]
    assert len(starts) == 27


def test_images_after_the_first_of_the_masked_task_do_not_depend_on_the_ball() -> None:
    env = Catch(masked=True)
    actions = np.random.default_rng(0).integers(3, size=(50, 8))
    for ways in actions:
        seen, caught = [], 0
        for column in range(9):
            env.reset(seed=1)
            env.column, env.paddle = column, 4
            outcomes = [env.step((column + ways[0]) % 3 if i == 0 else action) for i, action in enumerate(ways)]
            seen.append(np.stack([obs for obs, *_ in outcomes]))
            caught += outcomes[-1][1] == 1.0
        assert all((images == seen[0]).all() for images in seen)
        assert caught == 1  # of nine balls, whatever was done
