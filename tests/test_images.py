"""Images from the environment to the networks: packed, stored once, stacked, encoded, and nothing lost on the way."""

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Dict, Discrete, flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FrameStackObservation, GrayscaleObservation, ResizeObservation
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fabricrl import evaluate
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo.ppo import main, returns_and_advantages, rollout
from fabricrl.algos.ppo.utils import ACTION_SPACES, make_agent, make_policy
from fabricrl.data import Batch, FrameStack, RolloutBuffer, StackedFrames
from fabricrl.envs import check_env, make_env, make_envs
from fabricrl.envs.wrappers import ActionRepeat, PackImages
from fabricrl.models.models import NatureCNN, RecordEncoder, make_normalizer, normalized
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError
from fabricrl.utils.metric import EpisodeStatistics
from fabricrl.utils.records import Records, floats_of
from tests.conftest import SINGLE, BareRun, Trained
from tests.image_envs import SPACES, CountingImages, Pictures
from tests.process import call
from tests.test_arguments import flags

PICTURES, COUNTING = "tests.image_envs:Pictures-v0", "tests.image_envs:CountingImages-v0"
HAS_CV2 = importlib.util.find_spec("cv2") is not None
needs_cv2 = pytest.mark.skipif(not HAS_CV2, reason="OpenCV is not here")


def pictures(obs: str = "last", **settings: Any) -> dict[str, Any]:
    """Arguments of PPO for Pictures, of which `kwargs` go to its constructor."""
    kwargs = settings.pop("kwargs", {})
    return {"env_id": PICTURES, "env_kwargs": json.dumps({"obs": obs} | kwargs), "vectorization": "sync"} | settings


def args_for(obs: str = "last", **settings: Any) -> PPOArgs:
    return PPOArgs(**pictures(obs, **settings))


def image_of(env: gym.Env, record: np.ndarray, key: str = "image") -> np.ndarray:
    """The image in a record as the network gets it, [C, H, W]."""
    space = env.observation_space
    assert isinstance(space, Records)
    return space.images[key].of(torch.from_numpy(record)).numpy()


def side_by_side(first: gym.Env, second: gym.Env, steps: int, seed: int = 3) -> Iterator[tuple[Any, Any]]:
    """Results of both on the same seed and actions, resets included."""
    actions = np.random.default_rng(seed)
    yield first.reset(seed=seed)[0], second.reset(seed=seed)[0]
    for _ in range(steps):
        action = int(actions.integers(first.action_space.n))
        ours, theirs = first.step(action), second.step(action)
        assert ours[1:4] == theirs[1:4]  # reward, terminated, truncated
        yield ours[0], theirs[0]
        if ours[2] or ours[3]:
            yield first.reset()[0], second.reset()[0]


# --- Preprocessing


@needs_cv2
@pytest.mark.parametrize("size", [36, 47, 84, 120])
@pytest.mark.parametrize("obs", ["large", "large_grey", "small", "two"])
def test_resized_images_are_those_of_gymnasium(obs: str, size: int) -> None:
    env = make_env(args_for(obs, resize=size))
    theirs = ResizeObservation(Pictures(obs), (size, size))
    assert env.observation_space.images["image"].sizes[1:] == (size, size)
    for record, expected in side_by_side(env, theirs, 7):
        expected = expected if expected.ndim == 3 else expected[..., None]
        np.testing.assert_array_equal(image_of(env, record), expected.transpose(2, 0, 1))


@needs_cv2
def test_channels_first_are_resized_as_channels_last_are() -> None:
    for grayscale in (False, True):
        settings: dict[str, Any] = {"resize": 36, "grayscale": grayscale}
        first, last = make_env(args_for("large_first", **settings)), make_env(args_for("large", **settings))
        pixels = np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8)
        ours = image_of(first, first.observation(pixels.transpose(2, 0, 1)))
        np.testing.assert_array_equal(ours, image_of(last, last.observation(pixels)))
        assert ours.shape == (1 if grayscale else 3, 36, 36)


@needs_cv2
@pytest.mark.parametrize("obs", ["last", "first"])
def test_images_without_colour_weigh_red_green_and_blue_as_itu_r_601_does(obs: str) -> None:
    env, raw = make_env(args_for(obs, grayscale=True)), Pictures(obs)
    for record, pixels in side_by_side(env, raw, 5):
        red, green, blue = (pixels if obs == "first" else pixels.transpose(2, 0, 1)).astype(float)
        expected = 0.299 * red + 0.587 * green + 0.114 * blue
        ours = image_of(env, record)
        assert ours.shape == (1, 36, 40)
        assert np.abs(ours[0] - expected).max() <= 0.5 + 1e-2  # OpenCV rounds, in fixed-point arithmetic


@needs_cv2
def test_images_without_colour_are_those_of_gymnasium_but_for_its_weights() -> None:
    # Gymnasium weighs by 0.2125, 0.7154, 0.0721 (ITU-R 709) and rounds down: equal to one level where there is no
    # colour, and elsewhere no further off than the weights are: 255 (0.7154 - 0.587) levels, and 1 of rounding
    env = make_env(args_for("last", grayscale=True))
    ours, theirs = [], []
    for record, expected in side_by_side(env, GrayscaleObservation(Pictures("last")), 5):
        ours.append(image_of(env, record)[0])
        theirs.append(expected)
    assert np.abs(np.stack(ours).astype(int) - np.stack(theirs)).max() <= 255 * (0.7154 - 0.587) + 1
    grey = np.random.default_rng(0).integers(0, 256, (36, 40, 1), dtype=np.uint8).repeat(3, -1)
    theirs = GrayscaleObservation(Pictures("last")).observation(grey)
    assert np.abs(image_of(env, env.observation(grey))[0].astype(int) - theirs).max() <= 1


@needs_cv2
@pytest.mark.parametrize("obs", ["grey", "grey_first", "grey_last", "two"])
def test_images_that_have_no_three_colours_are_left_as_they_are(obs: str) -> None:
    plain, env = make_env(args_for(obs)), make_env(args_for(obs, grayscale=True))
    for record, expected in side_by_side(env, plain, 3):
        np.testing.assert_array_equal(image_of(env, record), image_of(plain, expected))


