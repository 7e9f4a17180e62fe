"""SAC and DroQ on images: frame stacks out of replay, random shifts, and an encoder that the critics alone train."""

import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from fabricrl.algos.droq import droq
from fabricrl.algos.droq.agent import make_agent as make_droq_agent
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.off_policy.replay import buffer_device, has_implicit_next
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.agent import EncodedCritics, SACAgent, make_agent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, memory
from fabricrl.data.memory import GIB
from fabricrl.data.replay import NewestSteps, ReplayBuffer
from fabricrl.data.transitions import record_type
from fabricrl.models.augmentation import moved, shift_images
from fabricrl.utils.errors import ConfigError, NonFiniteError
from fabricrl.utils.recording import recording
from fabricrl.utils.records import Records
from tests.conftest import BareRun, Trained
from tests.process import call, differences, load, run_folder, run_team
from tests.test_off_policy_resume import content
from tests.test_replay_buffer import IMAGE, NUM_ACTIONS, VECTOR, World, filled, play, rng, same, stored

SPACE = Records({"speed": 2}, {"camera": (36, 40, 3), "depth": (3, 37, 38)})


class Stacks:
    """Reference for stacks: each as the lists of all that happened in a `World` have it."""

    def __init__(self, world: World, depth: int) -> None:
        self.world, self.depth = world, depth

    def at(self, env: int, t: int) -> np.ndarray:
        """The stack of observations that ends with transition t, [S, ...]; the first one of an episode is repeated."""
        steps, frames = self.world.history[env], []
        while len(frames) < self.depth:
            frames.insert(0, steps[t].obs)
            before = steps[t - 1] if t else None
            if before is not None and not (before.terminated or before.truncated or before.cut):
                t -= 1
        return np.stack(frames)

    def newest(self) -> np.ndarray:
        """Those that the next step starts from, [N, S, ...]."""
        found = []
        for env, steps in enumerate(self.world.history):
            own, last = self.world.obs[env].copy()[None], steps[-1] if steps else None
            if last is None or last.terminated or last.truncated or last.cut:
                found.append(own.repeat(self.depth, 0))
            else:
                found.append(np.concatenate((self.at(env, len(steps) - 1)[1:], own)))
        return np.stack(found)

    def check(self, batch: Batch, capacity: int, n: int) -> set[tuple[int, int]]:
        """Every stack is what the world says, and the rest as without stacks. Returns the transitions there are."""
        columns = dict(batch.columns)
        obs, next_obs = (columns[name].flatten(0, 1).numpy() for name in ("obs", "next_obs"))  # [K B, S, ...]
        columns |= {name: columns[name][:, :, -1] for name in ("obs", "next_obs")}
        found = self.world.check(Batch(**columns), capacity, n)
        for row, following in zip(obs, next_obs, strict=True):
            env, t = self.world.where[row[-1].tobytes()]
            np.testing.assert_array_equal(row, self.at(env, t))
            m = round(np.log(self.world.expected(env, t, n)[1]) / np.log(0.9))  # γ^m steps later
            np.testing.assert_array_equal(following[:-1], self.at(env, t + m - 1)[1:])
        return found


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize(
    ("capacity", "num_envs", "space", "ends", "n_step", "depth"),
    [
        (20, 3, IMAGE, 0.15, 1, 3),
        (13, 1, VECTOR, 0.1, 3, 2),
        (13, 2, IMAGE, 0.2, 2, 4),
        (16, 4, VECTOR, 0.0, 1, 3),  # nothing ever ends
        (9, 2, IMAGE, 1.0, 1, 3),  # every step is an end
        (5, 3, IMAGE, 0.3, 1, 6),  # a single row, of a stack that is longer
    ],
)
def test_sampled_stacks_are_those_of_a_list_of_all_frames(
    capacity: int, num_envs: int, space: Box, ends: float, n_step: int, depth: int, implicit: bool
) -> None:
    """Over ends of episodes and turns of the ring, also at its seam; every transition stored is sampled."""
    rb = ReplayBuffer(capacity, num_envs, space, NUM_ACTIONS, 0.9, n_step, implicit, frame_stack=depth)
    world, rows, generator = World(num_envs, space, ends, seed=n_step), capacity // num_envs, rng()
    stacks = Stacks(world, depth)
    rb.start(world.reset())
    np.testing.assert_array_equal(rb.stacked_obs(), stacks.newest())
    for step in range(1, 60):
        play(rb, world, 1)
        assert rb.size == min(step, rows)
        np.testing.assert_array_equal(rb.stacked_obs(), stacks.newest())
        everything = world.stored(rows)
        if step % 3 == 0:  # each of M is missed by 40 M draws with a probability of e^-40
            assert stacks.check(rb.sample(10, 4 * len(everything), generator), rows, n_step) == everything
        if step in (4, 17, 18, 40):  # as after a resume, where no episode has ended
            rb.start(world.reset())
            np.testing.assert_array_equal(rb.stacked_obs(), stacks.newest())
            stacks.check(rb.sample(2, 5 * num_envs * rows, generator), rows, n_step)


