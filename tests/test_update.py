"""An update as it is, compiled and captured: the same results, nothing recorded twice, and no trace of a warm-up.

What is recorded for a compiler runs here operation by operation (`traced`), but for four updates that are compiled; a
CUDA graph is stood in for by one that records the operations and repeats them on the same memory.
"""

import contextlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.droq import droq
from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.ppo_recurrent.agent import RecurrentPPOAgent
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, minibatches, shuffled
from fabricrl.models.recurrent import Sequences
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.recording import recording
from fabricrl.utils.update import Runner
from tests.conftest import SINGLE, BareRun, Trained, captured, graphs, traced
from tests.envs import vectors
from tests.process import FORKSERVER, LIMIT, free_port, load, run_team
from tests.test_optimizer import IN_TURN, LATE, RATE, SOMETIMES, Heads

OBS, ACTIONS, BATCH = 3, 2, 16


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Updates


class Updates:
    """A run with an agent whose updates may be recorded. `update(i)` makes one, of a batch that `i` says."""

    def __init__(self, args: Any, fabric: Any = None) -> None:
        torch.manual_seed(0)
        self.run = BareRun(args, fabric)

    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        tensors = [tensor for optimizer in self.run._optimizers for tensor in optimizer.tensors()]
        return tensors + [t for module in self.run._modules for t in (*module.parameters(), *module.buffers())]

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), state, strict=True):
                tensor.copy_(value)

    def update(self, number: int) -> Tensor:
        raise NotImplementedError