@needs_cv2
def test_all_images_of_a_dict_are_preprocessed_and_its_numbers_are_not() -> None:
    import cv2

    env, raw = make_env(args_for("dict", grayscale=True, resize=48)), Pictures("dict")
    assert {key: place.sizes for key, place in env.observation_space.images.items()} == {
        "camera": (1, 48, 48),
        "depth": (1, 48, 48),
    }
    for record, obs in side_by_side(env, raw, 3):
        depth = cv2.resize(obs["depth"], (48, 48), interpolation=cv2.INTER_AREA)
        camera = cv2.resize(cv2.cvtColor(obs["camera"], cv2.COLOR_RGB2GRAY), (48, 48), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(image_of(env, record, "depth")[0], depth)
        np.testing.assert_array_equal(image_of(env, record, "camera")[0], camera)
        np.testing.assert_array_equal(floats_of(torch.from_numpy(record), 6)[3:], obs["speed"])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_a_repeated_action_earns_the_sum_and_an_episode_ends_within_it(count: int) -> None:
    env, raw = ActionRepeat(CountingImages(length=5, ending="truncated"), count), CountingImages(length=5)
    env.reset(seed=1)
    raw.reset(seed=1)
    steps = 0
    for _ in range(math.ceil(5 / count)):
        obs, reward, terminated, truncated, _ = env.step(2)
        rewards = range(steps + 1, min(steps + count, 5) + 1)  # an episode of five steps, the n-th of which earns n
        steps = rewards[-1]
        assert reward == sum(rewards)
        assert (obs[0, 0, 0], truncated, terminated) == (steps, steps == 5, False)
    assert steps == 5


def test_make_env_repeats_actions_if_asked() -> None:
    env = make_env(PPOArgs(env_id=COUNTING, env_kwargs='{"length": 8}', action_repeat=3))
    env.reset(seed=0)
    assert env.step(1)[1] == 1 + 2 + 3
    assert env.step(1)[1] == 4 + 5 + 6
    obs, reward, *_ = env.step(1)
    assert reward == 7 + 8
    assert set(image_of(env, obs)[0].flat) == {8}


@needs_cv2
def test_the_atari_preset_sees_the_bytes_of_gymnasiums_preprocessing() -> None:
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    args = PPOArgs(**PRESETS["atari"], vectorization="sync")
    env = make_env(args)
    theirs = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    theirs = gym.wrappers.AtariPreprocessing(theirs, noop_max=30, frame_skip=4, screen_size=84)
    different = 0
    for count, (record, expected) in enumerate(side_by_side(env, theirs, 250)):
        assert expected.shape == (84, 84)
        assert record.tobytes() == expected.tobytes(), count
        different += len(np.unique(expected)) > 2
    assert different > 200  # not blank screens
    env.close()
    theirs.close()


def test_lives_that_a_game_counts_are_reported_when_they_are_lost() -> None:
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    settings = {"env_id": "ALE/Breakout-v5", "action_repeat": 4, "resize": 36, "grayscale": True, "life_loss": True}
    env = make_env(PPOArgs(**settings))
    rng, lost = np.random.default_rng(0), 0
    lives = env.reset(seed=0)[1]["lives"]
    for _ in range(400):
        *_, terminated, truncated, info = env.step(int(rng.integers(4)))
        assert info["life_lost"] == (info["lives"] < lives)
        lost, lives = lost + info["life_lost"], info["lives"]
        if terminated or truncated:
            lives = env.reset()[1]["lives"]
    assert lost >= 3
    env.close()


# --- Records


@pytest.mark.parametrize("obs", [name for name in SPACES if not name.startswith(("small", "nested", "vectors"))])
def test_views_of_a_record_give_back_what_was_packed(obs: str) -> None:
    env, raw = make_env(args_for(obs)), Pictures(obs)
    space = env.observation_space
    assert isinstance(space, Records)
    records, parts = [], []
    for record, expected in side_by_side(env, raw, 7):
        assert space.contains(record)
        records.append(torch.from_numpy(record))
        parts.append(expected if isinstance(expected, dict) else {"image": expected})
    batch = torch.stack(records)[:, None]  # [B, 1, R]: views work behind any number of dimensions
    storage = batch.untyped_storage().data_ptr()
    for key, place in space.images.items():
        expected = np.stack([part[key] for part in parts])
        if expected.ndim == 3:
            expected = expected[:, None]  # no channels: one
        elif expected.shape[-1] <= 3:
            expected = expected.transpose(0, 3, 1, 2)
        assert place.sizes == expected.shape[1:]
        np.testing.assert_array_equal(place.of(batch)[:, 0], expected)
        view = place.of(batch)
        assert (view.untyped_storage().data_ptr(), view.storage_offset()) == (storage, place.start)
    spaces = raw.observation_space.spaces if isinstance(raw.observation_space, Dict) else {}
    vectors = {key: part for key, part in spaces.items() if key not in space.images}
    expected = [np.concatenate([flatten(s, p[k]) for k, s in vectors.items()] or [[]]) for p in parts]
    numbers = floats_of(batch, space.num_floats)
    np.testing.assert_array_equal(numbers[:, 0], np.stack(expected).astype(np.float32))
    assert numbers.untyped_storage().data_ptr() == storage


def test_discrete_parts_are_one_hot_whatever_their_start() -> None:
    env = make_env(args_for("dict"))
    space = SPACES["dict"]
    for gear, expected in ((-1, [1, 0, 0]), (0, [0, 1, 0]), (1, [0, 0, 1])):
        speed = np.array([1.5, -2.5, 1e-30], np.float32)
        record = env.observation(space.sample() | {"gear": np.int64(gear), "speed": speed})
        assert floats_of(torch.from_numpy(record), 6).tolist() == [*expected, *speed.tolist()]


def test_records_are_padded_with_zeros_to_whole_float32_and_no_further() -> None:
    for obs, used in (("grey_odd", 1443), ("dict", 24 + 4320 + 1443), ("last", 4320), ("more_vectors", 48 + 4329)):
        env = make_env(args_for(obs))
        (size,) = env.observation_space.shape
        assert 0 <= size - used < 4
        assert size % 4 == 0
        for _ in range(3):  # memory that NumPy hands out again holds what was there
            np.full(size, 255, np.uint8)
            record = env.reset(seed=0)[0]
            assert not record[used:].any()


def test_records_next_to_each_other_share_nothing() -> None:
    env = make_env(args_for("dict"))
    first = env.reset(seed=0)[0]
    kept = first.copy()
    second = env.step(0)[0]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, kept)