def test_without_stacks_the_draws_are_those_of_before() -> None:
    """A ring of C transitions, and i-th draws that skip the row which is yet to be."""
    rb, _ = filled(30, capacity=14)
    index = torch.randint(14, (12,), generator=rng(5))
    index += 2 * (index >= rb.position * 2)
    obs = torch.from_numpy(rb._records["obs"].reshape(16, -1))
    assert torch.equal(rb.sample(1, 12, rng(5)).obs[0], obs[index])


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_a_restored_buffer_of_stacks_goes_on_as_the_one_that_was_stored(implicit: bool) -> None:
    for moment in (0, 1, 5, 6, 7, 8, 9, 13, 30):  # 6 rows, and 3 for the next observation and older frames
        settings = {"n_step": 2, "implicit_next": implicit, "frame_stack": 3}
        rb, world = filled(moment, space=IMAGE, **settings)
        restored = ReplayBuffer(13, 2, IMAGE, NUM_ACTIONS, 0.9, **settings)
        restored.load_state_dict(stored(rb))
        obs = world.reset()
        rb.start(obs)
        restored.start(obs)
        for i in range(15):
            step = world.step()
            rb.add(*step)
            restored.add(*step)
            batch = restored.sample(1, 24, rng(i))
            assert same(batch, rb.sample(1, 24, rng(i)))
            assert torch.equal(restored.stacked_obs(), rb.stacked_obs())
            Stacks(world, 3).check(batch, 6, 2)


def test_what_acts_without_a_buffer_stacks_its_newest_steps() -> None:
    newest, world = NewestSteps(4, 2, IMAGE, NUM_ACTIONS, frame_stack=3), World(2, IMAGE, 0.2)
    newest.start(world.reset())
    for _ in range(40):
        newest.add(*world.step())
        newest.sent()
        np.testing.assert_array_equal(newest.stacked_obs(), Stacks(world, 3).newest())


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
@pytest.mark.parametrize("implicit", [False, True])
def test_a_buffer_takes_memory_as_it_fills(implicit: bool) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    space, before = Box(0, 255, (64, 64), np.uint8), resident()
    rb = ReplayBuffer(2**18, 1, space, NUM_ACTIONS, implicit_next=implicit)
    assert rb.num_bytes > 2**30
    rb.start(np.zeros((1, 64, 64), np.uint8))
    assert resident() - before < rb.num_bytes / 16


def test_each_frame_is_stored_once() -> None:
    run: Any = SimpleNamespace(obs_space=Records({}, {"": (84, 84, 3)}), args=SACArgs())
    assert has_implicit_next(run)
    rb = ReplayBuffer(1000, 1, run.obs_space, 1, implicit_next=True, frame_stack=4)
    assert rb.num_bytes == (1000 + 4) * record_type(run.obs_space, 1, True).itemsize
    assert rb.num_bytes / 1000 == pytest.approx(84 * 84 * 3, rel=0.01)  # of a transition


