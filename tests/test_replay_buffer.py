"""The replay buffer against plain lists of all that happened, over random episodes and turns of the ring."""

import errno
import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from fabricrl.algos.sac.agent import make_agent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.sac import rollout
from fabricrl.data import memory
from fabricrl.data.memory import GIB, available_memory, check_memory
from fabricrl.data.replay import ReplayBuffer
from fabricrl.data.transitions import record_type
from fabricrl.envs import make_envs
from fabricrl.utils.batch import Batch
from fabricrl.utils.errors import CheckpointError, ConfigError, NonFiniteError
from tests.conftest import BareRun
from tests.envs import Counting, Fault

VECTOR, IMAGE = Box(-np.inf, np.inf, (3,), np.float32), Box(0, 255, (2, 2), np.uint8)
NUM_ACTIONS, GAMMA = 2, 0.9


class World:
    """N environments that end at random, and for each of them a list of all transitions that ever happened.

    No two observations are equal, so each tells which it is. The arrays that it hands out are overwritten by the next
    step, as those of vector environments are.
    """

    def __init__(self, num_envs: int, space: Box = VECTOR, ends: float = 0.15, seed: int = 0) -> None:
        self.num_envs, self.space, self.ends = num_envs, space, ends
        self.rng, self.count = np.random.default_rng(seed), 0
        self.history: list[list[SimpleNamespace]] = [[] for _ in range(num_envs)]
        self.where: dict[bytes, tuple[int, int]] = {}  # observation → environment and its transition's number
        self.obs = np.zeros((num_envs, *space.shape), space.dtype)
        self.finals: list[np.ndarray] = []

    def draw(self) -> np.ndarray:
        self.count += 1
        if self.space.dtype == np.uint8:
            return np.frombuffer(self.count.to_bytes(4, "little"), np.uint8).reshape(self.space.shape)
        return np.array([self.count, *self.rng.normal(size=2)], np.float32)

    def reset(self) -> np.ndarray:
        """First observations; transitions before do not lead to those after."""
        for env, steps in enumerate(self.history):
            if steps:
                steps[-1].cut = True
            self.obs[env] = self.draw()
        return self.obs

    def step(self) -> tuple:
        """Arguments of `ReplayBuffer.add`."""
        for final in self.finals:
            final[...] = 77
        before, infos = self.obs.copy(), {"final_obs": np.full(self.num_envs, None, dtype=object)}
        actions = self.rng.uniform(-1, 1, (self.num_envs, NUM_ACTIONS)).astype(np.float32)
        rewards = self.rng.normal(size=self.num_envs)
        terminated, truncated = self.rng.random((2, self.num_envs)) < self.ends  # both now and then
        self.finals = []
        for env, steps in enumerate(self.history):
            next_obs = self.draw()
            step = SimpleNamespace(obs=before[env], action=actions[env].copy(), reward=rewards[env], cut=False)
            step.terminated, step.truncated = bool(terminated[env]), bool(truncated[env])
            step.next_obs = next_obs.copy()
            self.where[step.obs.tobytes()] = env, len(steps)
            steps.append(step)
            if step.terminated or step.truncated:
                self.finals.append(next_obs.copy())
                infos["final_obs"][env] = self.finals[-1]
                next_obs = self.draw()
            self.obs[env] = next_obs
        return actions, self.obs, rewards, terminated, truncated, infos

    def expected(self, env: int, t: int, n: int) -> tuple[float, float, np.ndarray, bool]:
        """Σ γ^k r_k, γ^m, what was seen after the last of these m ≤ n steps, and whether it was terminal."""
        steps, total, m = self.history[env], 0.0, 0
        while True:
            step = steps[t + m]
            total += GAMMA**m * step.reward
            m += 1
            if m == n or step.terminated or step.truncated or step.cut or t + m == len(steps):
                return total, GAMMA**m, step.next_obs, step.terminated

    def stored(self, capacity: int) -> set[tuple[int, int]]:
        """The transitions that a ring of so many for each environment holds."""
        return {(env, t) for env, steps in enumerate(self.history) for t in range(len(steps))[-capacity:]}

    def check(self, batch: Batch, capacity: int, n: int) -> set[tuple[int, int]]:
        """Every row is a transition that happened and is not too old, in all its fields. Returns which there are."""
        rows = {name: column.flatten(0, 1).numpy() for name, column in batch.columns.items()}
        found = [self.where[obs.tobytes()] for obs in rows["obs"]]
        assert all(t >= len(self.history[env]) - capacity for env, t in found)
        rewards, discounts, next_obs, terminated = zip(*(self.expected(env, t, n) for env, t in found), strict=True)
        np.testing.assert_array_equal(rows["actions"], [self.history[env][t].action for env, t in found])
        np.testing.assert_array_equal(rows["next_obs"], next_obs)
        np.testing.assert_array_equal(rows["terminated"], terminated)
        np.testing.assert_allclose(rows["rewards"], rewards, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["discounts"], discounts, rtol=1e-6)
        return set(found)


