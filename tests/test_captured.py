"""Runs that capture, and replay buffers on a device: on the CPU, where graphs are stood in for (`captured`).

What a graph would refuse, the stand-in refuses: see REFUSED.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fabricrl.algos.droq import droq
from fabricrl.algos.off_policy import replay
from fabricrl.algos.off_policy.updates import SampleAndTrain
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.data import DeviceReplayBuffer
from fabricrl.utils.errors import CheckpointError, ConfigError, NonFiniteError
from fabricrl.utils.update import Runner
from tests.conftest import Graph, NoValues, Trained
from tests.process import differences, load
from tests.test_replay_buffer import GAMMA, IMAGE, NUM_ACTIONS, VECTOR, World, play, rng, same, stored
from tests.test_replay_buffer import make as make_numpy

CPU = torch.device("cpu")


# --- The ring on a device


def make(num_envs: int = 2, capacity: int = 13, space: Any = VECTOR, n_step: int = 1) -> DeviceReplayBuffer:
    return DeviceReplayBuffer(capacity, num_envs, space, NUM_ACTIONS, GAMMA, n_step, CPU)


def both(steps: int, num_envs: int = 2, **more: Any) -> tuple[DeviceReplayBuffer, Any, World]:
    """A ring on a device and one of NumPy's that have seen the same world, and that world."""
    rings: Any = make(num_envs, **more), make_numpy(num_envs, **more)
    world = World(num_envs, more.get("space", VECTOR))
    obs = world.reset()
    for ring in rings:
        ring.start(obs)
    for _ in range(steps):
        step = world.step()
        for ring in rings:
            ring.add(*step)
    return *rings, world


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(
    ("capacity", "num_envs", "space"), [(20, 3, VECTOR), (13, 1, VECTOR), (13, 2, IMAGE), (5, 3, IMAGE)]
)
def test_every_sample_happened_and_whatever_is_stored_is_sampled(
    capacity: int, num_envs: int, space: Any, n_step: int
) -> None:
    rb, world = make(num_envs, capacity, space, n_step), World(num_envs, space, 0.2, seed=n_step)
    rows, generator = capacity // num_envs, rng()
    rb.start(world.reset())
    for _ in range(4 * rows + 3):
        play(rb, world, 1)
        everything = world.stored(rows)
        assert world.check(rb.sample(10, 6 * len(everything), generator), rows, n_step) == everything


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 7, 8, 40])
def test_the_state_is_that_of_the_buffer_in_memory(steps: int) -> None:
    ours, theirs, world = both(steps)
    assert differences(stored(ours), stored(theirs)) == []
    assert torch.equal(ours.newest_obs(), theirs.newest_obs())
    fresh = make()
    fresh.load_state_dict(stored(theirs))
    obs = world.reset()
    for ring in (fresh, theirs):
        ring.start(obs)
    for _ in range(5):
        step = world.step()
        for ring in (fresh, theirs):
            ring.add(*step)
    assert differences(stored(fresh), stored(theirs)) == []
    assert world.check(fresh.sample(4, 50, rng()), 6, 1) == world.stored(6)


@pytest.mark.parametrize("steps", [5, 9])
def test_draws_are_uniform(steps: int) -> None:
    rb, _, world = both(steps)
    draws = rb.sample(100, 400, rng(1)).obs.flatten(0, 1)
    counts = Counter(world.where[obs.numpy().tobytes()] for obs in draws)
    expected, cells = len(draws) / len(world.stored(6)), len(world.stored(6))
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == cells
    assert chi_square < cells - 1 + 4 * math.sqrt(2 * (cells - 1))


def test_a_ring_of_another_layout_is_refused_and_shards_are_divided_anew() -> None:
    with pytest.raises(CheckpointError, match="--buffer-size 6 "):
        make(capacity=13).load_state_dict(stored(make(capacity=7)))
    wide, _, world = both(9, num_envs=4, capacity=24)
    obs = world.reset()
    for first in (0, 2):
        parts: list[Any] = [make(2, 12), make_numpy(2, 12)]
        for part in parts:
            part.load_shards([stored(wide)], first, 4)
            part.start(obs[first : first + 2])
        assert differences(*map(stored, parts)) == []


def test_a_captured_sample_follows_the_ring_as_it_fills_and_wraps(graphs: None) -> None:
    rb, world, graph = make(n_step=2), World(2, VECTOR), Graph()
    rb.start(world.reset())
    generator, twin = rng(), rng()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        batch = rb.sample(2, 30, generator)
    rb.sample(2, 30, twin)
    for _ in range(20):
        play(rb, world, 1)
        graph.replay()
        assert same(batch, rb.sample(2, 30, twin))
        world.check(batch, 6, 2)


# --- Runs