class PPOUpdates(Updates):
    """Of minibatches in which some rows do not count, with coefficients that vary."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, fabric: Any = None, sizes: tuple[int, ...] = (8,), **settings: Any
    ) -> None:
        super().__init__(PPOArgs(**{"max_grad_norm": 0.1} | settings), fabric)
        self.agent = self.make_agent(sizes)
        self.optimizer = Adam(self.agent.parameters(), RATE, eps=1e-5)
        self.own = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        self.wrapped = self.run.setup(self.agent, self.optimizer)
        self.step = self.run.compiled(self.function)

    def make_agent(self, sizes: tuple[int, ...]) -> Any:
        return PPOAgent(vectors(OBS), Discrete(4), sizes)

    def function(self, batch: Batch, clip_coef: Any, ent_coef: Any) -> Tensor:
        return ppo.update(self.run, *self.wrapped, batch, clip_coef, ent_coef)

    def update(
        self, number: int, rate: float | None = None, clip: float | None = None, ent: float | None = None
    ) -> Any:
        draw = rng(number)
        columns = {name: torch.randn(BATCH, generator=draw) for name in ("advantages", "values", "returns")}
        columns["logprobs"] = -1.4 + 0.2 * torch.randn(BATCH, generator=draw)
        columns["weights"] = (torch.rand(BATCH, generator=draw) < 0.8).float() / (0.8 * BATCH)
        columns["weights"] *= BATCH // (self.own.stop - self.own.start)
        columns["obs"] = torch.randn(BATCH, OBS, generator=draw)
        columns["actions"] = torch.randint(4, (BATCH, 1), generator=draw)
        self.optimizer.param_groups[0]["lr"].fill_(RATE * (1 - number / 40) if rate is None else rate)
        clip, ent = 0.2 - number / 200 if clip is None else clip, 0.1 + number / 100 if ent is None else ent
        # Tensors also where nothing is recorded, as 1 − ε of a number is not that of a float32
        batch = Batch(**columns)[self.own].with_columns(**self.memory(draw))
        return self.step(batch, torch.tensor(clip), torch.tensor(ent))

    def memory(self, draw: torch.Generator) -> dict[str, Any]:
        """Columns of agents that remember."""
        return {}


class RecurrentPPOUpdates(PPOUpdates):
    """Of sequences of up to five steps, each time others."""

    def make_agent(self, sizes: tuple[int, ...]) -> Any:
        return RecurrentPPOAgent(vectors(OBS), Discrete(4), rnn_hidden_size=4, hidden_sizes=sizes)

    def memory(self, draw: torch.Generator) -> dict[str, Any]:
        dones = torch.rand(BATCH, 1, generator=draw) < 0.3
        layout, size = Sequences(dones, 5).in_order(), self.agent.memory_size
        return {"layout": layout, "states": torch.randn(BATCH, size, generator=draw), "previous": torch.empty(BATCH, 0)}


class SACUpdates(Updates):
    """Of critics and then of the actor, as one function."""

    script: Any = sac

    def __init__(self, **settings: Any) -> None:
        super().__init__(SACArgs(**{"policy_lr": RATE, "q_lr": RATE} | settings))
        self.learner = sac.setup(self.run, self.make_agent())
        self.run._modules.append(self.learner.agent)  # as `restore` does; the targets are in it
        self.step = self.run.compiled(self.function)

    def make_agent(self) -> SACAgent:
        return SACAgent(Box(-1, 1, (OBS,)), ACTIONS, (8,))

    def function(self, batch: Batch, noise: Tensor, moves_targets: bool) -> Tensor:
        critics = sac.update_critics(self.run, self.learner, batch, noise[0], moves_targets)
        return torch.cat((critics, sac.update_actor(self.run, self.learner, batch.obs, noise[1])))

    def batch(self, number: int) -> tuple[Batch, Tensor]:
        draw = rng(number)
        columns = {name: torch.randn(BATCH, OBS, generator=draw) for name in ("obs", "next_obs")}
        columns |= {
            "actions": 2 * torch.rand(BATCH, ACTIONS, generator=draw) - 1,
            "discounts": torch.full((BATCH,), 0.9),
        }
        columns |= {"rewards": torch.randn(BATCH, generator=draw)}
        columns["terminated"] = (torch.rand(BATCH, generator=draw) < 0.3).float()
        return Batch(**columns), torch.randn(2, BATCH, ACTIONS, generator=draw)

    def update(self, number: int) -> Tensor:
        return self.step(*self.batch(number), True)


class DroQUpdates(SACUpdates):
    def __init__(self, **settings: Any) -> None:
        Updates.__init__(self, DroQArgs(policy_lr=RATE, q_lr=RATE, **settings))
        self.learner = sac.setup(self.run, self.make_agent())
        self.run._modules.append(self.learner.agent)
        self.step = self.run.compiled(self.function)

    def make_agent(self) -> DroQAgent:
        return DroQAgent(Box(-1, 1, (OBS,)), ACTIONS, (8, 6), dropout=0.2, layer_norm=True)

    def function(self, batch: Batch, noise: Tensor, kept: list[list[Tensor]]) -> Tensor:  # type: ignore[override]
        critics = droq.update_critics(self.run, self.learner, batch, noise[0], kept[0], kept[1])
        return torch.cat((critics, droq.update_actor(self.run, self.learner, batch.obs, noise[1], kept[2])))

    def update(self, number: int) -> Tensor:
        return self.step(*self.batch(number), self.learner.agent.dropout_masks(3, BATCH, rng(number)))


UPDATES: dict[str, type[Any]] = {"ppo": PPOUpdates, "sac": SACUpdates, "droq": DroQUpdates}
EACH = pytest.mark.parametrize("kind", UPDATES)


# --- The modes


def capturing(updates: Any) -> Any:
    """The same, whose updates are captured."""
    run = updates.run
    run.runner = Runner(False, True, run._modules, run._optimizers, [run.train_rng])
    updates.step = run.captured(updates.function)
    return updates


# --- The modes agree


@contextlib.contextmanager
def spelled(mode: str) -> Iterator[None]:
    """The operations of this mode: where it is traced, Adam is written in elementary ones."""
    with recording() if mode == "traced" else contextlib.nullcontext():
        yield


MODES: dict[str, Callable[[type[Any]], Any]] = {
    "traced": lambda kind: kind(compile=True),
    "captured": lambda kind: capturing(kind()),
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, traced: None, graphs: None) -> str:
    return request.param


@EACH
def test_recorded_updates_are_those_that_run_as_they_are_to_the_last_bit(kind: str, mode: str) -> None:
    plain, recorded = UPDATES[kind](), MODES[mode](UPDATES[kind])
    for number in range(20):
        with spelled(mode):
            expected = plain.update(number)
        assert torch.equal(recorded.update(number), expected)
        for ours, theirs in zip(recorded.tensors(), plain.tensors(), strict=True):
            assert torch.equal(ours, theirs), number
    assert recorded.run.runner.recordings == 1


@EACH
def test_restored_parameters_and_moments_are_those_that_a_recorded_update_goes_on_from(kind: str, mode: str) -> None:
    recorded, found = MODES[mode](UPDATES[kind]), []
    recorded.update(0)
    state = recorded.state()
    for _ in range(2):
        recorded.restore(state)
        found.append([*(recorded.update(number) for number in range(1, 6)), *recorded.state()])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_rates_and_coefficients_take_effect_in_what_is_recorded(mode: str) -> None:
    updates = MODES[mode](PPOUpdates)
    updates.update(0)
    assert_coefficients_take_effect(updates)


def assert_coefficients_take_effect(updates: PPOUpdates) -> None:
    before, recordings = updates.state(), updates.run.runner.recordings
    after = {}
    for name, changes in {"as it is": {}, "rate": {"rate": 0.0}, "clip": {"clip": 0.02}, "ent": {"ent": 5.0}}.items():
        updates.restore(before)
        metrics = updates.update(1, **changes)
        after[name] = updates.optimizer.flat.vector.clone(), metrics
    assert torch.equal(after["rate"][0], before[0])
    for name in ("clip", "ent"):
        assert not torch.equal(after[name][0], after["as it is"][0]), name
    clipfrac = ppo.METRICS.index("losses/clipfrac")
    assert after["clip"][1][clipfrac] > after["as it is"][1][clipfrac]
    assert updates.run.runner.recordings == recordings


def test_a_branch_is_a_variant_of_its_own(mode: str) -> None:
    plain, recorded = SACUpdates(), MODES[mode](SACUpdates)
    for number in range(8):
        with spelled(mode):
            plain.step(*plain.batch(number), number % 3 == 0)
        recorded.step(*recorded.batch(number), number % 3 == 0)
        for ours, theirs in zip(recorded.tensors(), plain.tensors(), strict=True):
            assert torch.equal(ours, theirs), number
    assert recorded.run.runner.recordings == 2


def test_an_epoch_of_compiled_minibatches_is_captured_as_one(traced: None, graphs: None) -> None:
    plain, recorded = PPOUpdates(), PPOUpdates(compile=True)
    run = recorded.run
    run.runner = Runner(True, True, run._modules, run._optimizers, [run.train_rng])
    recorded.step = run.compiled(recorded.function)
    data = Batch(
        obs=torch.randn(32, OBS), actions=torch.randint(4, (32, 1)), valid=(torch.rand(32) < 0.8).float(),
        **{name: torch.randn(32) for name in ("advantages", "values", "returns")}, logprobs=torch.full((32,), -1.4),
    )  # fmt: skip

    def train(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def epoch(data: Batch, rows: Batch, *coefs: Tensor) -> Tensor:
            return torch.stack([step(batch, *coefs) for batch in minibatches(data, rows, True)])

        return epoch

    coefs, captured = (torch.tensor(0.2), torch.tensor(0.01)), run.captured(train(recorded.step))
    for rows in shuffled(SINGLE, data, 6, 4, rng(1)):
        with recording():
            expected = train(plain.step)(data, rows, *coefs)
        assert torch.equal(captured(data, rows, *coefs), expected)
    assert torch.equal(recorded.optimizer.flat.vector, plain.optimizer.flat.vector)
    assert run.runner.recordings == 2  # a minibatch, and an epoch of them


# --- What is recorded, and what is refused


def runner(network: nn.Module, optimizer: Adam, mode: str) -> tuple[Runner, Callable[..., Any]]:
    made = Runner(mode == "traced", mode == "captured", [network], [optimizer])
    return made, made.compiled if mode == "traced" else made.captured


BACK = ["lr", "lr", "l", "lr", "l", "lr"]  # the same kind of step once before and once after they differ


@pytest.mark.parametrize("uses", [SOMETIMES, LATE, IN_TURN, BACK], ids=["sometimes", "late", "in turn", "back"])
def test_a_head_that_only_some_steps_use_moves_at_those(uses: list[str], mode: str) -> None:
    networks, optimizers, steps = [], [], []
    for _ in range(2):
        torch.manual_seed(0)
        network = Heads()
        optimizer = Adam(network.parameters(), RATE)

        def step(x: Tensor, left: bool, right: bool, network: Heads = network, optimizer: Adam = optimizer) -> Tensor:
            features = network.body(x).tanh()
            used = [*([network.left] * left), *([network.right] * right)]
            loss = torch.stack([head(features).square().sum() for head in used]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.clip_gradient(0.5)
            optimizer.step()
            return loss.detach()

        networks.append(network)
        optimizers.append(optimizer)
        steps.append(step)
    made, record = runner(networks[1], optimizers[1], mode)
    recorded = record(steps[1])
    for number, heads in enumerate(uses):
        x = torch.randn(5, 3, generator=rng(number))
        with spelled(mode):
            expected = steps[0](x, "l" in heads, "r" in heads)
        assert torch.equal(recorded(x, "l" in heads, "r" in heads), expected)
        for ours, theirs in zip(optimizers[1].tensors(), optimizers[0].tensors(), strict=True):
            assert torch.equal(ours, theirs), number
    # One for each kind of step, and one for each that came before they differed
    assert made.recordings <= (4 if uses is BACK else 3)


def test_a_number_that_is_no_integer_is_refused(mode: str) -> None:
    updates = MODES[mode](PPOUpdates)
    with pytest.raises(TypeError, match="takes tensors in place of numbers"):
        updates.step(Batch(obs=torch.zeros(2, OBS)), 0.2, torch.tensor(0.0))
    assert updates.run.runner.recordings == 0


def test_results_are_put_together_as_the_function_does_and_are_not_written_over(mode: str) -> None:
    network = nn.Linear(2, 2)
    _, record = runner(network, Adam(network.parameters(), RATE), mode)
    recorded = record(lambda batch, count: {"sum": batch.a + batch.b, "many": [batch.a * count] * 2})
    first = recorded(Batch(a=torch.ones(2), b=torch.zeros(2)), 3)
    second = recorded(Batch(a=torch.full((2,), 5.0), b=torch.ones(2)), 3)
    assert [first["sum"].tolist(), [x.tolist() for x in first["many"]]] == [[1, 1], [[3, 3], [3, 3]]]
    assert [second["sum"].tolist(), [x.tolist() for x in second["many"]]] == [[6, 6], [[15, 15], [15, 15]]]
    assert recorded(Batch(a=torch.ones(2), b=torch.zeros(2)), 4)["many"][0].tolist() == [4, 4]  # another integer
    assert recorded(Batch(a=torch.ones(3), b=torch.zeros(3)), 4)["sum"].shape == (3,)  # another shape


def test_inputs_are_left_alone(mode: str) -> None:
    updates = MODES[mode](PPOUpdates)
    updates.update(0)
    x = torch.randn(BATCH, OBS)
    given = x.clone()
    network = nn.Linear(OBS, 2)
    _, record = runner(network, Adam(network.parameters(), RATE), mode)
    recorded = record(lambda x: x * 2)
    for _ in range(3):
        recorded(x)
    assert torch.equal(x, given)


def test_the_graph_that_stands_in_notices_what_goes_stale_and_what_asks_for_a_value(graphs: None) -> None:
    network, scale = nn.Linear(1, 1), [2.0]
    _, record = runner(network, Adam(network.parameters(), RATE), "captured")
    recorded = record(lambda x: x * scale[0])
    assert recorded(torch.ones(1)).item() == 2.0
    scale[0] = 3.0
    assert recorded(torch.full((1,), 5.0)).item() == 10.0  # the number that was there when it was captured
    with pytest.raises(RuntimeError, match="not permitted"):
        record(lambda x: x * x.sum().item())(torch.ones(1))


def test_a_parameter_of_two_optimizers_is_refused_rather_than_moved_where_nobody_looks() -> None:
    module = nn.Linear(2, 1)
    optimizers = [Adam(module.parameters(), RATE), Adam(module.parameters(), RATE)]
    with (
        pytest.raises(ConfigError, match="belongs to two optimizers"),
        Runner(True, False, [module], optimizers).restoring_state(),
    ):
        pass


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    updates = PPOUpdates()
    assert not updates.run.needs_warmup
    assert updates.step == updates.function
    assert updates.run.captured(updates.function) == updates.function
    assert updates.run.coefs(0.2, 0.1) == (0.2, 0.1)
    numbers = PPOUpdates(compile=True).run.coefs(0.2, 0.1)
    assert all(isinstance(number, Tensor) and number.shape == () for number in numbers)
    assert torch.stack(numbers).tolist() == pytest.approx([0.2, 0.1])


# --- The warm-up


@EACH
@pytest.mark.parametrize("fails", [False, True])
def test_a_warmup_leaves_no_trace(kind: str, fails: bool) -> None:
    updates = UPDATES[kind]()
    statistics = nn.BatchNorm1d(OBS)  # buffers
    updates.run._modules.append(statistics)
    for number in range(2):
        updates.update(number)
    before, branches, default = updates.state(), updates.run.runner.branches, torch.get_rng_state()
    generator = updates.run.train_rng.get_state()
    with contextlib.suppress(ZeroDivisionError), updates.run.warmup():
        statistics(torch.randn(4, OBS))
        torch.rand(3, generator=updates.run.train_rng)
        updates.update(2)
        assert not torch.equal(updates.tensors()[0], before[0])
        updates.run._optimizers[0].flat.equal_steps = False
        if fails:
            1 / 0  # noqa: B018
    assert updates.run.runner.branches == branches
    for tensor, value in zip(updates.tensors(), before, strict=True):
        assert torch.equal(tensor, value)
    assert torch.equal(updates.run.train_rng.get_state(), generator)
    assert torch.equal(torch.get_rng_state(), default)
    assert all(p.grad is None for optimizer in updates.run._optimizers for p in optimizer.flat.parameters)


def test_recording_leaves_no_trace_but_that_of_the_one_update(mode: str) -> None:
    """Three warm-ups and a capture, or a trace, are as if they had not been: the first call makes one update."""
    plain, recorded = SACUpdates(), MODES[mode](SACUpdates)
    state = recorded.run.train_rng.get_state()
    with spelled(mode):
        expected = plain.update(0)
    assert torch.equal(recorded.update(0), expected)
    for ours, theirs in zip(recorded.tensors(), plain.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(recorded.run.train_rng.get_state(), state)


# --- Compiled


@pytest.mark.parametrize("kind", [*UPDATES, "ppo_recurrent"])
def test_compiled_updates_agree_with_those_that_run_as_they_are(kind: str) -> None:
    """To float error over 20 updates; to the last bit with themselves; and nothing is compiled a second time."""
    updates = RecurrentPPOUpdates if kind == "ppo_recurrent" else UPDATES[kind]
    plain, compiled = updates(), updates(compile=True)
    before, found = compiled.state(), []
    for _ in range(2):
        compiled.restore(before)
        found.append([*(compiled.update(number) for number in range(20)), *compiled.state()])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    expected = [*(plain.update(number) for number in range(20)), *plain.state()]
    for ours, theirs in zip(found[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(compiled.tensors()[0], before[0], atol=RATE)  # they have learned something
    if kind == "ppo":
        assert_coefficients_take_effect(compiled)
    assert compiled.run.runner.recordings == 1


# --- Ranks


def compiled_on(rank: int, port: int, path: str) -> None:
    """Three compiled updates on this rank's half of each batch; writes what comes out of them."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.set_num_threads(1)
    updates = PPOUpdates(rank, 2, fabric, (), compile=True)  # linear: less to compile
    metrics = [updates.update(number) for number in range(3)]
    assert updates.run.runner.recordings == 1
    torch.save({"metrics": torch.stack(metrics), "vector": updates.optimizer.flat.vector}, f"{path}.{rank}")