def make(num_envs: int = 2, capacity: int = 13, space: Box = VECTOR, **more: Any) -> ReplayBuffer:
    return ReplayBuffer(capacity, num_envs, space, NUM_ACTIONS, GAMMA, **more)


def play(rb: ReplayBuffer, world: World, steps: int) -> None:
    for _ in range(steps):
        rb.add(*world.step())


def filled(steps: int, num_envs: int = 2, space: Box = VECTOR, **more: Any) -> tuple[ReplayBuffer, World]:
    rb, world = make(num_envs, space=space, **more), World(num_envs, space)
    rb.start(world.reset())
    play(rb, world, steps)
    return rb, world


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(ours: Batch, theirs: Batch) -> bool:
    names = ours.columns.keys()
    return names == theirs.columns.keys() and all(torch.equal(ours.columns[n], theirs.columns[n]) for n in names)


def stored(rb: ReplayBuffer) -> dict[str, Any]:
    """The state as a checkpoint holds it: a copy."""
    file = io.BytesIO()
    torch.save(rb.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


implicitly = pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])


@implicitly
@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("capacity", "num_envs", "space", "ends"),
    [
        (20, 3, VECTOR, 0.15),  # 6 rows: not a whole number of them
        (13, 1, VECTOR, 0.1),
        (13, 2, IMAGE, 0.2),
        (16, 4, VECTOR, 0.0),  # nothing ever ends
        (9, 2, VECTOR, 1.0),  # every step is an end
        (5, 3, IMAGE, 0.3),  # a single row
    ],
    ids=["vectors", "one-env", "images", "endless", "one-step", "one-row"],
)
def test_every_sample_happened_and_whatever_is_stored_is_sampled(
    capacity: int, num_envs: int, space: Box, ends: float, n_step: int, implicit: bool
) -> None:
    rb = ReplayBuffer(capacity, num_envs, space, NUM_ACTIONS, GAMMA, n_step, implicit)
    world, rows, generator = World(num_envs, space, ends, seed=n_step), capacity // num_envs, rng()
    assert rb.capacity == rows
    rb.start(world.reset())
    for step in range(1, 60):
        play(rb, world, 1)
        assert rb.size == min(step, rows)
        assert rb.newest_obs().tolist() == world.obs.tolist()
        world.check(rb.sample(2, 5, generator), rows, n_step)
        if step % 3 == 0:  # each of M is missed by 40 M draws with a probability of e^-40
            everything = world.stored(rows)
            assert world.check(rb.sample(10, 4 * len(everything), generator), rows, n_step) == everything
        if step in (4, 17, 18, 40):  # as after a resume, where no episode has ended
            rb.start(world.reset())
            world.check(rb.sample(2, 5 * num_envs * rows, generator), rows, n_step)