# Episodes of 8 steps: they end where iterations and checkpoints do
ENDING = ["--env-id", "tests.envs:Deterministic-v0", "--env-kwargs", '{"continuous": true, "truncate": true}']
IMAGES = ["--env-id", "tests.image_envs:Drift-v0", "--env-kwargs", "{}", "--frame-stack", 2, "--cnn-features", 4]
COMMON = [*ENDING, "--norm-obs", "--hidden-sizes", 8, "--num-envs", 2, "--total-timesteps", 96, "--num-threads", 1]
ON_POLICY = [*COMMON, "--num-steps", 16]
OFF_POLICY = [*COMMON, "--learning-starts", 32, "--batch-size", 16, "--buffer-size", 50]
RUNS: dict[str, tuple[Callable[[], int], list[Any]]] = {
    "ppo": (ppo.main, [*ON_POLICY, "--norm-reward"]),
    "ppo, images": (ppo.main, [*ON_POLICY, *IMAGES]),
    "ppo_recurrent": (ppo_recurrent.main, [*ON_POLICY, "--prev-action", "--prev-reward", "--norm-reward"]),
    "ppo_recurrent, memory alone": (ppo_recurrent.main, ON_POLICY),  # stored as the graph leaves it
    "ppo_recurrent, images": (ppo_recurrent.main, [*ON_POLICY, *IMAGES]),
    "sac": (sac.main, OFF_POLICY),
    "sac, several at once": (sac.main, [*OFF_POLICY, "--replay-ratio", 1.5, "--policy-frequency", 3]),
    "sac, one by one": (sac.main, [*OFF_POLICY, "--replay-ratio", 3.5, "--target-network-frequency", 40]),
    "sac, images": (sac.main, [*OFF_POLICY, *IMAGES]),
    "droq": (droq.main, [*OFF_POLICY, "--replay-ratio", 2.5]),
    "droq, images": (droq.main, [*OFF_POLICY, *IMAGES, "--replay-ratio", 1.5]),
}
EVERY = pytest.mark.parametrize("name", RUNS)
ON = pytest.mark.parametrize("name", [name for name in RUNS if "ppo" in name])
REPLAY = pytest.mark.parametrize("name", [name for name in RUNS if "ppo" not in name and "images" not in name])


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay buffers lie on a device, which is the CPU."""
    monkeypatch.setattr(replay, "buffer_device", lambda run: (CPU, ""))


@pytest.fixture
def elementary() -> Iterator[None]:
    """Recurrent cores run operation by operation."""
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(True)


@EVERY
def test_a_captured_run_is_the_run_that_is_not_and_records_nothing_after_its_start(
    name: str, train: Callable[..., Trained], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags = RUNS[name]
    runs: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append((run, run.runner.recordings)) or reset(run))
    request.getfixturevalue("captured")
    if "recurrent" in name:  # the kernel for whole sequences returns other things where no gradient is wanted
        request.getfixturevalue("elementary")
    recorded = train(main, *flags)
    monkeypatch.setattr("fabricrl.algos.run.Runner", lambda compile, capture, *rest: Runner(False, False, *rest))
    plain = train(main, *flags)
    if "recurrent" in name:  # sequences are padded further
        torch.testing.assert_close(recorded.weights, plain.weights, rtol=0, atol=1e-5)
    elif "one by one" not in name:  # where batches and noise are drawn in another order
        assert torch.equal(recorded.weights, plain.weights)
    (run, at_start), (eager, _) = runs
    assert run.runner.recordings == at_start > 1  # an update and acting
    assert eager.runner.recordings == 0
    assert Graph.held == [], "NCCL would wait for them"


@pytest.mark.usefixtures("captured")
def test_actions_of_uneven_choices_are_learned_from_in_a_graph(train: Callable[..., Trained]) -> None:
    flags = ["--env-id", "tests.envs:IdentityMultiDiscrete-v0", "--num-envs", 2, "--num-steps", 16]
    assert train(ppo.main, *flags, "--total-timesteps", 64).code == 0


@pytest.mark.usefixtures("captured")
def test_a_run_that_fails_frees_its_graphs(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        assert Graph.held
        raise NonFiniteError("here")

    monkeypatch.setattr(Run, "record_rollout", fail)
    with pytest.raises(NonFiniteError, match="here"):
        train(ppo.main, *RUNS["ppo"][1])
    assert Graph.held == []


@EVERY
@pytest.mark.usefixtures("captured")
def test_a_captured_run_acts_elsewhere_as_it_does_here(
    name: str, train: Callable[..., Trained], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags = RUNS[name]
    if "recurrent" in name:  # the stand-in for graphs expects the same results of each operation
        request.getfixturevalue("elementary")
    here = train(main, *flags)
    players: list[bool] = []
    make_envs, player = Run.make_envs, Run.player

    def make_envs_elsewhere(run: Run) -> Any:
        run.player_device = torch.device("cpu", 0)  # to torch another one than "cpu"
        return make_envs(run)

    monkeypatch.setattr(Run, "make_envs", make_envs_elsewhere)

    def watched_player(run: Run, agent: Any) -> Any:
        players.append(player(run, agent) is not agent)
        return player(run, agent)

    monkeypatch.setattr(Run, "player", watched_player)
    there = train(main, *flags)
    assert torch.equal(there.weights, here.weights)
    assert players
    assert all(players)


@ON
@pytest.mark.usefixtures("captured", "elementary")
def test_a_captured_run_is_the_same_again_and_the_same_resumed(
    name: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    main, flags = RUNS[name]
    flags = [*flags, "--checkpoint-every", 32, "--keep-checkpoints", 9]
    straight, again = (train(main, *flags, "--log-dir", tmp_path / name) for name in ("first", "second"))
    half = straight.folder / "checkpoints" / f"step_{64:012d}.ckpt"
    resumed = train(main, "--resume", half, "--log-dir", tmp_path / "more")
    before, *states = (
        {part: load(path)[part] for part in ("agent", "optimizer", "generators", "episodes")}
        for path in (half, straight.checkpoint, again.checkpoint, resumed.checkpoint)
    )
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2]) == []
    changed = {part.split("/")[1] for part in differences(before, states[0])}
    assert changed == before.keys()


@REPLAY
@pytest.mark.usefixtures("captured", "on_device")
def test_a_run_with_its_ring_on_the_device_is_the_same_resumed_and_goes_on_with_one_in_memory(
    name: str, train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags = RUNS[name]
    flags = [*flags, "--checkpoint-every", 32, "--keep-checkpoints", 9]
    straight = train(main, *flags)
    half = straight.folder / "checkpoints" / f"step_{64:012d}.ckpt"
    resumed = train(main, "--resume", half, "--log-dir", tmp_path / "more")
    assert torch.equal(straight.weights, resumed.weights)
    assert not torch.equal(load(half)["agent"]["actor.out.bias"], straight.state["agent"]["actor.out.bias"])
    monkeypatch.undo()
    in_memory = train(main, "--resume", half, "--log-dir", tmp_path / "memory")
    assert in_memory.result["steps"] == "96"
    shards = [load(r.checkpoint)["shard"] for r in (straight, in_memory)]
    assert [shard["layout"] for shard in shards] == [shards[0]["layout"]] * 2


@REPLAY
@pytest.mark.usefixtures("captured", "on_device")
def test_a_ring_on_the_device_is_sampled_inside_the_graph(
    name: str, train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    sample = DeviceReplayBuffer.sample
    monkeypatch.setattr(DeviceReplayBuffer, "sample", lambda *args: sampled.append(1) or sample(*args))
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: sampled.clear() or reset(run))
    main, flags = RUNS[name]
    assert train(main, *flags).code == 0
    assert sampled == []


REFUSED: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x[:1].item(),
    "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to, by name": lambda x: x.to(device="cpu"),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x[0]),
    "float": lambda x: float(x[0]),
    "rows that are true": lambda x: x[x > 0],
    "rows that are true, set": lambda x: x.clone().__setitem__(x > 0, torch.zeros(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_waits_for_a_value_is_refused(name: str) -> None:
    x = torch.ones(2)
    with NoValues(), pytest.raises(RuntimeError, match="not permitted"):
        REFUSED[name](x)
    REFUSED[name](x)


def test_what_waits_for_nothing_is_not_refused() -> None:
    x, device = torch.ones(2), torch.device("cpu")
    with NoValues():
        y = x.to(device).clone()
        y[x > 0] = 0.0
        y[torch.tensor([1])] = x[torch.tensor([0])]
        z = x.where(x > 0, y).repeat_interleave(x.long(), output_size=2)
    assert y.tolist() == [0.0, 1.0]
    assert z.tolist() == [1.0, 1.0]


# --- Faults


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("algo", ["sac", "droq"])
def test_what_is_not_finite_ends_a_run_before_another_update(
    algo: str,
    capture: bool,
    where: str,
    train: Callable[..., Trained],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capture:
        request.getfixturevalue("captured")
    factor, updates = torch.ones(()), []
    loss = sac.critic_loss

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * factor if where == "loss" else x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * factor if where == "gradient" else grad

    for script in (sac, droq):
        monkeypatch.setattr(script, "critic_loss", lambda q, targets: Spoiled.apply(loss(q, targets)))
    call = SampleAndTrain.__call__

    def update(self: Any, *rest: Any) -> None:
        updates.append(self._run.global_step)
        factor.fill_(math.nan if self._run.global_step == 50 else 1.0)
        call(self, *rest)

    monkeypatch.setattr(SampleAndTrain, "__call__", update)
    main, flags = RUNS[algo]
    with pytest.raises(NonFiniteError, match="not finite after the update"):
        train(main, *flags, "--log-every", 10_000)
    assert updates[-1] == 50


# --- Arguments


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ["--buffer-device", "cuda"],
            "--buffer-device is cuda: it must be cpu or auto where the run trains on the CPU",
        ),
        (
            ["--buffer-device", "cuda", "--buffer-memmap"],
            "--buffer-device is cuda: .*auto or cpu beside --buffer-memmap",
        ),
        (["--buffer-device", "cuda", "--implicit-next-obs"], "auto or cpu beside --implicit-next-obs"),
    ],
)
def test_a_buffer_device_that_cannot_be_is_refused(line: list, words: str, train: Callable[..., Trained]) -> None:
    with pytest.raises(ConfigError, match=words):
        train(sac.main, *OFF_POLICY, *line)