def test_spaces_of_records_are_equal_if_the_same_lies_at_the_same_places() -> None:
    assert Records({"a": 2}, {"b": (36, 40, 3)}) == Records({"a": 2}, {"b": (36, 40, 3)})
    assert Records({"a": 2}, {"b": (36, 40, 3)}) != Records({"a": 2}, {"b": (40, 36, 3)})  # of the same size
    assert Records({"a": 2}, {"b": (36, 40, 3)}) != Records({"c": 2}, {"b": (36, 40, 3)})
    assert Records({}, {"b": (36, 40, 3)}) != gym.spaces.Box(0, 255, (36 * 40 * 3,), np.uint8)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_vector_environments_hand_records_through(vectorization: str, tmp_path: Path) -> None:
    envs = make_envs(args_for("dict", vectorization=vectorization, num_envs=2), 0, tmp_path)
    singles = [make_env(args_for("dict")) for _ in range(2)]
    try:
        expected = [env.reset(seed=seed)[0] for seed, env in enumerate(singles)]
        np.testing.assert_array_equal(envs.reset(seed=[0, 1])[0], expected)
        for _ in range(6):  # an episode ends in the fifth step
            obs, _, terminated, _, infos = envs.step(np.zeros(2, np.int64))
            steps = [env.step(0) for env in singles]
            if terminated.any():
                assert all(np.array_equal(infos["final_obs"][i], step[0]) for i, step in enumerate(steps))
                steps = [env.reset() for env in singles]
            np.testing.assert_array_equal(obs, [step[0] for step in steps])
        assert isinstance(envs.single_observation_space, Records)
    finally:
        envs.close()


# --- Frame stacks


class Onlooker:
    """Stands for an agent in `rollout`: it notes what it is shown, and its actions follow a plan."""

    def __init__(self, seed: int = 0) -> None:
        self.seen: list[Tensor] = []
        self.actions: list[np.ndarray] = []
        self.rng = np.random.default_rng(seed)
        self.head = SimpleNamespace(noise=lambda shape, rng: torch.zeros(shape), num_actions=1, dtype=torch.int64)

    def parameters(self) -> Iterator[Tensor]:
        return iter([torch.zeros(1)])

    def act(self, obs: Tensor, noise: Tensor, masks: None = None) -> Tensor:
        self.seen.append(obs.clone())
        self.actions.append(self.rng.integers(0, 3, (len(obs), 1)))
        return torch.from_numpy(self.actions[-1])


class Reference:
    """One counting environment under Gymnasium's own frame stack: what should be seen at each step and at its end."""

    def __init__(self, seed: int, depth: int, **kwargs: Any) -> None:
        self.env = FrameStackObservation(CountingImages(**kwargs), depth, padding_type="reset")
        self.now = self.env.reset(seed=seed)[0]  # [S, H, W, C]

    def step(self, action: int) -> tuple[bool, bool, np.ndarray]:
        final, _, terminated, truncated, _ = self.env.step(action)
        self.now = self.env.reset()[0] if terminated or truncated else final
        return terminated, truncated, final


def as_stacks(space: Any, seen: Tensor) -> np.ndarray:
    """Records [..., S, R], or [..., R] → images [..., S, H, W, C]."""
    return space.images["image"].of(seen).movedim(-3, -1).numpy()


def stack_args(depth: int, num_envs: int, num_steps: int, **kwargs: Any) -> PPOArgs:
    return PPOArgs(
        env_id=COUNTING,
        env_kwargs=json.dumps(kwargs),
        frame_stack=depth,
        num_envs=num_envs,
        num_steps=num_steps,
        num_minibatches=1,
        vectorization="sync",
    )


KINDS: dict[str, dict[str, Any]] = {
    "terminated": {"length": 4, "ending": "terminated"},
    "truncated": {"length": 4, "ending": "truncated"},
    "both": {"length": 3, "ending": "both"},
    "one step": {"length": 1, "ending": "truncated"},
    "longer than rollouts": {"length": 17, "ending": "truncated"},
    **{f"random {longest}": {"longest": longest} for longest in (2, 5, 9, 14)},
}


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stacks_equal_those_of_gymnasium_wherever_episodes_end(tmp_path: Path, kind: str, depth: int) -> None:
    steps, num = 7, 3
    for seed in (0, 10, 20) if kind.startswith("random") else (0,):
        args = stack_args(depth, num, steps, **KINDS[kind])
        envs = make_envs(args, 0, tmp_path)
        run = BareRun(args, action_space=envs.single_action_space)
        space, player = envs.single_observation_space, Onlooker(seed)
        rb = RolloutBuffer(steps, num, space, 1, torch.int64, depth)
        references = [Reference(seed + i, depth, **KINDS[kind]) for i in range(num)]
        rb.start(envs.reset(seed=[seed + i for i in range(num)])[0])
        for _ in range(4):
            player.seen.clear()
            player.actions.clear()
            rollout(run, player, envs, rb)
            expected, limits = np.empty((steps, num, depth, 36, 38, 4), np.uint8), []
            for t in range(steps):
                for i, reference in enumerate(references):
                    expected[t, i] = reference.now
                    terminated, truncated, final = reference.step(player.actions[t][i, 0])
                    assert (rb.terminated[t, i], rb.truncated[t, i]) == (terminated, truncated)
                    if truncated and not terminated:
                        limits.append((t, i, final))
            after = np.stack([reference.now for reference in references])
            np.testing.assert_array_equal(as_stacks(space, torch.stack(player.seen)), expected)
            inputs, next_inputs = rb.inputs(lambda obs: obs, torch.device("cpu"))
            assert isinstance(inputs, StackedFrames)
            assert len(inputs) == steps * num
            rows = torch.randperm(steps * num)
            minibatches = np.concatenate([as_stacks(space, inputs[part]) for part in rows.split(5)])
            flat = expected.reshape(-1, *expected.shape[2:])
            np.testing.assert_array_equal(minibatches, flat[rows])
            some = rows[:6]
            np.testing.assert_array_equal(as_stacks(space, inputs.rows(some)[torch.arange(6)]), flat[some])
            np.testing.assert_array_equal(as_stacks(space, next_inputs), after)
            np.testing.assert_array_equal(as_stacks(space, rb.stacked_obs(steps)), after)
            assert rb.has_truncated == bool(limits)
            for (t, i, final), *ours in zip(limits, *(rb.truncated_episodes() if limits else ()), strict=True):
                assert (ours[0], ours[1]) == (t, i)
                np.testing.assert_array_equal(as_stacks(space, ours[2]), final)
            rb.start()
        envs.close()


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied into tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].nbytes
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("depth", [1, 3])
def test_each_frame_goes_once_to_where_the_policy_acts_and_learns(depth: int) -> None:
    """There stacks are made, and the update learns. The device is the CPU by another name, which counts as another."""
    there, steps, num, size = torch.device("cpu:0"), 5, 2, 64
    space = Records({}, {"image": (8, 8)})
    assert there != torch.device("cpu")
    rb, rng = RolloutBuffer(steps, num, space, 1, torch.int64, depth), np.random.default_rng(0)
    rb.start(rng.integers(0, 255, (num, size), np.uint8))
    for _ in range(3):
        with Copied() as copied, torch.inference_mode():
            for t in range(steps):
                shown = rb.stacked_obs(t, there)
                assert torch.equal(shown, rb.stacked_obs(t))
                assert shown.shape == ((num, depth, size) if depth > 1 else (num, size))
                obs, done = rng.integers(0, 255, (num, size), np.uint8), rng.random(num) < 0.3
                rb.add(t, np.zeros((num, 1)), obs, np.zeros(num), done, ~done & done, {})
            assert copied.count <= rb.frames[: steps + depth - 1].nbytes + steps * rb.stacks[0].nbytes
        inputs, expected = (rb.inputs(lambda obs: obs, device) for device in (there, torch.device("cpu")))
        index = torch.randperm(steps * num)
        assert torch.equal(inputs[0][index], expected[0][index])
        assert torch.equal(inputs[1], expected[1])
        assert not inputs[0][index].is_inference()
        rb.start()