def test_a_transition_and_its_returns_by_hand() -> None:
    rb = ReplayBuffer(4, 1, Box(-1, 99, (1,), np.float32), 1, 0.5, n_step=3)
    rb.start(np.array([[10.0]]))
    no, yes, nothing = np.array([False]), np.array([True]), {}
    finals = np.empty(1, dtype=object)
    finals[0] = np.array([12.0])
    rb.add(np.array([[0.1]]), np.array([[11.0]]), np.array([1.0]), no, no, nothing)
    rb.add(np.array([[0.2]]), np.array([[20.0]]), np.array([2.0]), no, yes, {"final_obs": finals})  # a time limit
    rb.add(np.array([[0.3]]), np.array([[21.0]]), np.array([4.0]), no, no, nothing)
    finals[0] = np.array([22.0])
    rb.add(np.array([[0.4]]), np.array([[30.0]]), np.array([8.0]), yes, no, {"final_obs": finals})
    batch = {name: column.squeeze(0) for name, column in rb.sample(1, 64, rng()).columns.items()}
    columns = ("obs", "actions", "rewards", "discounts", "next_obs", "terminated")
    rows = {tuple(round(batch[name][i].item(), 3) for name in columns) for i in range(64)}
    assert rows == {
        (10.0, 0.1, 1 + 0.5 * 2, 0.25, 12.0, 0.0),
        (11.0, 0.2, 2.0, 0.5, 12.0, 0.0),
        (20.0, 0.3, 4 + 0.5 * 8, 0.25, 22.0, 1.0),
        (21.0, 0.4, 8.0, 0.5, 22.0, 1.0),
    }


@implicitly
def test_batches_have_their_shapes_and_types(implicit: bool) -> None:
    for space, dtype in ((VECTOR, torch.float32), (IMAGE, torch.uint8), (Box(-1, 1, (3,), np.float64), torch.float32)):
        rb, _ = filled(20, space=space, implicit_next=implicit)
        batch = rb.sample(4, 7, rng())
        assert {name: tuple(column.shape) for name, column in batch.columns.items()} == {
            "obs": (4, 7, *space.shape),
            "next_obs": (4, 7, *space.shape),
            "actions": (4, 7, NUM_ACTIONS),
            "rewards": (4, 7),
            "terminated": (4, 7),
            "discounts": (4, 7),
        }
        types = {name: column.dtype for name, column in batch.columns.items()}
        assert types.pop("obs") == types.pop("next_obs") == dtype
        assert set(types.values()) == {torch.float32}


# The bounds are the 99.9 % quantile of χ² with so many degrees of freedom; the seed is fixed, so they cannot flicker.
@implicitly
@pytest.mark.parametrize("n_step", [1, 3])
def test_all_stored_transitions_are_equally_likely(implicit: bool, n_step: int) -> None:
    rb, world = filled(70, capacity=100, n_step=n_step, implicit_next=implicit)  # the seam is in the middle
    counts = Counter(world.where[obs.numpy().tobytes()] for obs in rb.sample(100, 400, rng(1)).obs.flatten(0, 1))
    assert counts.keys() == world.stored(50)
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 148.2  # 99 degrees of freedom


def test_draws_do_not_depend_on_each_other() -> None:
    rb, world = filled(30, num_envs=1, capacity=5)
    drawn = [world.where[obs.numpy().tobytes()][1] for obs in rb.sample(100, 100, rng(2)).obs.flatten(0, 1)]
    pairs = Counter(zip(drawn[::2], drawn[1::2], strict=True))
    assert len(pairs) == 25  # also twice the same: with replacement
    assert sum((count - 200) ** 2 / 200 for count in pairs.values()) < 51.2  # 24 degrees of freedom


@implicitly
def test_a_generator_in_the_same_state_gives_the_same_samples(implicit: bool) -> None:
    rb, _ = filled(20, implicit_next=implicit, n_step=2)
    generator = rng(3)
    state = generator.get_state()
    first, second = rb.sample(3, 8, generator), rb.sample(3, 8, generator)
    generator.set_state(state)
    assert same(rb.sample(3, 8, generator), first)
    assert same(rb.sample(3, 8, generator), second)
    assert not same(first, second)


