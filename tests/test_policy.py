"""A loaded policy acts as evaluate.py does, to the last bit, where neither the environment nor its package is."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Text, Tuple
from gymnasium.vector.utils import concatenate, create_empty_array

import fabricrl
from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.envs import construct, vector
from fabricrl.envs.structure import Unsupported, space_of, structure_of
from fabricrl.envs.wrappers import KeepPromises
from fabricrl.utils.checkpoint import save_checkpoint
from fabricrl.utils.errors import CheckpointError, ConfigError
from tests.envs import ODD_SPACES
from tests.image_envs import SPACES as IMAGE_SPACES
from tests.process import ROOT, Finished, call, load
from tests.test_old_checkpoints import DATA, SCRIPTS, checkpoint

ROLLOUTS = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 64]
REPLAY = ["--total-timesteps", 80, "--learning-starts", 20, "--batch-size", 4, "--hidden-sizes", 8]
ODD, PICTURES = ["--env-id", "tests.envs:Odd-v0"], ["--env-id", "tests.image_envs:Pictures-v0"]
DRIFT = ["--env-id", "tests.image_envs:Drift-v0"]


def odd(obs: str, action: str) -> list[Any]:
    return [*ODD, "--env-kwargs", f'{{"obs": "{obs}", "action": "{action}"}}']


# Name → script and arguments, for every algorithm and every kind of space and option that observations go through
CASES: dict[str, tuple[Any, list[Any]]] = {
    "text": (ppo, [*odd("dict_text", "multi_discrete_2d"), *ROLLOUTS, "--norm-obs"]),
    "tuple": (ppo, [*odd("tuple", "box_half_bounded"), *ROLLOUTS]),
    "discrete": (ppo, [*odd("discrete_start", "multi_binary_2d"), *ROLLOUTS]),
    "integers": (ppo, [*odd("box_int", "discrete_start"), *ROLLOUTS]),
    "keys": (ppo, [*odd("dict_sequence", "multi_discrete_start"), *ROLLOUTS, "--obs-keys", "speed"]),
    "images": (ppo, [*PICTURES, "--env-kwargs", '{"obs": "large_first"}', *ROLLOUTS, "--grayscale", "--resize", 40]),
    "frames": (ppo, ["--env-id", "tests.envs:PictureDict-v0", *ROLLOUTS, "--norm-obs", "--frame-stack", 3]),
    "masked": (ppo, ["--env-id", "CartPole-v1", *ROLLOUTS, "--mask-velocities"]),
    "memory": (ppo_recurrent, [*odd("dict_nested", "multi_discrete"), *ROLLOUTS, "--prev-action", "--prev-reward"]),
    "lstm": (ppo_recurrent, ["--env-id", "CartPole-v1", *ROLLOUTS, "--mask-velocities", "--norm-obs"]),
    "pixels": (ppo_recurrent, ["--env-id", "tests.envs:Picture-v0", *ROLLOUTS, "--frame-stack", 2]),
    "allowed": (ppo, ["--env-id", "tests.envs:Masked-v0", *ROLLOUTS]),
    "sac": (sac, [*odd("dict", "box_uneven"), *REPLAY, "--norm-obs"]),
    "critics": (sac, [*DRIFT, *REPLAY, "--norm-obs", "--frame-stack", 3, "--cnn-features", 8]),
    "grey": (droq, [*DRIFT, *REPLAY, "--replay-ratio", 1, "--obs-keys", "camera", "--grayscale", "--resize", 40]),
    "droq": (droq, [*odd("multi_discrete", "box_uneven"), *REPLAY, "--replay-ratio", 1]),
}
# What the fresh process does; PLAYED is the file of recordings
REPLAYING = '''
import importlib.abc, pickle, sys

import fabricrl
cheap = not {"torch", "numpy", "gymnasium", "lightning"} & sys.modules.keys()

class NotHere(importlib.abc.MetaPathFinder):
    """There is no package of environments."""
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tests", "ale_py"):
            raise ModuleNotFoundError(f"no {name} here", name=name)

sys.meta_path.insert(0, NotHere())
import numpy as np
import gymnasium as gym

def refuse(*_, **__):
    raise AssertionError("an environment is made")

gym.make = gym.make_vec = refuse

assert cheap, "import fabricrl brings what takes seconds"
steps = 0
for name, path, greedy, seed, record in pickle.load(open(sys.argv[1], "rb")):
    policy = fabricrl.load(path, deterministic=greedy, seed=seed)
    for obs, batch, rewards, dones, masks, actions in record:
        policy.reset(dones)
        single = len(obs) == 1
        mask = masks[0] if single and masks is not None else masks
        found = policy(obs[0], rewards[0], mask) if single else policy(batch, rewards, mask)
        expected = actions[0] if single else actions
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        assert found.tobytes() == expected.tobytes(), (name, found, expected)
        if single:
            assert policy.action_space.contains(found), (name, found)
        steps += 1
print("equal", steps)
'''


class Latest(gym.Wrapper):
    """Keeps what the environment within has given."""

    @property
    def space_of_latest(self) -> Space:
        return self.env.observation_space

    def reset(self, **options: Any) -> tuple:
        obs, info = self.env.reset(**options)
        self.latest = copy.deepcopy(obs)
        return obs, info

    def step(self, action: Any) -> tuple:
        answer = self.env.step(action)
        self.latest = copy.deepcopy(answer[0])
        return answer


class Noting(KeepPromises):
    """Keeps what the environment has given, before it is read."""

    def __init__(self, env: gym.Env, *settings: Any) -> None:
        super().__init__(env, *settings)
        self.env = Latest(self.env)


def recorded(path: Path, *flags: object, prepared: bool = False) -> list[list[tuple]]:
    """Each step of evaluate.py in each mode: (observations as given, as a batch, rewards, dones, masks, actions)."""
    records: list[list[tuple]] = []
    play, preprocessed = evaluate.play, vector._preprocessed

    def noting(envs: Any, act: Callable[..., Any], *settings: Any) -> Any:
        records.append([])

        def acting(obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray, masks: Any = None) -> Any:
            given = [copy.deepcopy(env.get_wrapper_attr("latest")) for env in envs.env.envs]
            space = envs.env.envs[0].get_wrapper_attr("space_of_latest")
            batch = concatenate(space, given, create_empty_array(space, len(given)))
            actions = act(obs, rewards, dones, *([] if masks is None else [masks]))
            step = given, batch, rewards.copy(), dones.copy(), copy.deepcopy(masks), copy.deepcopy(actions)
            records[-1].append(step)
            return actions

        return play(envs, acting, *settings)

    def preparing(args: Any, env: gym.Env) -> gym.Env:
        made = preprocessed(args, env)
        return Latest(made) if prepared else made

    with (
        mock.patch.object(evaluate, "play", noting),
        mock.patch.object(construct, "KeepPromises", Noting),
        mock.patch.object(vector, "_preprocessed", preparing),
    ):
        assert call(evaluate.main, path, "--json", "--seed", 77, *flags).code == 0
    assert len(records) == 2
    assert all(len(record) > 3 for record in records)
    return records


@pytest.fixture(scope="module", name="runs")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Short runs of CASES, by name, made when asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str) -> Finished:
        if name not in made:
            script, flags = CASES[name]
            made[name] = call(script.main, *flags, "--num-threads", 1, "--log-dir", folder / name)
        return made[name]

    return run


def test_a_policy_acts_as_evaluation_does_where_no_environment_is(
    runs: Callable[[str], Finished], tmp_path: Path
) -> None:
    """For every algorithm and kind of space, greedy and sampled, in one fresh process for all."""
    recordings = []
    for name in CASES:
        path = runs(name).checkpoint
        for num_envs in (1, 3):
            modes = recorded(path, "--episodes", 4, "--num-envs", num_envs)
            recordings += [(name, str(path), greedy, 77, r) for greedy, r in zip((True, False), modes, strict=True)]
    if pytest.importorskip("ale_py"):
        small = ["--num-envs", 1, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 16]
        short = ["--env-kwargs", '{"max_num_frames_per_episode": 60}']
        flags = ["--env-id", "ALE/Pong-v5", "--preset", "atari", *small, *short, "--log-dir", tmp_path]
        path = call(ppo.main, *flags).checkpoint
        modes = recorded(path, "--episodes", 2, "--num-envs", 1, prepared=True)
        recordings += [("atari", str(path), greedy, 77, r) for greedy, r in zip((True, False), modes, strict=True)]
    file = tmp_path / "recordings"
    file.write_bytes(pickle.dumps(recordings))
    ended = subprocess.run(
        [sys.executable, "-c", REPLAYING, str(file)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["equal", str(sum(len(record) for *_, record in recordings))]


# --- Spaces


EDGES: dict[str, Space] = {
    "float64": Box(np.array([-1 / 3, -np.inf]), np.array([np.pi, 1e300]), dtype=np.float64),
    "scalar": Box(-1.0, 1.0, (), np.float32),
    "int64": Box(-(2**62), 2**62, (2, 2), np.int64),
    "truth": Box(0, 1, (2,), np.bool_),
    "small": Discrete(7, start=-3, dtype=np.int32),
    "bits": MultiBinary(4),
    "bits_2d": MultiBinary((2, 3)),
    "counts": MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-5, 0]], dtype=np.int16),
    "order": Dict({"z": Discrete(2), "a": Discrete(3)}, sort_keys=False),
    "deep": Tuple((Dict({"x": Tuple((Discrete(2), Box(0, 255, (40, 40, 3), np.uint8)))}), MultiBinary(2))),
}


@pytest.mark.parametrize("space", [*ODD_SPACES.values(), *IMAGE_SPACES.values(), *EDGES.values()], ids=str)
def test_a_space_is_what_it_was_after_it_was_stored(space: Space, tmp_path: Path) -> None:
    torch.save(structure_of(space), tmp_path / "space")
    stored = torch.load(tmp_path / "space", weights_only=True)
    again = space_of(stored)
    if stored["type"] in ("Sequence", "Text") or any(part in str(space) for part in ("Sequence", "Text")):
        assert structure_of(again) == stored  # which is all that policies need to know of these
        return
    assert again == space
    assert str(again) == str(space)
    assert again.dtype == space.dtype
    if isinstance(space, Box):
        assert again.low.tobytes() == space.low.tobytes()
        assert again.high.tobytes() == space.high.tobytes()
    if isinstance(space, Dict):
        assert list(again.spaces) == list(space.spaces)
    again.seed(3)
    space.seed(3)
    assert str(again.sample()) == str(space.sample())


def test_text_and_what_is_no_observation_of_a_policy_are_placeholders() -> None:
    assert isinstance(space_of(structure_of(Text(8))), Text)
    assert isinstance(space_of(structure_of(ODD_SPACES["sequence"])), Unsupported)


# --- Episodes, batches, seeds


def test_memory_ends_with_the_episode_and_rows_of_a_batch_are_alone(runs: Callable[[str], Finished]) -> None:
    """Two observations one after the other, in a batch whose second row begins anew, and each alone."""
    path = runs("lstm").checkpoint
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 2, 4)).astype(np.float32)

    def state(policy: Any, row: int) -> np.ndarray:
        act = policy.act.__wrapped__
        return act.__closure__[act.__code__.co_freevars.index("states")].cell_contents[row].numpy()

    batch, alone, fresh = (fabricrl.load(path) for _ in range(3))
    batch(first)
    batch.reset([False, True])
    batch(second)
    alone(first[0])
    alone(second[0])
    fresh(first[1])
    fresh.reset()
    fresh(second[1])
    np.testing.assert_allclose(state(batch, 0), state(alone, 0), atol=1e-6)
    np.testing.assert_allclose(state(batch, 1), state(fresh, 0), atol=1e-6)
    unreset = fabricrl.load(path)
    unreset(first[1])
    unreset(second[1])
    assert np.abs(state(unreset, 0) - state(fresh, 0)).max() > 1e-3, "memory makes no difference"


def test_draws_follow_the_seed_and_go_on_over_episodes(runs: Callable[[str], Finished]) -> None:
    path = runs("tuple").checkpoint
    obs = (1, np.array([0.5, -0.5], np.float32))

    def drawn(seed: int, resets: bool = False) -> list[list[float]]:
        policy, actions = fabricrl.load(path, deterministic=False, seed=seed), []
        for _ in range(4):
            actions.append(policy(obs).tolist())
            if resets:
                policy.reset()
        return actions

    assert drawn(3) == drawn(3) == drawn(3, resets=True)
    assert drawn(3) != drawn(4)
    assert len({tuple(action) for action in drawn(3)}) == 4
    greedy = fabricrl.load(path)
    assert greedy(obs).tolist() == greedy(obs).tolist()


def test_lists_tensors_and_other_number_types_are_taken_as_by_training(runs: Callable[[str], Finished]) -> None:
    policy = fabricrl.load(runs("masked").checkpoint)
    numbers = [0.01, 0.02, -0.03, 0.04]
    action = policy(np.array(numbers, np.float32))
    assert policy(numbers) == policy(torch.tensor(numbers)) == policy(np.array(numbers)) == action
    assert policy(np.array([numbers] * 3, np.float32)[:1]).tolist() == [action]
    policy.reset()
    assert policy([numbers, numbers]).tolist() == [action] * 2


def test_a_policy_says_in_one_line_what_it_is(runs: Callable[[str], Finished]) -> None:
    policy = fabricrl.load(runs("allowed").checkpoint)
    spaces = f"{policy.observation_space} → {policy.action_space}"
    assert repr(policy) == f"Policy(ppo, tests.envs:Masked-v0, 64 steps: {spaces}, deterministic)"
    drawn = fabricrl.load(runs("lstm").checkpoint, deterministic=False)
    drawn.observation_space = Box(np.arange(0.0, 99.0), np.arange(1.0, 100.0))
    assert "\n" in str(drawn.observation_space), "NumPy breaks long arrays"
    assert repr(drawn).startswith("Policy(ppo_recurrent, CartPole-v1, 64 steps: Box([ 0. 1. 2. ")
    assert repr(drawn).endswith("→ Discrete(2), sampled)")
    assert "\n" not in repr(drawn)


def test_loading_leaves_the_generator_of_torch_alone(runs: Callable[[str], Finished]) -> None:
    torch.manual_seed(5)
    fabricrl.load(runs("masked").checkpoint)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert (torch.rand(3) == after).all()


def test_what_does_not_fit_is_refused_in_one_line(runs: Callable[[str], Finished]) -> None:
    policy = fabricrl.load(runs("masked").checkpoint)
    for obs, told in (
        (np.zeros(3, np.float32), r"shape \(3,\)"),
        (np.zeros((2, 3), np.float32), r"shape \(3,\)"),
        ("left", "not an array of numbers"),
        (np.array([np.nan, 0, 0, 0], np.float32), "not finite"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            policy(obs)
        assert len(str(caught.value).splitlines()) == 1
    policy(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"3 observations after 2: call reset\(\)"):
        policy(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="1 dones after 2"):
        policy.reset([True])
    policy.reset()
    policy(np.zeros((3, 4), np.float32))


def test_a_policy_that_is_told_rewards_asks_for_them(runs: Callable[[str], Finished]) -> None:
    policy = fabricrl.load(runs("memory").checkpoint)
    obs = {"inner": {"speed": np.zeros(2, np.float32)}}
    policy(obs)
    with pytest.raises(ValueError, match=r"--prev-reward: call policy\(obs, reward\)"):
        policy(obs)
    policy(obs, 1.0)
    with pytest.raises(ValueError, match="an observation of no parts; its space is Dict"):
        policy({}, 1.0)
    with pytest.raises(ValueError, match="a reward is not finite"):
        policy(obs, np.nan)
    policy.reset()
    policy(obs)


def test_masks_are_honoured_and_must_have_their_size(runs: Callable[[str], Finished]) -> None:
    policy = fabricrl.load(runs("allowed").checkpoint, deterministic=False)
    size = policy.mask_size
    assert size == policy.action_space.n > 1
    for allowed in range(size):
        mask = np.arange(size) == allowed
        assert {int(policy(mask.astype(np.float32), mask=mask)) for _ in range(20)} == {
            allowed + int(policy.action_space.start)
        }
    with pytest.raises(ValueError, match=rf"a mask of shape \(2,\) for 1 observations: actions have {size} choices"):
        policy(np.zeros(size, np.float32), mask=[True, False])
    with pytest.raises(ValueError, match="a mask that allows no action"):
        policy(np.zeros(size, np.float32), mask=[False] * size)


# --- Checkpoints


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_of_before_is_loaded_where_its_environment_can_be_had(name: str) -> None:
    policy = fabricrl.load(checkpoint(name, 192))
    (greedy, _) = recorded(checkpoint(name, 192), "--episodes", 2, "--num-envs", 2)
    for _, batch, rewards, dones, _, actions in greedy:
        policy.reset(dones)
        assert policy(batch, rewards).tobytes() == actions.tobytes()


def test_a_checkpoint_of_before_says_what_it_needs(tmp_path: Path) -> None:
    state = load(next(DATA.glob("ppo/step_*192.ckpt")))
    state["args"]["env_id"] = "no_such_package:Env-v0"
    with pytest.raises(ConfigError, match="earlier version and does not hold its spaces: --env-id no_such_package:Env"):
        fabricrl.load(save_checkpoint(tmp_path, 1, state, keep=1))


def test_spaces_that_make_no_sense_are_refused(runs: Callable[[str], Finished], tmp_path: Path) -> None:
    state = load(runs("masked").checkpoint)
    for number, wrong in enumerate(({"type": "Box"}, {}, {"type": "Nothing"}, {"type": "Discrete", "n": -1})):
        broken = state | {"spaces": state["spaces"] | {"obs": wrong}}
        with pytest.raises(CheckpointError) as caught:
            fabricrl.load(save_checkpoint(tmp_path, number + 1, broken, keep=9))
        assert len(str(caught.value).splitlines()) == 1