@pytest.mark.parametrize("seed", [0, 40])
def test_stacks_span_no_row_that_only_resets(seed: int) -> None:
    # Gymnasium's next-step mode, told as NativeVectorEnv tells it: the row after an end is skipped
    steps, num, depth = 6, 3, 3
    args = stack_args(depth, num, steps)
    envs = SyncVectorEnv([lambda: make_env(args)] * num, autoreset_mode=AutoresetMode.NEXT_STEP)
    space, rng = envs.single_observation_space, np.random.default_rng(seed)
    rb = RolloutBuffer(steps, num, space, 1, torch.int64, depth)
    references = [Reference(seed + i, depth) for i in range(num)]
    rb.start(envs.reset(seed=[seed + i for i in range(num)])[0])
    ended, skips, ends = np.zeros(num, bool), 0, 0
    for _ in range(5):
        expected: dict[tuple[int, int], np.ndarray] = {}
        finals = []
        for t in range(steps):
            actions = rng.integers(0, 3, num)
            obs, rewards, terminated, truncated, infos = envs.step(actions)
            infos = infos | {"final_obs": obs} | ({"skipped": ended} if ended.any() else {})
            for i in np.flatnonzero(~ended):
                expected[t, int(i)] = references[i].now
                *_, final = references[i].step(int(actions[i]))
                if truncated[i] and not terminated[i]:
                    finals.append(final)
            rb.add(t, actions[:, None], obs, rewards, terminated, truncated, infos)
            skips, ended = skips + ended.sum(), terminated | truncated
            ends += ended.sum()
        assert {(t, i) for t in range(steps) for i in range(num) if not rb.skipped[t, i]} == expected.keys()
        inputs, next_inputs = rb.inputs(lambda obs: obs, torch.device("cpu"))
        for (t, i), stack in expected.items():
            np.testing.assert_array_equal(as_stacks(space, rb.stacked_obs(t)[i]), stack)
            np.testing.assert_array_equal(as_stacks(space, inputs[torch.tensor(t * num + i)]), stack)
        for i in np.flatnonzero(~ended):
            np.testing.assert_array_equal(as_stacks(space, next_inputs[i]), references[i].now)
        limits = as_stacks(space, rb.truncated_episodes()[2]) if rb.has_truncated else []
        assert [final.tolist() for final in limits] == [final.tolist() for final in finals]
        assert rb.dones[rb.skipped].all()
        rb.start()
        assert not rb.skipped.any()
    assert min(skips, ends) > 10
    envs.close()


def test_frames_are_stored_once_and_nothing_else_is_large() -> None:
    steps, num, depth = 16, 3, 4
    space = Records({}, {"image": (36, 36, 1)})
    rb = RolloutBuffer(steps, num, space, 1, torch.int64, depth)
    size = space.shape[0]
    assert rb.frames.untyped_storage().nbytes() == (depth + steps) * num * size
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in vars(rb).values()
        if isinstance(value, Tensor)
    }
    assert sum(storages.values()) - (depth + steps) * num * size < 100 * (steps + 1) * num
    rb.start(np.zeros((num, size), np.uint8))
    inputs, _ = rb.inputs(lambda obs: obs, torch.device("cpu"))
    assert inputs.frames.data_ptr() == rb.frames.data_ptr()  # learned from where they are
    assert inputs.rows(torch.arange(5)).frames is inputs.frames


def test_a_stack_of_one_is_the_observation_itself() -> None:
    space = Records({}, {"image": (36, 36, 1)})
    rb = RolloutBuffer(4, 2, space, 1, torch.int64)
    assert rb.frames.shape == (5, 2, 1296)
    rb.start(np.full((2, 1296), 7, np.uint8))
    assert rb.stacked_obs(0).shape == (2, 1296)
    assert rb.stacked_obs(0).data_ptr() == rb.frames.data_ptr()
    inputs, next_inputs = rb.inputs(lambda obs: obs, torch.device("cpu"))
    assert (inputs.shape, next_inputs.shape) == ((8, 1296), (2, 1296))