def test_samples_are_copies() -> None:
    rb, world = filled(20)
    batch = rb.sample(2, 8, rng())
    before = Batch(**{name: column.clone() for name, column in batch.columns.items()})
    play(rb, world, 20)
    assert same(batch, before)
    for column in rb.sample(2, 8, rng()).columns.values():
        column.fill_(5)
    world.check(rb.sample(4, 50, rng()), 6, 1)


@implicitly
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "file"])
def test_a_restored_buffer_goes_on_as_the_one_that_was_stored(
    implicit: bool, n_step: int, on_disk: bool, tmp_path: Path
) -> None:
    # 6 rows and the one for the next observation: empty, begun, one short of full, full, at and behind the seam
    for moment in (0, 1, 5, 6, 7, 8, 13, 14, 30):
        for restarts in (False, True):
            settings = {"n_step": n_step, "implicit_next": implicit, "folder": tmp_path if on_disk else None}
            rb, world = filled(moment, **settings)
            state = stored(rb)
            restored = make(**settings)
            restored.load_state_dict(state)
            assert torch.equal(restored.newest_obs(), rb.newest_obs())
            assert (restored.size, restored.position) == (rb.size, rb.position)
            if moment:
                assert same(restored.sample(2, 40, rng(moment)), rb.sample(2, 40, rng(moment)))
            if restarts:
                obs = world.reset()
                rb.start(obs)
                restored.start(obs)
            for i in range(15):  # more than twice round
                step = world.step()
                rb.add(*step)
                restored.add(*step)
                batch = restored.sample(1, 24, rng(i))
                assert same(batch, rb.sample(1, 24, rng(i)))
                world.check(batch, 6, n_step)


@implicitly
def test_loading_leaves_nothing_of_what_was_there_before(implicit: bool) -> None:
    rb, world = filled(3, implicit_next=implicit)
    restored, _ = filled(20, implicit_next=implicit)
    restored.load_state_dict(stored(rb))
    for i in range(20):
        step = world.step()
        rb.add(*step)
        restored.add(*step)
        assert same(restored.sample(1, 24, rng(i)), rb.sample(1, 24, rng(i)))


@implicitly
def test_a_stored_state_does_not_change_when_the_run_goes_on(implicit: bool) -> None:
    rb, world = filled(9, implicit_next=implicit)
    state = stored(rb)
    expected = rb.sample(2, 40, rng())
    restored, copy = make(implicit_next=implicit), make(implicit_next=implicit)
    copy.load_state_dict(rb.state_dict())
    play(rb, world, 20)
    restored.load_state_dict(state)
    play(rb, world, 1)
    for other in (restored, copy):
        assert same(other.sample(2, 40, rng()), expected)


def test_only_rows_in_use_are_stored() -> None:
    full, _ = filled(2000, capacity=1000)
    begun, _ = filled(10, capacity=1000)
    assert len(begun.state_dict()["records"]) < len(full.state_dict()["records"]) / 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capacity": 15}, "holds 6 × 2 transitions, this run's 7 × 2: --buffer-size 12 "),
        ({"num_envs": 1, "capacity": 6}, "holds 6 × 2 transitions, this run's 6 × 1: keep --num-envs"),
        ({"space": Box(-1, 1, (4,), np.float32)}, "keep its arguments"),
        ({"space": Box(0, 255, (3,), np.uint8)}, "keep its arguments"),
        ({"implicit_next": True}, "keep its arguments"),
    ],
    ids=str,
)
def test_a_state_of_another_layout_is_refused(change: dict[str, Any], words: str) -> None:
    rb, _ = filled(10)
    with pytest.raises(CheckpointError, match=words):
        make(**change).load_state_dict(rb.state_dict())
    with pytest.raises(CheckpointError):
        ReplayBuffer(13, 2, VECTOR, NUM_ACTIONS + 1).load_state_dict(rb.state_dict())


def test_returns_over_more_steps_and_another_discount_are_no_other_layout() -> None:
    rb, _ = filled(10)
    other = ReplayBuffer(13, 2, VECTOR, NUM_ACTIONS, gamma=0.5, n_step=4)
    other.load_state_dict(stored(rb))
    assert other.size == 6