def test_two_ranks_average_inside_the_compiled_update(tmp_path: Path) -> None:
    path, port = str(tmp_path / "rank"), free_port()
    ranks = [FORKSERVER.Process(target=compiled_on, args=(rank, port, path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    alone = PPOUpdates(sizes=())
    metrics = torch.stack([alone.update(number) for number in range(3)])
    for rank in ranks:
        rank.join(2 * LIMIT)
        rank.kill()
        assert rank.exitcode == 0
    first, second = load(f"{path}.0"), load(f"{path}.1")
    for name, expected in (("metrics", metrics), ("vector", alone.optimizer.flat.vector)):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)


# --- Runs

ON_POLICY = ["--env-id", "CartPole-v1", "--num-envs", 2, "--num-steps", 16, "--total-timesteps", 192]
OFF_POLICY = [
    "--env-id", "Pendulum-v1", "--num-envs", 2, "--learning-starts", 32, "--batch-size", 16, "--total-timesteps", 96,
    "--num-threads", 1, "--norm-obs",
]  # fmt: skip
RUNS: dict[str, tuple[Callable[[], int], list[Any]]] = {
    "ppo": (
        ppo.main,
        [*ON_POLICY, "--anneal-clip", "--anneal-ent", "--target-kl", 0.01, "--norm-obs", "--norm-reward"],
    ),
    "ppo, skips": (ppo.main, [*ON_POLICY, "--vectorization", "native", "--num-minibatches", 2]),
    "ppo_recurrent": (ppo_recurrent.main, [*ON_POLICY, "--sequence-length", 5, "--prev-action", "--anneal-clip"]),
    "ppo_recurrent, skips": (ppo_recurrent.main, [*ON_POLICY, "--vectorization", "native", "--num-minibatches", 2]),
    "sac": (sac.main, OFF_POLICY),
    "sac, rare targets": (sac.main, [*OFF_POLICY, "--policy-frequency", 2, "--target-network-frequency", 5]),
    "sac, rare actor": (sac.main, [*OFF_POLICY, "--policy-frequency", 5, "--target-network-frequency", 2]),
    "droq": (droq.main, [*OFF_POLICY, "--replay-ratio", 1.5]),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_records_nothing_after_its_start(
    name: str, train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags = RUNS[name]
    runs: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append((run, run.runner.recordings)) or reset(run))
    first = train(main, *flags, "--hidden-sizes", 8, "--compile", "--checkpoint-every", 64)
    resumed = train(main, "--resume", sorted(first.folder.glob("checkpoints/step*"))[0], "--log-dir", tmp_path / "more")
    assert first.code == resumed.code == 0
    for run, at_start in runs:
        assert run.runner.recordings == at_start > 0


# Episodes of 8 steps: they end where iterations and checkpoints do
ENDING = ["--env-id", "tests.envs:Deterministic-v0", "--env-kwargs", '{"continuous": true, "truncate": true}']
STRAIGHT: dict[str, Callable[[], int]] = {
    "ppo": ppo.main, "ppo_recurrent": ppo_recurrent.main, "sac": sac.main, "droq": droq.main,
}  # fmt: skip


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("algo", STRAIGHT)
def test_a_compiled_run_is_the_same_again_and_the_same_resumed(
    algo: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    flags = OFF_POLICY if algo in ("sac", "droq") else [*ON_POLICY, "--norm-reward"]
    line = [*flags, *ENDING, "--hidden-sizes", 8, "--compile", "--checkpoint-every", 32, "--keep-checkpoints", 9]
    straight, again = (train(STRAIGHT[algo], *line, "--log-dir", tmp_path / name) for name in ("first", "second"))
    assert torch.equal(straight.weights, again.weights)
    half = straight.folder / "checkpoints" / f"step_{64:012d}.ckpt"
    resumed = train(STRAIGHT[algo], "--resume", half, "--log-dir", tmp_path / "more")
    assert torch.equal(straight.weights, resumed.weights)
    assert not torch.equal(load(half)["agent"]["actor.out.bias"], straight.state["agent"]["actor.out.bias"])


# --- Runs on several ranks


def note_iterations(rank: int) -> None:
    """Notes what this rank has learned by the start of each iteration, and how many messages it has sent by then."""
    iterations, states, sent = Run.iterations, [], []
    path = Path(os.environ["NOTES"]).with_suffix(f".{rank}")

    def watched(run: Run, steps: int) -> Iterator[int]:
        def note() -> None:
            tensors = [tensor for optimizer in run._optimizers for tensor in optimizer.tensors()]
            tensors += [t for module in run._modules for t in (*module.parameters(), *module.buffers())]
            states.append(torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]))
            sent.append(torch.distributed.group.WORLD._get_sequence_number_for_group())  # counted by Gloo itself
            torch.save({"states": states, "sent": sent, "recordings": run.runner.recordings}, path)

        for step in iterations(run, steps):
            note()
            yield step
        note()

    Run.iterations = watched  # type: ignore[method-assign]


def note_traced(rank: int) -> None:
    note_iterations(rank)
    inspect.unwrap(traced)(pytest.MonkeyPatch())


def note_captured(rank: int) -> None:
    note_iterations(rank)
    patch = pytest.MonkeyPatch()
    inspect.unwrap(captured)(inspect.unwrap(graphs)(patch), patch)
    patch.setattr("fabricrl.utils.ranks.is_recording", lambda: True)  # a sum is one operation, which waits for its end
    torch._C._set_mkldnn_enabled(False)  # whose kernel for sequences returns other things without a gradient


ON_RANKS: dict[str, tuple[Callable[[int], None], list[str]]] = {
    "as it is": (note_iterations, []),
    "compiled": (note_traced, ["--compile"]),
    "captured": (note_captured, []),
}
SMALL: list[Any] = [*ENDING, "--num-envs", 2, "--hidden-sizes", 8, "--num-threads", 1, "--log-every", 10**6]
ROLLOUTS: list[Any] = [*SMALL, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 4]
ROLLOUTS += ["--total-timesteps", 320]  # in 5 iterations
STEPS: list[Any] = [*SMALL, "--learning-starts", 16, "--batch-size", 8, "--replay-ratio", 0.5]
STEPS += ["--total-timesteps", 40]  # in 10 iterations, of which the first 4 learn nothing
# What a rank sends in an iteration, by docs/scale.md. On-policy: 8 gradients, the moments of advantages, and four small
# messages. SAC: the gradients of two updates of critics and actor, and a small one; DroQ's actor has one for each step
SENT: dict[str, tuple[list[Any], int]] = {
    "ppo": (ROLLOUTS, 8 + 1 + 4),
    "ppo_recurrent": ([*ROLLOUTS, "--norm-obs"], 8 + 1 + 4 + 1),  # what was observed
    "sac": (STEPS, 2 + 2 + 1),
    "droq": (STEPS, 2 + 4 + 1),
}


@pytest.mark.parametrize("mode", ON_RANKS)
@pytest.mark.parametrize("algo", SENT)
def test_ranks_stay_equal_to_the_bit_by_one_message_for_each_optimizer_step(
    algo: str, mode: str, tmp_path: Path
) -> None:
    (prepare, more), (flags, sent) = ON_RANKS[mode], SENT[algo]
    line = [*flags, *more, "--log-dir", tmp_path / "logs"]
    variables = {"NOTES": str(tmp_path / "notes")}
    run_team(f"fabricrl.algos.{algo}.{algo}", *line, folder=tmp_path, prepare=prepare, variables=variables)
    ranks = [load(tmp_path / f"notes.{rank}") for rank in (0, 1)]
    for first, second in zip(*(rank["states"] for rank in ranks), strict=True):
        assert torch.equal(first, second)
    for rank in ranks:
        counts = [after - before for before, after in itertools.pairwise(rank["sent"])]
        assert counts[-4:-1] == [sent] * 3  # the first one looks around, and the last one logs
        assert not any(torch.equal(*pair) for pair in itertools.pairwise(rank["states"][-5:-1]))
        assert (rank["recordings"] > 0) == (mode != "as it is")