def some_records(count: int, depth: int = 1) -> Tensor:
    shape = (count, depth, SPACE.size) if depth > 1 else (count, SPACE.size)
    return torch.randint(0, 256, shape, generator=rng(1), dtype=torch.uint8)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_shift_is_a_crop_of_an_image_that_is_padded_by_its_edges(depth: int) -> None:
    records = some_records(6, depth)
    offsets = torch.tensor([[0, 0], [4, 4], [-4, -4], [3, -2], [-1, 0], [0, 2]])
    found = moved(records, SPACE, offsets)
    for image in SPACE.images.values():
        before, after = (image.of(rows).view(6, -1, *image.sizes).numpy() for rows in (records, found))
        for row, (dy, dx) in enumerate(offsets.tolist()):
            padded = np.pad(before[row], ((0, 0), (0, 0), (4, 4), (4, 4)), "edge")
            _, height, width = image.sizes
            crop = padded[:, :, 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
            np.testing.assert_array_equal(after[row], crop)
    numbers = slice(0, 4 * SPACE.num_floats)
    assert torch.equal(found[..., numbers], records[..., numbers])
    assert torch.equal(records, some_records(6, depth))  # they are left alone


def test_shifts_are_uniform_and_of_the_generator_alone() -> None:
    space = Records({}, {"": (36, 36)})
    records = torch.zeros(4000, space.size, dtype=torch.uint8)
    records.view(-1, 36, 36)[:, 18, 18] = 255
    state = torch.get_rng_state()
    found = shift_images(records, space, 2, rng(2))
    assert torch.equal(found, shift_images(records, space, 2, rng(2)))
    assert not torch.equal(found, shift_images(records, space, 2, rng(3)))
    assert torch.equal(torch.get_rng_state(), state)
    counts = found.view(-1, 36, 36).bool().sum(0)
    assert counts.sum() == counts[16:21, 16:21].sum() == 4000
    assert ((counts[16:21, 16:21] - 160).square() / 160.0).sum() < 51.2  # χ² of 24 degrees of freedom, 99.9 %


SPACES = SimpleNamespace(
    single_observation_space=SPACE, single_action_space=Box(-1, 1, (NUM_ACTIONS,), np.float32), num_envs=1
)
SMALL: dict[str, Any] = {"hidden_sizes": (8,), "frame_stack": 2, "cnn_features": 4, "batch_size": 3}


def batches(count: int) -> Batch:
    draw = partial(torch.randn, generator=rng(4))
    obs = some_records(2 * count * 3, 2).view(2, count, 3, 2, SPACE.size)
    numbers = obs[..., : 4 * SPACE.num_floats].view(torch.float32)
    numbers.copy_(draw(numbers.shape))
    columns = {"obs": obs[0], "next_obs": obs[1], "actions": draw(count, 3, NUM_ACTIONS).tanh()}
    return Batch(**columns, rewards=draw(count, 3), terminated=torch.zeros(count, 3), discounts=torch.ones(count, 3))


@pytest.mark.parametrize("script", [sac, droq])
def test_the_critics_loss_alone_trains_the_encoder(script: ModuleType) -> None:
    args = SACArgs(**SMALL) if script is sac else DroQArgs(**SMALL)
    agent: SACAgent = make_agent(args, SPACES) if script is sac else make_droq_agent(args, SPACES)
    run = BareRun(args)
    learner = script.setup(run, agent)
    masks: list[Any] = [] if script is sac else [[], []]
    prepared = agent.prepare_batches(batches(1), run.device_rng)
    batch, noise = next(iter(prepared)), torch.randn(3, NUM_ACTIONS)
    assert isinstance(agent.critics, EncodedCritics)
    encoder = [p.detach().clone() for p in agent.critics.encoder.parameters()]
    before = [p.detach().clone() for p in agent.actor.parameters()]

    script.update_actor(run, learner, batch.obs, noise, *masks[:1])
    assert all(p.grad is None for p in agent.critics.parameters())
    assert all(torch.equal(*pair) for pair in zip(encoder, agent.critics.encoder.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(before, agent.actor.parameters(), strict=True))

    before = [p.detach().clone() for p in agent.actor.parameters()]
    target = [p.detach().clone() for p in agent.target_critics.encoder.parameters()]
    script.update_critics(run, learner, batch, noise, *(masks or [True]))
    assert all(p.grad is not None and p.grad.any() for p in agent.critics.encoder.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, agent.actor.parameters(), strict=True))
    moved_to = zip(target, agent.critics.encoder.parameters(), agent.target_critics.encoder.parameters(), strict=True)
    for old, online, new in moved_to:
        torch.testing.assert_close(new, torch.lerp(old, online, args.tau))


def test_critics_of_features_are_those_of_the_images() -> None:
    agent = make_agent(SACArgs(**SMALL), SPACES)
    obs, actions = batches(1).obs[0], torch.rand(3, NUM_ACTIONS)
    features = agent.features(obs)
    assert not features.requires_grad
    assert torch.equal(agent.critics(features, actions), agent.critics(obs, actions))
    assert features.shape == (3, 2 * 4 + 64)
    assert agent.act(obs, torch.zeros(3, NUM_ACTIONS)).shape == (3, NUM_ACTIONS)


def test_images_of_a_batch_are_shifted_each_by_itself_unless_that_is_off() -> None:
    drawn = batches(2)
    for pixels in (0, 3):
        agent = make_agent(SACArgs(**SMALL, random_shift=pixels), SPACES)
        prepared = agent.prepare_batches(drawn, rng())
        for name in ("obs", "next_obs"):
            own, there = prepared.columns[name], drawn.columns[name]
            assert own.shape == there.shape
            assert torch.equal(own, there) == (pixels == 0)
        if pixels:
            generator, shifts = rng(), []
            for name in ("obs", "next_obs"):
                rows = drawn.columns[name].flatten(0, 1)
                shifts.append(shift_images(rows, SPACE, pixels, generator).view(drawn.obs.shape))
            assert torch.equal(prepared.obs, shifts[0])
            assert torch.equal(prepared.next_obs, shifts[1])


def test_numbers_beside_images_are_normalised() -> None:
    agent = make_agent(SACArgs(**SMALL, norm_obs=True, random_shift=0), SPACES)
    rb = ReplayBuffer(4, 1, SPACE, NUM_ACTIONS, implicit_next=True, frame_stack=2)
    record = torch.zeros(1, SPACE.size, dtype=torch.uint8)
    record[:, :8].view(torch.float32).copy_(torch.tensor([3.0, -5.0]))
    rb.start(record.numpy())
    assert rb.newest_vectors().tolist() == [[3.0, -5.0]]
    assert agent.obs_normalizer is not None
    agent.obs_normalizer.update(torch.tensor([[1.0, 1.0], [3.0, -5.0]]))
    assert agent.prepare(rb.stacked_obs())[..., :8].view(torch.float32).tolist() == [[[1.0, -1.0]] * 2]
    assert agent.prepare(torch.stack([record])).dtype == torch.uint8


# --- Runs

# Episodes of 8 steps in 2 environments end every 16 steps, where a resumed environment is as it would have been
FLAGS = ["--env-id", "tests.image_envs:Drift-v0", "--num-envs", 2, "--total-timesteps", 96, "--learning-starts", 32]
FLAGS += ["--batch-size", 8, "--hidden-sizes", 16, "--frame-stack", 3, "--cnn-features", 8, "--norm-obs", "--n-step", 2]
FLAGS += ["--buffer-size", 40, "--replay-ratio", 0.5, "--num-threads", 1, "--checkpoint-every", 32]
FLAGS += ["--keep-checkpoints", 9]
SCRIPTS: dict[str, ModuleType] = {"sac": sac, "droq": droq}


@pytest.mark.parametrize("algo", SCRIPTS)
def test_a_run_is_the_same_compiled_captured_and_resumed(
    algo: str, train: Callable[..., Trained], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    main = SCRIPTS[algo].main
    straight = train(main, *FLAGS)
    half = straight.folder / "checkpoints" / f"step_{64:012d}.ckpt"
    resumed = train(main, "--resume", half, "--log-dir", tmp_path / "resumed")
    assert differences(content(straight.checkpoint), content(resumed.checkpoint)) == []
    changed = {name.split("/")[1] for name in differences(content(half), content(resumed.checkpoint))}
    assert {"agent", "q_optimizer", "actor_optimizer", "generators", "shard"} <= changed
    request.getfixturevalue("traced")
    compiled = train(main, *FLAGS, "--compile", "--log-dir", tmp_path / "compiled")
    with recording():  # Adam in elementary operations, as a compiler sees it
        spelled = train(main, *FLAGS, "--log-dir", tmp_path / "spelled")
    assert torch.equal(compiled.weights, spelled.weights)
    request.getfixturevalue("captured")
    captured = train(main, *FLAGS, "--log-dir", tmp_path / "captured")
    if algo == "sac":  # whose updates draw as without; what dropout drops is drawn in another way
        assert torch.equal(captured.weights, straight.weights)
    assert captured.weights.isfinite().all()


@pytest.mark.parametrize("algo", SCRIPTS)
def test_one_trainer_without_lag_leaves_the_checkpoints_of_the_coupled_script(algo: str, tmp_path: Path) -> None:
    """Also the encoder of the policy that plays, and the stacks that it sees."""
    script = SCRIPTS[algo]
    one = call(script.main, *FLAGS, "--log-dir", tmp_path / "coupled")
    run_team(f"{script.__name__}_decoupled", *FLAGS, "--max-lag", 0, "--log-dir", tmp_path / "logs", folder=tmp_path)
    for path in sorted((one.folder / "checkpoints").glob("step_*.ckpt")):
        other = run_folder(tmp_path / "logs") / "checkpoints" / path.name
        expected, found = content(path), content(other)
        shard, (found_shard,) = expected["shard"], [value["shard"] for name, value in found.items() if name[0] == "."]
        assert differences(expected["agent"], found["agent"]) == [], path.name
        assert differences(shard, found_shard) == [], path.name


def test_two_ranks_learn_from_images_each_with_its_own_buffer(tmp_path: Path) -> None:
    run_team(sac.__name__, *FLAGS, "--log-dir", tmp_path / "logs", folder=tmp_path)
    first, *_, last = sorted((run_folder(tmp_path / "logs") / "checkpoints").glob("step_*.ckpt"))
    state = load(last)
    assert (state["world_size"], state["global_step"]) == (2, 96)
    assert differences(state["shard"], load(last.with_suffix(".shard1"))["shard"])
    before = load(first)["agent"]
    assert [name for name, value in state["agent"].items() if torch.equal(value, before[name])] == []


def test_a_buffer_on_a_gpu_is_refused_and_auto_keeps_images_in_memory() -> None:
    fabric = SimpleNamespace(device=torch.device("cuda:0"))
    for place in ("auto", "cuda"):
        run: Any = SimpleNamespace(
            args=SACArgs(buffer_device=place), fabric=fabric, obs_space=SPACE, uses_tensor_envs=False
        )
        if place == "auto":
            assert buffer_device(run) == (None, "")
            continue
        with pytest.raises(ConfigError, match="--buffer-device is cuda: it must be cpu or auto with images"):
            buffer_device(run)


def test_a_buffer_of_images_that_memory_does_not_hold_is_refused_with_the_figures(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GIB)
    with pytest.raises(ConfigError, match=r"--buffer-size: only 2\.00 GiB of memory is free.* 4\.05 GiB"):
        train(sac.main, *FLAGS, "--buffer-size", 10**6)  # 4328 bytes each, and 16 of what is beside


def test_frames_of_vectors_are_not_stacked(train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match="--frame-stack is set: Pendulum-v1 has no images"):
        train(sac.main, "--frame-stack", 2)


@pytest.mark.parametrize("where", ["obs", "final_obs", "image"])
def test_nan_in_vectors_beside_images_is_found_before_it_is_learned_from(where: str) -> None:
    """A byte of an image may be any; 255 255 255 255 as a number is NaN."""
    size, bad = SPACE.shape[0], np.full((2, SPACE.shape[0]), 255, np.uint8)
    good, infos, ended = np.zeros((2, size), np.uint8), {"final_obs": np.zeros((2, size), np.uint8)}, np.zeros(2, bool)
    if where == "image":
        good[:, 4 * SPACE.num_floats :] = 255
    elif where == "final_obs":
        ended, infos = ~ended, {"final_obs": bad}
    rb = ReplayBuffer(8, 2, SPACE, 1)
    rb.start(good)
    step = np.zeros((2, 1), np.float32), bad if where == "obs" else good, np.zeros(2), ended, ~ended & False, infos
    if where == "image":
        with rb.checked():
            rb.add(*step)
        return
    with pytest.raises(NonFiniteError, match="observation of environment 0 is not finite"), rb.checked():
        rb.add(*step)


@pytest.mark.parametrize("flag", ["--random-shift 7", "--cnn-features 9"])
def test_what_concerns_images_is_refused_where_there_are_none(flag: str, train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match=rf"{flag.split()[0]} is set: Pendulum-v1 has no images"):
        train(sac.main, "--env-id", "Pendulum-v1", *flag.split())