@implicitly
def test_after_clear_nothing_of_before_is_sampled(implicit: bool) -> None:
    rb, world = filled(20, implicit_next=implicit, n_step=3)
    rb.clear()
    assert rb.size == 0
    fresh = World(2, seed=1)
    fresh.count = world.count
    rb.start(fresh.reset())
    for _ in range(30):
        play(rb, fresh, 1)
        assert fresh.check(rb.sample(4, 100, rng()), 6, 3) == fresh.stored(6)


@implicitly
def test_a_file_holds_what_memory_would_and_has_no_name(implicit: bool, tmp_path: Path) -> None:
    on_disk, _ = filled(20, implicit_next=implicit, folder=tmp_path)
    in_memory, _ = filled(20, implicit_next=implicit)
    assert list(tmp_path.iterdir()) == []  # it ends with the process, however that ends
    assert on_disk.num_bytes == in_memory.num_bytes
    assert torch.equal(on_disk.state_dict()["records"], in_memory.state_dict()["records"])
    assert same(on_disk.sample(2, 40, rng()), in_memory.sample(2, 40, rng()))
    restored = make(implicit_next=implicit)
    restored.load_state_dict(stored(on_disk))  # a checkpoint does not tell where the records were
    assert same(restored.sample(2, 40, rng()), in_memory.sample(2, 40, rng()))
    filled(3, implicit_next=implicit, folder=tmp_path)  # in a file of its own
    assert same(on_disk.sample(2, 40, rng()), in_memory.sample(2, 40, rng()))


def test_implicit_next_observations_take_about_half_the_memory() -> None:
    for space in (Box(-1, 1, (376,), np.float32), Box(0, 255, (4, 84, 84), np.uint8)):
        explicit, implicit = (
            ReplayBuffer(1000, 4, space, 17, implicit_next=implicit).num_bytes for implicit in (False, True)
        )
        assert 0.5 < implicit / explicit < 0.53


def test_slots_of_observations_kept_apart_are_reused() -> None:
    rb, world = make(num_envs=2, capacity=80, implicit_next=True), World(2, ends=1.0)
    rb.start(world.reset())
    play(rb, world, 1000)
    assert 41 * 2 <= len(rb.state_dict()["finals"]) <= 2 * 64  # one for each record, from a room that doubles


def test_observations_kept_apart_keep_their_slots_over_a_resume() -> None:
    rb, world = make(num_envs=1, capacity=200, implicit_next=True), World(1, ends=1.0)
    rb.start(world.reset())
    for _ in range(5):  # each time more room is needed than there was
        play(rb, world, 30)
        restored = make(num_envs=1, capacity=200, implicit_next=True)
        restored.load_state_dict(stored(rb))
        rb = restored
        assert world.check(rb.sample(10, 400, rng()), 200, 1) == world.stored(200)
    assert len(rb.state_dict()["finals"]) == 256  # for 150: places that were free still are


def test_a_uint8_buffer_takes_a_quarter_of_the_memory() -> None:
    bytes_, floats = (ReplayBuffer(100, 1, Box(0, 255, (84, 84), dtype), 1) for dtype in (np.uint8, np.float32))
    assert bytes_.num_bytes / floats.num_bytes == pytest.approx(0.25, abs=0.01)