@pytest.mark.parametrize("depth", [1, 4])
def test_evaluation_sees_the_stacks_that_training_saw(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num = 3
    args = stack_args(depth, num, 8, longest=6)
    envs = SyncVectorEnv([lambda: make_env(args)] * num, autoreset_mode=AutoresetMode.SAME_STEP)
    space, onlooker = envs.single_observation_space, Onlooker()
    agent = make_agent(args, envs)
    monkeypatch.setattr(agent, "greedy", lambda obs, masks: onlooker.act(obs, torch.empty(0)))
    policy = make_policy(agent, envs, greedy=True, seed=0)
    evaluate.play(envs, policy, 12, seed=5)
    references = [Reference(5 + i, depth, longest=6) for i in range(num)]
    assert len(onlooker.seen) > 10
    for seen, actions in zip(onlooker.seen, onlooker.actions, strict=True):
        images = as_stacks(space, seen)
        for i, reference in enumerate(references):
            np.testing.assert_array_equal(images[i] if depth > 1 else images[i][None], reference.now)
            reference.step(int(actions[i, 0]))
    envs.close()


def test_frames_of_evaluation_are_not_changed_by_what_comes_later() -> None:
    frames = FrameStack(SimpleNamespace(frame_stack=2, obs_dtype=torch.uint8))
    shown = np.array([[1], [2]], np.uint8)
    first = frames.add(shown, np.array([True, True]))
    shown[:] = [[3], [4]]  # environments may write into the array that they returned
    second = frames.add(shown, np.array([False, True]))
    assert first.tolist() == [[[1], [1]], [[2], [2]]]
    assert second.tolist() == [[[1], [3]], [[4], [4]]]


# --- Networks


def convolutions(cnn: NatureCNN) -> list[torch.nn.Conv2d]:
    return [module for module in cnn.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize("sides", [(36, 36), (36, 51), (84, 84), (61, 44)])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_the_cnn_is_that_of_nature_on_bytes_divided_by_255(channels: int, sides: tuple[int, int]) -> None:
    cnn = NatureCNN(channels, sides, features=17)
    convs = convolutions(cnn)
    images = torch.randint(0, 256, (5, channels, *sides), dtype=torch.uint8)
    for conv in convs:
        torch.nn.init.normal_(conv.bias, std=0.1)  # a bias of zero would hide where it is scaled too
    x = images.float() / 255
    for conv, stride in zip(convs, (4, 2, 1), strict=True):
        x = functional.relu(functional.conv2d(x, conv.weight, conv.bias, stride))
    expected = functional.relu(functional.linear(x.flatten(1), cnn.out.weight, cnn.out.bias))
    output = cnn(images)
    assert output.shape == (5, 17)
    assert (output > 0).any()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    shapes = [tuple(conv.weight.shape) for conv in convs]
    assert shapes == [(32, channels, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]


def test_the_gradient_of_the_cnn_is_that_of_the_plain_one() -> None:
    cnn = NatureCNN(2, (36, 40), features=9)
    images = torch.randint(0, 256, (6, 2, 36, 40), dtype=torch.uint8)
    targets = torch.randn(6, 9)
    (cnn(images) * targets).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in cnn.named_parameters()}
    cnn.zero_grad()
    x = images.float() / 255
    for conv in convolutions(cnn):
        x = functional.relu(conv(x))
    (functional.relu(cnn.out(x.flatten(1))) * targets).sum().backward()
    for name, parameter in cnn.named_parameters():
        assert ours[name].abs().sum() > 0, name
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_cnn_does_not_care_how_images_lie_in_memory() -> None:
    cnn = NatureCNN(3, (36, 40), features=9)
    images = torch.randint(0, 256, (4, 36, 40, 3), dtype=torch.uint8).movedim(-1, 1)
    torch.testing.assert_close(cnn(images), cnn(images.contiguous()))


class Convolutions(TorchDispatchMode):
    """Notes of each convolution inside if what it takes, and what it returns, has its channels last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.convolution:
            given, returned = (x.is_contiguous(memory_format=torch.channels_last) for x in (args[0], result))
            self.channels_last.append((given, returned))
        return result


@pytest.mark.parametrize("stored", ["first", "last"])
def test_convolutions_have_their_channels_last_however_images_are_stored(stored: str) -> None:
    cnn, images = NatureCNN(3, (52, 60), features=9), torch.zeros(4, 3, 52, 60, dtype=torch.uint8)
    if stored == "last":
        images = images.to(memory_format=torch.channels_last)
    with Convolutions() as convolutions:
        cnn(images)
    assert convolutions.channels_last == [(True, True)] * 3


def sample_records(space: Records, count: int, depth: int = 1) -> Tensor:
    """Random records [B, R], or [B, S, R]; what numbers they hold is small."""
    shape = (count, depth, *space.shape) if depth > 1 else (count, *space.shape)
    records = torch.randint(0, 256, shape, dtype=torch.uint8)
    floats_of(records, space.num_floats).normal_()
    return records


@pytest.mark.parametrize("depth", [1, 3])
def test_each_part_of_a_record_has_an_encoder_and_features_of_its_own(depth: int) -> None:
    space = make_env(args_for("dict")).observation_space
    encoder = RecordEncoder(space, depth, cnn_features=10)
    records = sample_records(space, 4, depth)
    before = encoder(records)
    assert before.shape == (4, encoder.num_features) == (4, 10 + 10 + 64 + 64)
    newest = records if depth == 1 else records[:, -1]
    changes = {
        "camera": (slice(0, 10), space.images["camera"].of(newest)),
        "depth": (slice(10, 20), space.images["depth"].of(newest)),
        "gear": (slice(20, 84), floats_of(newest, 6)[..., :3]),
        "speed": (slice(84, 148), floats_of(newest, 6)[..., 3:]),
    }
    for key, (own, part) in changes.items():
        kept = part.clone()
        part.copy_(part.flip(0))  # those of another row
        after = encoder(records)
        part.copy_(kept)
        others = torch.ones(148, dtype=torch.bool)
        others[own] = False
        assert not torch.allclose(after[:, own], before[:, own]), key
        torch.testing.assert_close(after[:, others], before[:, others])


def test_images_are_seen_in_all_frames_and_numbers_in_the_newest_alone() -> None:
    space, depth = make_env(args_for("dict")).observation_space, 3
    encoder = RecordEncoder(space, depth, cnn_features=10)
    for cnn in encoder.cnns:
        torch.nn.init.normal_(cnn.out.bias)  # so that of ten features some are not zero
    records = sample_records(space, 4, depth)
    before = encoder(records)
    for frame in range(depth):
        changed = records.clone()
        floats_of(changed[:, frame], 6).add_(0.5)
        same = torch.equal(encoder(changed), before)
        assert same == (frame < depth - 1)
        changed = records.clone()
        changed[:, frame, 24:] = 255 - changed[:, frame, 24:]
        after = encoder(changed)
        assert not torch.allclose(after[:, :10], before[:, :10])
        assert not torch.allclose(after[:, 10:20], before[:, 10:20])
        torch.testing.assert_close(after[:, 20:], before[:, 20:])


def test_the_encoder_is_its_parts_side_by_side() -> None:
    space, depth = make_env(args_for("more_vectors")).observation_space, 2
    encoder = RecordEncoder(space, depth, cnn_features=10)
    records = sample_records(space, 5, depth)
    eye = space.images["eye"].of(records)  # [B, S, C, H, W]
    numbers = floats_of(records[:, -1], 12)
    parts = [encoder.cnns[0](torch.cat((eye[:, 0], eye[:, 1]), 1))]  # oldest first
    for layer, (start, end) in zip(encoder.layers, ((0, 4), (4, 7), (7, 12)), strict=True):
        parts.append(torch.tanh(functional.linear(numbers[:, start:end], layer.weight, layer.bias)))
    torch.testing.assert_close(encoder(records), torch.cat(parts, 1))
    several = encoder(records.view(5, 1, depth, -1).repeat(1, 2, 1, 1))  # [B, 2, S, R]: any number of dimensions
    torch.testing.assert_close(several[:, 1], torch.cat(parts, 1))


@pytest.mark.parametrize("obs", ["last", "dict"])
def test_the_gradient_of_a_loss_reaches_every_parameter(obs: str) -> None:
    space = make_env(args_for(obs)).observation_space
    agent = PPOAgent(space, Discrete(3), hidden_sizes=(16,), frame_stack=2, cnn_features=16)
    records = sample_records(space, 8, 2)
    logprobs, entropy, values = agent(Batch(obs=records, actions=torch.randint(0, 3, (8, 1))))
    (logprobs.square().sum() + entropy.sum() + values.square().sum()).backward()
    for name, parameter in agent.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# --- Normalisation and numbers that are not finite


def test_normalisation_changes_the_numbers_of_records_and_no_byte_of_images() -> None:
    space = make_env(args_for("dict")).observation_space
    normalizer = make_normalizer(space)
    records = sample_records(space, 50)
    floats_of(records, 6).mul_(torch.arange(1.0, 7.0)).add_(3.0)
    kept, numbers = records.clone(), floats_of(records, 6).double()
    normalizer.update(floats_of(records, 6))
    after = normalized(normalizer, records)
    assert torch.equal(records, kept)  # what is stored stays as it is
    assert torch.equal(after[:, 24:], records[:, 24:])
    expected = (numbers - numbers.mean(0)) / (numbers.var(0, correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(floats_of(after, 6).double(), expected, rtol=1e-4, atol=1e-5)
    vectors = torch.randn(4, 6)
    torch.testing.assert_close(normalized(normalizer, vectors), normalizer(vectors))


def test_normalisation_of_images_alone_is_refused() -> None:
    space = make_env(args_for("last")).observation_space
    with pytest.raises(ConfigError, match=r"--norm-obs .* all observations are images"):
        PPOAgent(space, Discrete(3), norm_obs=True)


def played(args: PPOArgs, tmp_path: Path, steps: int = 8) -> tuple[RolloutBuffer, PPOAgent]:
    """A rollout of the agent that the arguments describe."""
    envs = make_envs(args, 0, tmp_path)
    agent = make_agent(args, envs)
    rb = RolloutBuffer(steps, args.num_envs, envs.single_observation_space, 1, torch.int64, args.frame_stack)
    try:
        rb.start(envs.reset(seed=list(range(args.num_envs)))[0])
        rollout(BareRun(args, action_space=envs.single_action_space), agent, envs, rb)
    finally:
        envs.close()
    return rb, agent


@pytest.mark.parametrize("depth", [1, 2])
def test_a_number_beside_images_that_is_not_finite_ends_the_rollout(tmp_path: Path, depth: int) -> None:
    kwargs = {"fault": "nan", "at_step": 5, "only_seed": 1}
    args = args_for("dict", kwargs=kwargs, num_envs=2, frame_stack=depth, cnn_features=8)
    with pytest.raises(NonFiniteError, match="observation of environment 1 is not finite after step 5"):
        played(args, tmp_path)


def test_a_number_beside_images_that_is_not_finite_is_found_at_a_time_limit_and_at_the_start() -> None:
    space = make_env(args_for("dict")).observation_space
    good, bad = sample_records(space, 1).numpy(), sample_records(space, 1).numpy()
    bad[0, :24].view(np.float32)[4] = np.nan
    quiet = {"actions": np.zeros((1, 1)), "rewards": np.zeros(1), "terminated": np.zeros(1, bool)}
    rb = RolloutBuffer(2, 1, space, 1, torch.int64)
    rb.start(good)
    rb.add(0, **quiet, next_obs=good, truncated=np.ones(1, bool), infos={"final_obs": good})
    rb.add(1, **quiet, next_obs=good, truncated=np.zeros(1, bool), infos={})
    assert rb.find_nonfinite() is None
    rb.add(0, **quiet, next_obs=good, truncated=np.ones(1, bool), infos={"final_obs": bad})
    assert rb.find_nonfinite() == "final observation of environment 0 is not finite after step 0 of the rollout"
    rb.start(bad)
    assert rb.find_nonfinite() == "first observation is not finite"


def test_bytes_of_images_are_never_taken_for_numbers() -> None:
    space = Records({"speed": 1}, {"image": (36, 36, 1)})
    rb = RolloutBuffer(2, 1, space, 1, torch.int64)
    record = np.full((1, *space.shape), 255, np.uint8)  # as float32, each four of these bytes are NaN
    record[0, :4] = 0
    rb.start(record)
    for t in range(2):
        ends = {"terminated": np.zeros(1, bool), "truncated": np.ones(1, bool), "infos": {"final_obs": record}}
        rb.add(t, np.zeros((1, 1)), record, np.zeros(1), **ends)
    assert rb.find_nonfinite() is None
    only = RolloutBuffer(2, 1, Records({}, {"image": (36, 36, 1)}), 1, torch.int64)
    only.start(np.full((1, 1296), 255, np.uint8))
    assert only.find_nonfinite() is None
    only.rewards[1] = np.nan
    assert only.find_nonfinite() == "reward of environment 0 is not finite after step 1 of the rollout"


# --- Arguments

TINY: dict[str, Any] = {
    **pictures("dict"),
    "num_envs": 2,
    "num_steps": 8,
    "total_timesteps": 48,
    "num_minibatches": 2,
    "update_epochs": 1,
    "hidden_sizes": (8,),
    "cnn_features": 8,
    "learning_rate": 0.01,
    "logger": "csv",
}
PONG = {
    "env_id": "ALE/Pong-v5",
    "env_kwargs": "{}",
    "action_repeat": 4,
    "noop_max": 3,
    "grayscale": True,
    "resize": 36,
}
# Field -> another value than TINY's, and what else has to be set for it to matter
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "obs_keys": (("camera", "speed"), {}),
    "action_repeat": (2, {}),
    "noop_max": (30, PONG),
    "life_loss": (True, {"env_id": "tests.image_envs:Lives-v0", "env_kwargs": "{}"}),
    "grayscale": (True, {}),
    "resize": (38, {}),
    "frame_stack": (3, {}),
    "clip_reward": (True, {}),
    "cnn_features": (9, {}),
    "norm_obs": (True, {}),
}


def returns_in(trained: Trained) -> list[tuple[str, str]]:
    """Every return and length that was logged."""
    header, *lines = (line.split(",") for line in (trained.folder / "metrics.csv").read_text().splitlines())
    columns = [header.index(f"charts/episodic_{name}") for name in ("return", "length")]
    return [(line[columns[0]], line[columns[1]]) for line in lines]


@pytest.mark.parametrize("name", CHANGES)
def test_turning_it_changes_the_parameters_that_are_learned(name: str, ppo: Callable[..., Trained]) -> None:
    value, extra = CHANGES[name]
    if extra is PONG:
        pytest.importorskip("ale_py")
    if name in ("grayscale", "resize") or extra is PONG:
        pytest.importorskip("cv2")
    before, after = ppo(*flags(TINY | extra)), ppo(*flags(TINY | extra | {name: value}))
    assert before.code == after.code == 0
    assert after.weights.isfinite().all()
    assert before.weights.shape != after.weights.shape or not torch.equal(before.weights, after.weights)
    stored = after.args[name]
    assert (tuple(stored) if isinstance(stored, list) else stored) == value
    if name == "clip_reward":
        assert returns_in(before) == returns_in(after)
        assert {float(value) for value, _ in returns_in(after) if value} == {3.0 - 2 + 3 - 2 + 3}


def test_rewards_are_learned_by_their_sign_and_counted_as_they_are(tmp_path: Path) -> None:
    settings = {"num_envs": 2, "num_steps": 8, "cnn_features": 8, "gamma": 0.5, "gae_lambda": 1.0}
    args = args_for("last", kwargs={"length": 4}, clip_reward=True, **settings)
    rb, agent = played(args, tmp_path)
    kept = rb.rewards.clone()
    data = returns_and_advantages(BareRun(args), agent, agent, rb)
    # Rewards 3, -2, 3, -2 of an episode are 1, -1, 1, -1; with λ = 1 a return is their discounted sum
    expected = torch.tensor([1 - 0.5 + 0.25 - 0.125, -1 + 0.5 - 0.25, 1 - 0.5, -1]).repeat(2)
    torch.testing.assert_close(data.returns.view(8, 2), expected[:, None].expand(8, 2))
    assert torch.equal(rb.rewards, kept)
    assert kept[:4, 0].tolist() == [3, -2, 3, -2]


def test_a_lost_life_ends_what_is_learned_and_neither_episode_nor_stack(tmp_path: Path) -> None:
    args = PPOArgs(env_id="tests.image_envs:Lives-v0", num_envs=1, life_loss=True, frame_stack=2, cnn_features=8)
    rb, _ = played(args, tmp_path, steps=12)
    assert rb.terminated[:, 0].nonzero().flatten().tolist() == [2, 5, 8, 11]  # every third step costs a life
    assert rb.ends[:, 0].nonzero().flatten().tolist() == [8]  # and the third life is the last
    assert torch.equal(rb.dones, rb.terminated)
    episodes = EpisodeStatistics(1)
    episodes.update(SINGLE, rb.rewards, rb.ends, rb.skipped)
    assert list(episodes.returns) == [5 * 3 - 4 * 2]
    assert episodes.compute()["charts/episodic_length"] == 9
    oldest = rb.stacks[:, 0, 0].tolist()  # which frame is seen beside the newest, that in row t + 1
    assert oldest == [1, 1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 11, 12]  # the first of an episode, twice: at 0 and 9
    without = PPOArgs(env_id=args.env_id, num_envs=1, frame_stack=2, cnn_features=8)
    rb, _ = played(without, tmp_path, steps=12)
    assert rb.terminated[:, 0].nonzero().flatten().tolist() == [8]


def test_a_time_limit_beside_a_lost_life_is_bootstrapped(tmp_path: Path) -> None:
    for limit, bootstrapped in ((4, [3, 7]), (5, [4, 9])):
        kwargs = json.dumps({"truncate_after": limit})
        args = PPOArgs(env_id="tests.image_envs:Lives-v0", env_kwargs=kwargs, num_envs=1, life_loss=True)
        rb, _ = played(args, tmp_path, steps=10)
        t, _, _ = rb.truncated_episodes()
        assert t.tolist() == bootstrapped
        assert rb.ends[:, 0].nonzero().flatten().tolist() == bootstrapped
        lost = [t for t in range(10) if t % limit == 2]  # the third step of an episode
        assert rb.terminated[:, 0].nonzero().flatten().tolist() == lost


@pytest.mark.parametrize("obs", ["last", "dict"])
def test_a_checkpoint_of_images_is_evaluated(obs: str, ppo: Callable[..., Trained]) -> None:
    trained = ppo(*flags(TINY | pictures(obs) | {"frame_stack": 2}))
    played = call(evaluate.main, trained.checkpoint, "--json", "--episodes", 2)
    assert played.code == 0
    assert json.loads(played.out)["greedy"]["return_mean"] == 3 - 2 + 3 - 2 + 3


def test_a_run_on_images_goes_on_from_a_checkpoint(ppo: Callable[..., Trained]) -> None:
    trained = ppo(*flags(TINY | {"frame_stack": 2}))
    resumed = ppo("--resume", trained.checkpoint, "--total-timesteps", 80)
    assert resumed.code == 0
    assert resumed.args["frame_stack"] == 2
    assert resumed.state["global_step"] == 80
    assert not torch.equal(resumed.weights, trained.weights)
    assert ppo("--resume", trained.checkpoint, "--frame-stack", 2, "--total-timesteps", 120).code == 0
    for frames in (1, 3):
        with pytest.raises(ConfigError, match=f"--frame-stack is {frames}: it must be 2, as in the checkpoint"):
            ppo("--resume", trained.checkpoint, "--frame-stack", frames)


# --- Errors


def complaint(args: Any, images: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        check_env(args, ACTION_SPACES, None, images=images)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("obs", "size"), [("small", "20 × 24"), ("small_first", "20 × 44")])
def test_an_image_that_is_too_small_is_refused_with_its_size_and_what_helps(obs: str, size: str) -> None:
    message = complaint(args_for(obs))
    assert size in message
    assert "36 × 36" in message
    assert "--resize 84" in message
    if HAS_CV2:
        check_env(args_for(obs, resize=84), ACTION_SPACES, None, images=True)


def test_an_image_in_a_nested_dict_is_seen_as_one() -> None:
    with contextlib.closing(make_env(args_for("nested"))) as env:
        assert list(env.observation_space.images) == ["inner.camera"]
        record, _ = env.reset(seed=1)
        raw = Pictures("nested")
        pixels = raw.reset(seed=1)[0]["inner"]["camera"]
        np.testing.assert_array_equal(image_of(env, record, "inner.camera"), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("obs", "named"), [("last", "it is an image"), ("dict", "'camera' is an image")])
def test_an_algorithm_without_networks_for_images_refuses_them(obs: str, named: str) -> None:
    assert named in complaint(args_for(obs), images=False)


def test_sac_takes_the_vectors_beside_an_image() -> None:
    args = SimpleNamespace(env_id=PICTURES, env_kwargs='{"obs": "dict"}', obs_keys=("speed",), vectorization="sync")
    space = check_env(args, ACTION_SPACES, None).obs
    assert (space.shape, space.dtype) == ((3,), np.float32)


def test_keys_that_are_not_there_are_refused_with_those_that_are() -> None:
    message = complaint(args_for("dict", obs_keys=("speed", "lidar")))
    assert "--obs-keys is speed lidar" in message
    assert "camera, depth, gear, speed" in message
    assert "Dict" in complaint(args_for("last", obs_keys=("camera",)))


@pytest.mark.parametrize(
    ("flag", "value"), [("--frame-stack", 4), ("--grayscale", True), ("--resize", 84)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("obs", ["vectors_only", "dict"])
def test_options_for_images_are_refused_without_images(obs: str, flag: str, value: Any) -> None:
    settings = {flag[2:].replace("-", "_"): value, "obs_keys": ("speed",)}
    message = complaint(args_for(obs, **settings))
    assert flag in message
    assert "no images" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"life_loss": True}, "--life-loss is set"),
        ({"noop_max": 3}, "--noop-max is 3"),
    ],
    ids=["life_loss", "noop_max"],
)
def test_options_for_atari_games_are_refused_elsewhere(settings: dict[str, Any], words: str) -> None:
    message = complaint(args_for("last", **settings))
    assert words in message
    assert "Atari" in message


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"resize": 35}, "at least 36"), ({"frame_stack": 0}, "at least 1"), ({"action_repeat": 0}, "at least 1"),
     ({"noop_max": -1}, "0 or more"), ({"cnn_features": 0}, "at least 1")],
    ids=lambda value: str(value),
)  # fmt: skip
def test_values_that_are_not_allowed_are_refused(settings: dict[str, Any], allowed: str) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}: .*{allowed}"):
        PPOArgs(**settings)


WRONG = {
    ("last", "shape"): "(35, 40, 3)",
    ("last", "transposed"): "(40, 36, 3)",  # as many bytes
    ("last", "fraction"): "not an integer",
    ("last", "brighter"): "256, which is out of range",
    ("dict", "shape"): "camera",
    ("dict", "fraction"): "not an integer",
}


@pytest.mark.parametrize("resize", [None, pytest.param(48, marks=needs_cv2)])
@pytest.mark.parametrize(("obs", "fault"), WRONG)
def test_an_image_that_is_not_as_its_space_says_ends_the_run_by_name(
    obs: str, fault: str, resize: int | None, tmp_path: Path
) -> None:
    kwargs = {"fault": fault, "at_step": 2, "only_seed": 1}
    envs = make_envs(args_for(obs, kwargs=kwargs, num_envs=2, resize=resize), 0, tmp_path)
    envs.reset(seed=[0, 1])
    for _ in range(2):
        envs.step(np.zeros(2, np.int64))
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(EnvError, match=r"environment 1 .*step") as caught:
        envs.step(np.zeros(2, np.int64))
    assert WRONG[obs, fault] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    envs.close()


def test_a_vector_beside_images_that_is_not_as_its_space_says_ends_the_run_by_name(tmp_path: Path) -> None:
    kwargs = {"fault": "vector", "at_step": 0, "only_seed": 1}
    envs = make_envs(args_for("dict", kwargs=kwargs, num_envs=2), 0, tmp_path)
    envs.reset(seed=[0, 1])
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(EnvError, match=r"environment 1 .*step"):
        envs.step(np.zeros(2, np.int64))
    envs.close()


@pytest.mark.filterwarnings("ignore:.*ERROR")
def test_a_wrong_image_in_a_process_of_its_own_is_reported_as_well(tmp_path: Path) -> None:
    kwargs = {"fault": "shape", "only_seed": 1}
    envs: VectorEnv = make_envs(args_for(kwargs=kwargs, num_envs=2, vectorization="async"), 0, tmp_path)
    envs.reset(seed=[0, 1])
    with pytest.raises(EnvError, match=r"environment 1 .*\(35, 40, 3\)"):
        envs.step(np.zeros(2, np.int64))
    envs.close()


def test_a_missing_opencv_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cv2" else find_spec(name))
    for settings in ({"grayscale": True}, {"resize": 48}):
        message = complaint(args_for("last", **settings))
        assert f"--{next(iter(settings))}" in message
        assert "pip install -e '.[images]'" in message
        with pytest.raises(ConfigError) as caught:
            call(main, *flags(pictures() | settings))
        assert caught.value.exit_code == 2
    check_env(args_for("last"), ACTION_SPACES, None, images=True)  # without them it is not needed
    assert isinstance(make_env(args_for("last", frame_stack=4)), PackImages)


def test_an_atari_game_without_opencv_or_emulator_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ale_py")
    find_spec = importlib.util.find_spec
    for missing in ("cv2", "ale_py"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else find_spec(name))  # noqa: B023
        assert "pip install -e '.[atari]'" in complaint(PPOArgs(**PRESETS["atari"]))