def test_buffers_that_memory_does_not_hold_are_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1.5 * GIB)
    for fits in ((GIB, 1), (3 * GIB // 2, 1), (GIB // 2, 3)):
        check_memory(*fits, "buy more")
    with pytest.raises(ConfigError, match=r"--buffer-size.* 1\.50 GiB.* 1\.60 GiB; buy more"):
        check_memory(int(1.6 * GIB), 1, "buy more")
    with pytest.raises(ConfigError, match=r"1\.50 GiB.* 2 × 0\.80 GiB"):  # on the ranks of this machine
        check_memory(int(0.8 * GIB), 2, "buy more")


def test_what_a_transition_takes_is_known_before_there_is_a_buffer() -> None:
    # 2 × 17 + 6 + 1 numbers, and two bits that are filled up to four bytes
    assert record_type(Box(-1, 1, (17,), np.float32), 6, implicit_next=False).itemsize == 4 * 41 + 4
    # 17 + 6 + 1 numbers, two bits filled up, and the place of what is kept apart
    assert record_type(Box(-1, 1, (17,), np.float32), 6, implicit_next=True).itemsize == 4 * 24 + 4 + 4
    for space in (VECTOR, IMAGE):
        for implicit in (False, True):
            rb = make(space=space, capacity=20, implicit_next=implicit)
            assert rb.num_bytes == 11 * 2 * record_type(space, NUM_ACTIONS, implicit).itemsize


def test_a_buffer_that_the_disk_does_not_hold_is_refused_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []

    def full(descriptor: int, offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = shutil.disk_usage(tmp_path)._replace(free=GIB // 4)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    rows, record = 2**15, record_type(Box(-1, 1, (1021,)), 1, implicit_next=False).itemsize
    with pytest.raises(ConfigError, match=r"--buffer-memmap.*0\.25 GiB in .*0\.25 GiB are free.*No space left"):
        ReplayBuffer(rows, 1, Box(-1, 1, (1021,)), 1, folder=tmp_path)
    assert asked == [(rows + 1) * record]  # all of its room at once, before the first step
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="--buffer-size is 3: it must be at least num-envs = 4"):
        ReplayBuffer(3, 4, VECTOR, 1)


def test_available_memory_is_some_but_not_more_than_there_is() -> None:
    assert 0 < available_memory() < 2**50


@implicitly
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_found_and_named(bad: float, implicit: bool) -> None:
    def after(change: Callable[[tuple], None]) -> str | None:
        rb, world = filled(8, implicit_next=implicit)
        world.ends = 0.0
        play(rb, world, 1)
        assert rb.find_nonfinite() is None
        step = world.step()
        change(step)
        rb.add(*step)
        return rb.find_nonfinite()

    def reward(step: tuple) -> None:
        step[2][1] = bad

    def observation(step: tuple) -> None:
        step[1][0, 2] = bad

    def final(step: tuple) -> None:
        step[4][1] = True
        step[5]["final_obs"][1] = np.array([0.0, bad, 0.0], np.float32)

    assert after(reward) == "reward of environment 1 is not finite"
    assert after(observation) == "observation of environment 0 is not finite"
    assert after(final) == "final observation of environment 1 is not finite"
    assert after(lambda step: step[2].fill(3e38)) is None  # large, and their sum is infinite in float32


def test_images_are_always_finite() -> None:
    rb, world = filled(8, space=IMAGE)
    assert rb.find_nonfinite() is None
    rewards = np.array([0.0, np.nan])
    step = world.step()
    rb.add(step[0], step[1], rewards, *step[3:])
    assert rb.find_nonfinite() == "reward of environment 1 is not finite"


class CountingBox(Counting):
    """Counting, with actions as SAC takes them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = Box(-2.0, 4.0, (2,), np.float32)


gym.register("CountingBox-v0", entry_point=CountingBox)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("end", ["terminate_after", "truncate_after"])
def test_what_real_environments_return_is_stored_as_it_happened(end: str, vectorization: str, tmp_path: Path) -> None:
    # Episodes of 3, 4 and 5 steps; an observation is (steps taken, number of the episode, seed), a reward the steps
    settings = {"env_id": "CountingBox-v0", "num_envs": 3, "vectorization": vectorization}
    args = SACArgs(**settings, env_kwargs=f'{{"{end}": 3, "stagger": 3}}', hidden_sizes=(4,))
    envs = make_envs(args, 0, tmp_path)
    agent = make_agent(args, envs)
    buffers_ = [make(3, 30, n_step=n, implicit_next=implicit) for n in (1, 2) for implicit in (False, True)]
    for rb in buffers_:
        obs, _ = envs.reset(seed=[0, 1, 2])
        first = obs[:, 1].copy()  # an episode of each environment
        rb.start(obs)
        run = BareRun(args, action_space=envs.single_action_space)
        for step in range(37):
            rollout(run, agent, envs, rb, step < 5)
        batch = {name: column.flatten(0, 1).numpy() for name, column in rb.sample(10, 100, rng(1)).columns.items()}
        seen = set()
        for i, (steps, number, seed) in enumerate(batch["obs"].astype(int).tolist()):
            length = 3 + seed % 3
            is_newest = (number - first[seed]) * length + steps == 36
            m = 1 if steps + 1 == length or is_newest else rb.n_step
            seen.add((seed, number, steps))
            assert batch["next_obs"][i].tolist() == [steps + m, number, seed]  # never the first of the next episode
            assert batch["terminated"][i] == (end == "terminate_after" and steps + m == length)
            assert batch["rewards"][i] == pytest.approx(steps + 1 + (GAMMA * (steps + 2) if m == 2 else 0.0))
            assert batch["discounts"][i] == pytest.approx(GAMMA**m)
        assert len(seen) == 30
        run.episodes.flush(run.fabric)
        assert run.episodes.count == 37 // 3 + 37 // 4 + 37 // 5
    envs.close()


def test_actions_are_stored_in_minus_one_to_one_and_reach_the_environment_rescaled(tmp_path: Path) -> None:
    args = SACArgs(env_id="tests.envs:Odd-v0", env_kwargs='{"action": "box_uneven"}', num_envs=2, hidden_sizes=(4,))
    envs = make_envs(args, 0, tmp_path)  # bounds [−1, 1] and [0, 10]; refuses others
    taken: list[np.ndarray] = []
    step, envs.step = envs.step, lambda actions: taken.append(actions.copy()) or step(actions)
    agent = make_agent(args, envs)
    rb = make(capacity=400)
    rb.start(envs.reset(seed=1)[0])
    run = BareRun(args, action_space=envs.single_action_space)
    for random in (True, False):
        generator = rng(4)
        for _ in range(50):
            obs = rb.newest_obs().clone()
            run.act_rng.set_state(generator.get_state())
            rollout(run, agent, envs, rb, random)
            if random:
                expected = 2 * torch.rand(2, 2, generator=generator) - 1
            else:
                with torch.no_grad():
                    expected = agent.act(obs, agent.head.noise((2,), generator))
            rescaled = expected.numpy() * [1.0, 5.0] + [0.0, 5.0]
            np.testing.assert_allclose(taken[-1], rescaled, rtol=1e-6, atol=1e-6)
    stored_actions = torch.cat(list(rb.sample(20, 100, rng()).actions))
    assert -1 <= stored_actions.min() < -0.9
    assert 0.9 < stored_actions.max() <= 1
    envs.close()


@pytest.mark.parametrize(
    ("kind", "message"), [("reward_nan", "reward of environment 1"), ("obs_nan", "observation of environment 1")]
)
def test_a_step_with_a_bad_number_ends_in_an_error_that_names_it(kind: str, message: str, tmp_path: Path) -> None:
    class Faulty(gym.ActionWrapper):
        def action(self, action: Any) -> int:
            return 0

    def build(seed: int) -> gym.Env:
        env = Faulty(Fault(kind, at_step=4, only_seed=1))
        env.action_space = Box(-1.0, 1.0, (2,), np.float32)
        return env

    envs = gym.vector.SyncVectorEnv(
        [lambda: build(0), lambda: build(1)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    args = SACArgs(hidden_sizes=(4,), num_envs=2)
    agent = make_agent(args, envs)
    rb = ReplayBuffer(20, 2, envs.single_observation_space, 2)
    rb.start(envs.reset(seed=[0, 1])[0])
    arguments = (BareRun(args, action_space=envs.single_action_space), agent, envs, rb, True)
    for _ in range(4):
        rollout(*arguments)
    with pytest.raises(NonFiniteError, match=message):
        rollout(*arguments)
