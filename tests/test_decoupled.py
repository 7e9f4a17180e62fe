"""Parts of decoupled scripts: packets, messages between ranks, groups of ranks, and commands to them."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.algos import run as run_module
from fabricrl.algos.decoupled import Messages, Player, Trainers
from fabricrl.algos.decoupled import ranks as decoupled_ranks
from fabricrl.algos.decoupled.ranks import before_hello, reporting_failures
from fabricrl.algos.droq import droq_decoupled
from fabricrl.algos.off_policy import decoupled as off_policy
from fabricrl.algos.off_policy import replay as replay_module
from fabricrl.algos.ppo import ppo_decoupled
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent_decoupled
from fabricrl.algos.ppo_recurrent.args import RecurrentPPODecoupledArgs
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac_decoupled
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, NewestSteps, ReplayBuffer, StackedFrames
from fabricrl.utils import ranks as ranks_module
from fabricrl.utils.decoupled import (
    ABORT,
    PLAYER,
    SAVE,
    STOP,
    TRAIN,
    Answer,
    Channel,
    EndedByPeerError,
    Group,
    Hello,
    Order,
    Packet,
    Ready,
    Rows,
    State,
    add_acting_generators,
    make_groups,
    player_device,
    tag,
)
from fabricrl.utils.ending import failing_together
from fabricrl.utils.errors import CheckpointError, ConfigError, LostPeerError, NonFiniteError, RunError
from fabricrl.utils.metric import MeanMetrics, Stopwatch
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.optimizer import Adam, average_gradients
from fabricrl.utils.ranks import all_gather, all_max, mean_over_ranks
from fabricrl.utils.seeding import generators
from fabricrl.utils.signals import StopSignal
from tests.conftest import BareRun, on_ranks
from tests.envs import vectors
from tests.process import FORKSERVER, LIMIT, call, free_port, load

SCRIPTS: dict[str, Any] = {"ppo": ppo_decoupled, "ppo_recurrent": ppo_recurrent_decoupled}
SCRIPTS |= {"sac": sac_decoupled, "droq": droq_decoupled}

# --- Packets


class Inner(NamedTuple):
    flags: Tensor
    number: int


class Outer(NamedTuple):
    """Everything that a record may have."""

    inner: Inner
    rate: float
    due: bool
    table: Tensor | None
    batch: Batch
    parts: dict[str, Tensor]
    more: list[Tensor]


def record(number: int = 0, rate: float = 0.0, due: bool = False, table: Tensor | None = None) -> Outer:
    inner = Inner(torch.tensor([True, False, number > 0]), number)
    batch = Batch(actions=torch.arange(5)[:, None], none=torch.zeros(0, 4))
    parts, more = {"count": torch.tensor(3.0)}, [torch.arange(250, 257).to(torch.uint8), torch.ones(2)]
    return Outer(inner, rate, due, table, batch, parts, more)


DECLARED = record(table=torch.zeros(2, 3))


def test_fields_filled_in_on_one_side_arrive_on_the_other() -> None:
    sent, received = Packet(DECLARED), Packet(DECLARED)
    sent.fill(record(-(2**62), 1 / 3, True, torch.arange(6.0).view(2, 3)))
    received.buffer.copy_(sent.buffer)
    found = received.read()
    assert (found.inner.number, found.rate, found.due) == (-(2**62), 1 / 3, True)  # all 64 bits
    assert (type(found), type(found.inner), type(found.due)) == (Outer, Inner, bool)
    assert found.inner.flags.tolist() == [True, False, False]
    assert found.table.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.batch.actions.tolist() == [[0], [1], [2], [3], [4]]
    assert found.batch.none.shape == (0, 4)
    assert found.parts["count"].shape == ()
    assert found.more[0].tolist() == [250, 251, 252, 253, 254, 255, 0]


def test_none_arrives_as_none_and_the_next_record_is_whole_again() -> None:
    packet = Packet(DECLARED)
    assert packet.fill(record(table=None)).read().table is None
    assert packet.fill(record(table=torch.ones(2, 3))).read().table.sum() == 6


@pytest.mark.parametrize(
    "other",
    [
        record(table=torch.zeros(3, 2)),
        record()._replace(batch=Batch(none=torch.zeros(0, 4))),
        record()._replace(parts={}),
    ],
)
def test_a_record_with_other_fields_or_shapes_than_declared_is_a_defect(other: Outer) -> None:
    with pytest.raises(AssertionError, match="Outer"):
        Packet(DECLARED).fill(other)


def test_fields_do_not_overlap_and_lie_where_their_type_can_be_read() -> None:
    packet = Packet(DECLARED)
    begin = packet.buffer.data_ptr()
    places = []
    for tensor in packet.tensors:
        first = tensor.data_ptr() - begin if tensor.numel() else 0
        assert first % 8 == 0
        places.append((first, first + tensor.numel() * tensor.itemsize))
    for (_, end), (start, stop) in itertools.pairwise(sorted(place for place in places if place[0] < place[1])):
        assert end <= start < stop <= len(packet.buffer)
    needed = sum(tensor.numel() * tensor.itemsize for tensor in packet.tensors)
    assert len(packet.buffer) <= needed + 8 * (len(packet.tensors) + 2), "more travels than has to"


class Tail(NamedTuple):
    """A record that ends with rows."""

    number: int
    last: Rows


def test_rows_that_are_not_there_do_not_travel() -> None:
    declared = Tail(0, Rows(torch.zeros(4, 3)))
    sent, received = Packet(declared), Packet(declared)
    for count in (2, 0, 4, 1):
        rows = torch.arange(3.0 * count).view(count, 3) + 1
        sent.fill(Tail(count, Rows(rows)))
        assert len(sent.message) == 8 + 8 + 12 * count  # flags and number are as long as ever
        received.buffer.zero_()[: len(sent.message)] = sent.message
        found = received.read()
        assert found.number == count
        assert torch.equal(found.last.tensor[:count], rows)
        assert not found.last.tensor[count:].any()
    for rows in (torch.zeros(5, 3), torch.zeros(2, 4)):
        with pytest.raises(AssertionError, match="Tail"):
            sent.fill(Tail(0, Rows(rows)))


def test_filling_copies() -> None:
    """Messages are copies: they do not change with the tensors they were made from."""
    source = torch.ones(2, 3)
    packet = Packet(DECLARED).fill(record(table=source))
    source += 1
    assert packet.read().table.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_shares_are_the_rollout_each_row_once_as_it_is_seen() -> None:
    frames, places = torch.arange(20.0).view(10, 2), torch.randint(10, (9, 4))
    rows = Batch(obs=StackedFrames(frames, places), advantages=torch.arange(9.0), valid=None)
    shares = [rows[rank::3] for rank in range(3)]
    assert [share.advantages.tolist() for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert torch.equal(shares[1].obs, frames[places[1::3]])  # frames put together
    assert shares[1].valid is None


def test_a_packet_is_used_again_only_after_all_that_may_be_on_their_way() -> None:
    """With lag K, K + 1 iterations may be on their way, each with a packet for every trainer."""
    for count, max_lag in itertools.product((1, 3), (0, 2)):
        trainers, _ = watched(count, max_lag=max_lag)
        packets = [trainers._orders[False].pack(Order(TRAIN, 0, 0, 0, True, True, False, Data(0))) for _ in range(100)]
        again = packets[1:].index(packets[0]) + 1
        assert again > count * (max_lag + 1)
        assert len({packet.buffer.data_ptr() for packet in packets[:again]}) == again


def test_messages_travel_under_different_tags() -> None:
    assert len({tag(kind.__name__) for kind in (Hello, Ready, Order, Answer, State)}) == 5
    assert all(0 <= tag(kind.__name__) < 2**31 for kind in (Hello, Ready, Order, Answer, State))


# --- Both ends, with a channel that only notes


class Data(NamedTuple):
    row: int


class Bulk(NamedTuple):
    rows: Tensor


class Notes:
    """Stands for a channel; `answers` are what it receives."""

    def __init__(self, rank: int, count: int, answers: list[tuple[int | None, Any]]) -> None:
        self.rank, self.world_size, self.answers = rank, 1 + count, answers
        self.sent: list[tuple[str, int, int, Any]] = []
        self.flushed = 0

    def send(self, packet: Packet, to: int, iteration: int) -> None:
        sent = packet.read()
        self.sent.append((packet.name, to, iteration, sent._replace(folder=None) if packet.name == "Hello" else sent))

    def receive(self, packet: Packet, source: int, iteration: int) -> Any:
        assert source == (1 if self.rank == PLAYER else PLAYER)
        expected, answer = self.answers.pop(0)
        assert packet.name == type(answer).__name__
        assert expected in (None, iteration)
        return packet.fill(answer).read()

    def lap(self) -> tuple[float, float]:
        return 0.5, 2.0

    def flush(self) -> None:
        self.flushed += 1


def some_run(max_lag: int = 2, rank: int = 0) -> Any:
    """Stands for the run that the two ends drive."""
    args = SimpleNamespace(max_lag=max_lag, seed=1, players=1, weights_precision="fp32")
    run = SimpleNamespace(args=args, folder=Path("/runs/ünique"), exit_code=0)
    run.fabric = SimpleNamespace(world_size=1, global_rank=rank)
    run.losses, run.clock, run.charts, run.global_step = MeanMetrics(), Stopwatch("train"), {}, 64
    run.is_last = run.checkpoint_is_due = run.log_is_due = run.evaluation_is_due = False
    run.skips = run.needs_warmup = False
    run.restore_generators, run.failing_together = lambda: None, contextlib.nullcontext
    return run


def some_messages(most: int = 1) -> Messages:
    torch.manual_seed(3)
    agent = torch.nn.Linear(1, 1)
    bulk = Bulk(torch.zeros(most)) if most > 1 else None
    optimizer = Adam(agent.parameters(), 1e-3)
    return Messages(Data(0), ("losses/a", "losses/b"), agent, optimizer, bulk=bulk, max_iterations=most)


def answered(iteration: int, weight: float = 0.0, **fields: Any) -> tuple[int, Answer]:
    return iteration, Answer(0, 0, 0.0, 1.0, None, torch.full((2,), weight))._replace(**fields)


def watched(count: int, *answers: tuple[int, Answer], max_lag: int = 2, most: int = 1) -> tuple[Trainers, Notes]:
    notes = Notes(PLAYER, count, [(0, Ready()), *answers])
    trainers = Trainers(some_run(max_lag), notes)  # type: ignore[arg-type]
    trainers.begin(some_messages(most))
    return trainers, notes


def shares(count: int, row: int) -> list[Data]:
    return [Data(row + i) for i in range(count)]


def test_each_trainer_is_sent_its_share_and_all_the_same_order() -> None:
    trainers, notes = watched(2, max_lag=9)
    assert [(name, to, sent.command) for name, to, _, sent in notes.sent] == [("Hello", 1, TRAIN), ("Hello", 2, TRAIN)]
    trainers.run.log_is_due = True
    trainers.train(shares(2, 10))
    trainers.run.log_is_due = False
    trainers.train(shares(2, 20), due=False)
    expected = [("Order", rank, i, Order(TRAIN, 0, i, 64, not i, not i, False, Data(10 * (i + 1) + rank - 1)))
                for i in (0, 1) for rank in (1, 2)]  # fmt: skip
    assert notes.sent[2:] == expected
    assert list(trainers.ahead) == [0]


def test_answers_are_taken_oldest_first_up_to_an_iteration() -> None:
    losses = torch.tensor([[6.0, 9.0], [3.0, 0.0]], dtype=torch.float64)
    answers = [answered(i, 100 + i, waited=0.25 * i, passed=2.0) for i in (0, 2, 3)]
    answers[1] = answered(2, 102, waited=0.5, passed=2.0, signal=143, losses=losses)
    trainers, notes = watched(1, *answers, max_lag=9)
    run, messages = trainers.run, trainers._messages
    trainers.train(shares(1, 0))
    trainers.train(shares(1, 0), due=False)  # nothing comes back
    trainers.train(shares(1, 0))
    trainers.train(shares(1, 0))
    trainers.collect(-1)
    assert messages is not None
    assert len(notes.answers) == 3
    trainers.collect(1)
    assert messages.weights.tolist() == [100, 100]
    assert (list(trainers.ahead), run.exit_code) == ([2, 3], 0)
    trainers.collect(3)
    assert messages.weights.tolist() == [103, 103]
    assert (list(trainers.ahead), run.exit_code) == ([], 143)
    assert run.losses.compute() == {"losses/a": 2.0}
    run.log_is_due, run.args.max_lag = True, 1
    notes.answers.append(answered(4))
    trainers.train(shares(1, 0))
    trainers.train(shares(1, 0))  # after whose rollout the one before is taken
    assert run.charts["charts/lag"] == 1
    assert list(trainers.ahead) == [5]


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_weights_are_as_old_as_the_lag_also_where_most_iterations_have_no_update(lag: int, bulk: bool) -> None:
    """The rollout of iteration i is played with all updates up to iteration i - lag - 1."""
    updates = range(0, 30, 10)
    trainers, _ = watched(1, *[answered(i, 100 + i) for i in updates], max_lag=lag, most=8)
    assert trainers._messages is not None
    expected = trainers._messages.weights[0].item()
    for i in range(30):
        expected = 100 + i - lag - 1 if i - lag - 1 in updates else expected
        assert trainers._messages.weights[0].item() == expected, i
        trainers.train([Bulk(torch.ones(8)) if trainers.bulk else Data(7)], due=i in updates, bulk=bulk)  # type: ignore[list-item]
    assert trainers._lag == lag


@pytest.mark.parametrize("due", ["is_last", "checkpoint_is_due", "evaluation_is_due"])
def test_the_newest_weights_are_waited_for_where_they_are_saved_or_evaluated(due: str) -> None:
    trainers, _ = watched(1, answered(0, 100), answered(1, 101), max_lag=9)
    trainers.train(shares(1, 0))
    assert list(trainers.ahead) == [0]
    setattr(trainers.run, due, True)
    trainers.train(shares(1, 0))
    assert trainers._messages is not None
    assert trainers._messages.weights.tolist() == [101, 101]
    assert not trainers.ahead


def test_data_that_may_wait_travels_with_what_follows_until_something_is_due_or_it_is_enough() -> None:
    trainers, notes = watched(1, max_lag=9, most=3)

    def train(bulk: bool, due: bool = False) -> None:
        trainers.train([Bulk(torch.ones(3)) if trainers.bulk else Data(7)], due=due, bulk=bulk)  # type: ignore[list-item]

    trainers.send([Data(1)], bulk=True)
    for _ in range(3):
        train(bulk=True)  # 1, 2, 3: enough
    train(bulk=True)  # 4
    trainers.run.log_is_due = True
    train(bulk=True)  # 5: the log
    trainers.run.log_is_due = False
    train(bulk=False)  # 6: no more
    train(bulk=False, due=True)  # 7
    sent = [sent for _, _, _, sent in notes.sent[1:]]
    assert [order.iteration for order in sent] == [0, 3, 5, 6, 7]
    assert [order.bulk for order in sent] == [True, True, True, False, False], "the next one is of another form"
    assert [type(order.data) for order in sent] == [Data, Bulk, Bulk, Bulk, Data]
    assert [order.answers for order in sent] == [False, False, True, False, True]
    trainers.report_failure(5)
    assert type(notes.sent[-1][3].data) is Data


def test_a_trainer_expects_the_form_that_the_order_before_has_announced() -> None:
    messages = some_messages(3)
    rows = Bulk(torch.arange(3.0))
    player, _ = obeying(
        hello(messages), order(row=1, bulk=True), order(bulk=True, data=rows), order(data=rows), order(STOP)
    )
    player.meet(messages)
    assert [type(each.data) for each in player.orders()] == [Data, Bulk, Bulk]


@pytest.mark.parametrize(("count", "most"), [(1, 5), (2, 5), (2, 64)])
def test_steps_that_travel_in_blocks_fill_replay_buffers_as_if_they_had_been_added_there(
    count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (off_policy, replay_module):
        monkeypatch.setattr(module, "BLOCK", most)
    rng, space, agent = np.random.default_rng(0), vectors(3), SimpleNamespace(obs_normalizer=None)
    run = SimpleNamespace(own_envs=slice(0, 4))
    newest, trainers = NewestSteps(most, 4, space, 2), SimpleNamespace(count=count, bulk=True, run=run)
    size = 4 // count
    whole, parts = ReplayBuffer(80, 4, space, 2), [ReplayBuffer(20 * size, size, space, 2) for _ in range(count)]

    def send() -> None:
        for part, steps in zip(parts, off_policy.divide(newest, agent, trainers), strict=True):  # type: ignore[arg-type]
            off_policy.store(part, agent, steps)

    start = rng.normal(size=(4, 3))
    whole.start(start)
    newest.start(start)
    send()
    for step in range(13):
        ended = rng.random((2, 4)) < 0.2
        obs, final_obs = rng.normal(size=(2, 4, 3))
        for rb in (whole, newest):
            rb.add(np.full((4, 2), step), obs, rng.random(4) * 0 + step, *ended, {"final_obs": final_obs})
        if newest.waiting == most or step in (6, 12):
            send()
    for number, part in enumerate(parts):
        envs = slice(number * size, (number + 1) * size)
        assert (part.size, part.position) == (13, 13)
        assert (part._records == whole._records[:, envs]).all()


def test_the_share_of_the_time_that_trainers_have_waited_is_logged_and_counted_anew() -> None:
    trainers, _ = watched(1, *[answered(i, waited=0.25 * i, passed=2.0) for i in range(4)], max_lag=0)
    trainers.run.log_is_due = False
    trainers.train(shares(1, 0))
    trainers.train(shares(1, 0))
    trainers.run.log_is_due = True
    trainers.train(shares(1, 0))
    assert trainers.run.charts == {"charts/lag": 0, "time/wait_trainer": pytest.approx(0.75 / 6)}
    trainers.train(shares(1, 0))
    assert trainers.run.charts["time/wait_trainer"] == pytest.approx(0.75 / 2)


def test_a_failed_update_ends_the_player_silently_with_the_code_of_the_trainer() -> None:
    trainers, _ = watched(1, answered(0, code=5), max_lag=0)
    with pytest.raises(RunError) as caught:
        trainers.train(shares(1, 0))
    assert (caught.value.exit_code, str(caught.value)) == (5, "")


def test_trainers_that_cannot_start_end_the_player_silently_with_their_code() -> None:
    notes = Notes(PLAYER, 1, [(0, Ready(6))])
    trainers = Trainers(some_run(), notes)  # type: ignore[arg-type]
    with pytest.raises(EndedByPeerError) as caught, reporting_failures(trainers):
        trainers.begin(some_messages())
    assert caught.value.exit_code == 6
    assert (len(notes.sent), notes.flushed) == (1, 0), "after Hello nobody listens any more"


@pytest.mark.parametrize("records", [False, True])
def test_a_player_warms_up_acting_while_trainers_warm_up_their_updates(records: bool) -> None:
    """Record after Hello and before waiting for Ready: all of it comes before the first rollout."""
    notes, run, warmed_up = Notes(PLAYER, 1, [(0, Ready(0))]), some_run(), []
    run.needs_warmup = records
    run.warmup = lambda: contextlib.nullcontext(warmed_up.append((len(notes.sent), len(notes.answers))))
    Trainers(run, notes).begin(some_messages())  # type: ignore[arg-type]
    assert warmed_up == [(1, 1)] * records


def test_the_last_order_goes_to_every_trainer_whether_they_have_begun_or_not() -> None:
    notes = Notes(PLAYER, 2, [])
    Trainers(some_run(), notes).report_failure(4)  # type: ignore[arg-type]
    assert notes.sent == [("Hello", rank, 0, Hello(ABORT, 4, 0, False, None)) for rank in (1, 2)]  # type: ignore[arg-type]
    trainers, notes = watched(2)
    trainers.run.exit_code = 143
    trainers.stop()
    assert [entry[:2] for entry in notes.sent[2:]] == [("Order", 1), ("Order", 2)]
    assert all((sent.command, sent.code) == (STOP, 143) for *_, sent in notes.sent[2:])
    assert notes.flushed == 1


def test_a_rank_that_fails_tells_its_peers_and_one_that_has_lost_them_does_not(capsys: pytest.CaptureFixture) -> None:
    told: list[int] = []
    end = SimpleNamespace(report_failure=told.append, iteration=3)
    with pytest.raises(EndedByPeerError) as caught, reporting_failures(end):
        raise NonFiniteError("it is NaN")
    assert (told, caught.value.exit_code, str(caught.value)) == ([5], 5, "")
    assert capsys.readouterr().err == "error: it is NaN\n"  # at once: the peers' end may end this process
    with pytest.raises(EndedByPeerError) as caught, reporting_failures(end):
        raise EndedByPeerError(6)
    assert (told, caught.value.exit_code) == ([5, 6], 6)
    with pytest.raises(LostPeerError), reporting_failures(end):
        raise LostPeerError("rank 1 is gone")
    with reporting_failures(end):
        pass
    assert told == [5, 6]
    assert not capsys.readouterr().err


def obeying(*orders: Any, rank: int = 0) -> tuple[Player, Notes]:
    notes = Notes(rank + 1, 2, [(None, order) for order in orders])
    return Player(some_run(rank=rank), notes), notes  # type: ignore[arg-type]


def hello(messages: Messages, command: int = TRAIN, code: int = 0, skips: bool = False) -> Hello:
    return Hello(command, code, int(parameter_hash(messages.agent)), skips)


def order(command: int = TRAIN, code: int = 0, row: int = 0, bulk: bool = False, data: Any = None) -> Order:
    return Order(command, code, 0, 0, True, False, bulk, data or Data(row))


def test_a_trainer_obeys_until_the_player_stops_and_the_first_one_speaks_for_all() -> None:
    for rank in (0, 1):
        messages = some_messages()
        player, notes = obeying(hello(messages), order(row=7), order(row=8), order(STOP, 143), rank=rank)
        player.meet(messages)
        rows = [each.data.row for each in player.orders(refill=True)]
        assert (rows, player.exit_code) == ([7, 8], 143)
        assert notes.sent == ([] if rank else [("Ready", PLAYER, 0, Ready(refill=True))])


def test_a_trainer_that_fails_says_so_once_and_waits_until_the_player_ends_it(capsys: pytest.CaptureFixture) -> None:
    messages = some_messages()
    player, notes = obeying(hello(messages), order(), order(), order(ABORT, 5))

    def fail() -> None:
        player.meet(messages)
        for _ in player.orders():
            raise NonFiniteError("it is NaN")

    with pytest.raises(EndedByPeerError), reporting_failures(player), before_hello(player):
        fail()
    (_, (name, to, iteration, answer)), left = notes.sent, notes.answers
    assert (name, to, iteration, answer.code, answer.losses) == ("Answer", PLAYER, 0, 5, None)
    assert left == []
    assert capsys.readouterr().err == "error: it is NaN\n"


def test_a_trainer_that_the_player_ends_says_nothing() -> None:
    messages = some_messages()
    player, notes = obeying(hello(messages), order(ABORT, 4))
    player.meet(messages)
    with pytest.raises(EndedByPeerError) as caught, reporting_failures(player), before_hello(player):
        list(player.orders())
    assert (caught.value.exit_code, [name for name, *_ in notes.sent]) == (4, ["Ready"])


def test_an_early_fault_of_a_trainer_is_told_by_the_player_if_it_has_the_same(capsys: pytest.CaptureFixture) -> None:
    player, notes = obeying(hello(some_messages(), ABORT, 3))
    with pytest.raises(EndedByPeerError) as caught, reporting_failures(player), before_hello(player):
        raise CheckpointError("there is none")
    assert (caught.value.exit_code, notes.sent, capsys.readouterr().err) == (3, [], "")
    player, notes = obeying(hello(some_messages()))  # the player has not
    with pytest.raises(EndedByPeerError), reporting_failures(player), before_hello(player):
        raise NonFiniteError("it is NaN")
    assert notes.sent == [("Ready", PLAYER, 0, Ready(5))]
    assert capsys.readouterr().err == "error: it is NaN\n"


def test_a_trainer_whose_parameters_are_others_than_the_players_does_not_begin() -> None:
    messages = some_messages()
    greeting = Hello(hash=int(parameter_hash(torch.nn.Linear(1, 1))))
    player, _ = obeying(greeting)
    with pytest.raises(RunError, match="different parameters"):
        player.meet(messages)


@pytest.mark.parametrize("other", [0, 1])
def test_all_trainers_end_if_one_of_them_starts_from_other_parameters(other: int) -> None:
    """As on nodes whose processors round differently; the first says so for all, and nobody waits for an Order."""
    declared = [some_messages(), some_messages()]

    def meet(fabric: Any) -> tuple[int, list[Any]]:
        rank = fabric.global_rank
        messages = declared[rank]
        player, notes = obeying(hello(messages), rank=rank)
        run = player.run
        run.team, run._signals = fabric, SimpleNamespace(code=0)  # type: ignore[assignment]
        run.failing_together = partial(Run.failing_together, run)  # type: ignore[method-assign]
        with torch.no_grad():
            messages.agent.bias.add_(1.0 * (rank == other))  # type: ignore[operator,union-attr]
        with pytest.raises(EndedByPeerError) as caught, reporting_failures(player, 1), before_hello(player):
            player.meet(messages)
        return caught.value.exit_code, notes.sent

    first, second = on_ranks(2, meet)
    assert first == (1, [("Ready", PLAYER, 0, Ready(1))])
    assert second == (1, [])


def test_a_trainer_learns_where_the_run_writes() -> None:
    trainers, notes = Trainers(some_run(), Notes(PLAYER, 1, [(0, Ready())])), []  # type: ignore[arg-type,var-annotated]
    trainers.channel.send = lambda packet, *_: notes.append(packet.read())  # type: ignore[method-assign,assignment]
    trainers.begin(some_messages())
    player, _ = obeying(notes[0])
    assert player.meet(some_messages()) == Path("/runs/ünique")


def test_a_checkpoint_has_an_order_of_its_own_and_that_of_an_iteration_does_not_save() -> None:
    """An evaluation decides after its iteration: until then nothing is saved, and nothing is sent for it."""
    state = State(torch.zeros(2, 2, *torch.get_rng_state().shape, dtype=torch.uint8), some_messages().learned)
    trainers, notes = watched(2, answered(0, 1.0), max_lag=3)
    run = trainers.run
    run.act_rng = torch.Generator()
    run.checkpoint_is_due = True  # or may be, as far as the iteration knows
    trainers.train(shares(2, 10))
    assert [(sent.command, sent.answers, sent.wants_losses) for *_, sent in notes.sent[2:]] == [(TRAIN, True, True)] * 2
    assert list(trainers.ahead) == [], "an evaluation is of the newest weights"
    notes.answers += [answered(0, 2.0, signal=143), (0, state)]
    trainers.save()
    assert [(to, sent.command, sent.step, sent.iteration) for _, to, _, sent in notes.sent[4:]] == [
        (1, SAVE, 64, 0),
        (2, SAVE, 64, 0),
    ]
    assert notes.answers == []
    assert run.generators.shape[:2] == (2, 3)
    assert (run.exit_code, trainers.iteration) == (143, 1)


@pytest.mark.parametrize("keeps", [True, False])
def test_trainers_save_their_buffers_and_the_first_sends_its_state_when_they_are_told_to(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[Any, ...]] = []
    monkeypatch.setattr("fabricrl.algos.decoupled.player.save_shard", lambda *given: saved.append(given))
    for rank in (0, 1):
        messages, rb = some_messages(), object()
        last = order(SAVE)._replace(step=640)
        player, notes = obeying(hello(messages), order(row=7), last, order(row=8), order(STOP), rank=rank)
        fabric = Fabric(accelerator="cpu", devices=1)
        run: Any = BareRun(PPOArgs(), fabric)
        run.fabric = SimpleNamespace(world_size=1, global_rank=rank, device=torch.device("cpu"))
        run.args = SimpleNamespace(max_lag=1, checkpoint_buffer=keeps, weights_precision="fp32")
        run.shard = lambda rb: {"shard of": rb}
        player.run = run
        player.meet(messages)
        assert [each.data.row for each in player.orders(rb)] == [7, 8], "an iteration more"  # type: ignore[arg-type]
        assert [name for name, *_ in notes.sent] == ([] if rank else ["Ready", "Answer", "State"])
        assert saved == ([(player.folder / "checkpoints", 640, rank, {"shard of": rb})] if keeps else [])
        saved.clear()


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("script", [ppo_decoupled, ppo_recurrent_decoupled])
def test_a_trainer_warms_up_with_data_of_the_form_that_will_come(
    script: Any, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another form would be compiled a second time, or captured, while the player waits."""
    args_class = PPODecoupledArgs if script is ppo_decoupled else RecurrentPPODecoupledArgs
    run: Any = BareRun(args_class(hidden_sizes=(8,)), action_space=Discrete(2))
    run.obs_space, run.mask_size = vectors(3), 0
    monkeypatch.setattr(BareRun, "needs_warmup", True)
    valid: list[Tensor | None] = []
    monkeypatch.setattr(script, "train", lambda run, update, data, *_: valid.append(data.valid))
    player = SimpleNamespace(count=1, skips=skips, meet=lambda messages: None, orders=lambda: iter(()))
    script.trainer(run.args, run, player)
    assert valid
    for each in valid:
        assert (each is None) != skips
        assert each is None or (each == 1).all()


def test_each_trainer_checks_the_memory_for_its_own_buffer_and_the_player_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[tuple[int, int]] = []
    monkeypatch.setattr(replay_module, "check_memory", lambda size, count, _: checked.append((size, count)))
    args = SACArgs(num_envs=4, buffer_size=1000, batch_size=8, learning_starts=100, total_timesteps=1000)

    def some(world_size: int, trainers: Any = None) -> Any:
        run: Any = BareRun(args, action_space=vectors(2))
        run.obs_space, run.trainers = vectors(3), trainers
        strategy = SimpleNamespace(num_nodes=1)
        run.fabric = SimpleNamespace(
            world_size=world_size, global_rank=0, device=torch.device("cpu"), strategy=strategy
        )
        run.failing_together = contextlib.nullcontext
        return run

    replay_module.make_buffer(some(1))
    whole, _ = checked.pop()
    replay_module.make_buffer(some(1, trainers=object()))
    assert checked == []
    assert off_policy.take_share_of_args(some(2)).buffer_size == 500
    assert checked == [(whole // 2, 2)]


def test_sums_that_overflow_are_looked_at_once() -> None:
    run = BareRun(PPOArgs())
    run.metrics.watch([torch.full((3,), 3e38)])
    assert not run.metrics.is_healthy()
    run.add_metrics(("losses/a",), torch.ones(1))
    assert run.metrics.fetch()["losses/a"].tolist() == [1]
    assert run.metrics.is_healthy()


def test_everything_that_training_changes_comes_back_for_a_checkpoint_and_weights_travel_once() -> None:
    def messages() -> Messages:
        agent = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1) for name in ("actor", "critic", "target")})
        actor, critic = (Adam(agent[name].parameters(), 0.1) for name in ("actor", "critic"))
        return Messages(Data(0), (), agent, actor, critic)

    here, there = messages(), messages()
    for name, optimizer in zip(("critic", "actor"), there.optimizers[::-1], strict=True):
        there.agent[name](torch.ones(1, 2)).sum().backward()  # type: ignore[index]
        optimizer.step()
    sizes = sum(tensor.numel() for tensor in there.learned)
    assert sizes + there.weights.numel() == 3 * 3 + 2 * (2 * 3 + 2), "something travels twice"
    state = Packet(here.state(1)).fill(State(torch.zeros(1, 2, 5056, dtype=torch.uint8), there.learned)).read()
    here.load(state.learned)
    here.weights.copy_(there.weights)
    assert parameter_hash(here.agent) == parameter_hash(there.agent)
    for own, other in zip(here.optimizers, there.optimizers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.tensors(), other.tensors(), strict=True))
        assert own.flat.steps.tolist() == [1, 1]


def test_weights_reach_a_policy_that_has_moved_since_its_optimizer_was_made() -> None:
    """As to a GPU, where it gets parameters of its own."""
    agent = torch.nn.Linear(1, 1)
    optimizer = Adam(agent.parameters(), 1e-3)
    messages = Messages(Data(0), (), agent.double(), optimizer)
    messages.weights.copy_(torch.tensor([5.0, 6.0]))
    assert (agent.weight.item(), agent.bias.item()) == (5, 6)


def test_a_trainer_does_not_ask_where_the_policy_acts_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    run = BareRun(PPOArgs())
    monkeypatch.setattr(run_module, "faster_device", lambda *_: pytest.fail("it has no environments"))
    run.fabric = SimpleNamespace(device=torch.device("cuda"))
    run.restore(agent=torch.nn.Linear(1, 1))


def test_generators_are_stored_as_the_coupled_script_stores_those_of_its_ranks() -> None:
    act, _ = generators(3, 0, 64)
    torch.rand(5, generator=act)
    trainers = [generators(3, rank, 64)[1] for rank in (0, 1)]
    states = torch.stack([torch.stack((rng.get_state(), torch.get_rng_state())) for rng in trainers])
    states[:, 1] = 7  # the trainers' own
    stored = add_acting_generators(states, act, 3, 64)
    assert stored.shape[:2] == (2, 3)
    assert torch.equal(stored[0, 0], act.get_state())
    assert torch.equal(stored[1, 0], generators(3, 1, 64)[0].get_state())
    for rank in (0, 1):
        assert torch.equal(stored[rank, 1], trainers[rank].get_state())
    assert torch.equal(stored[0, 2], torch.get_rng_state()), "environments draw from the player's"
    assert torch.equal(stored[1, 2], states[1, 1])


# --- Between processes


def ranks(task: Callable, world_size: int, path: Path, timeout: float = 1.0) -> list[Any]:
    """Results of `task(fabric, world, team, path)` on each forked rank, in rank order."""
    port = free_port()
    processes = [
        FORKSERVER.Process(target=work, args=(task, rank, world_size, port, path, timeout))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [load(path / f"{rank}.pt") for rank in range(world_size)]


def work(task: Callable, rank: int, world_size: int, port: int, path: Path, timeout: float) -> None:
    from lightning.fabric import Fabric

    # Fabric takes the place in the group that the environment names, and starts nothing itself
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp")
    fabric.launch()
    torch.set_num_threads(1)
    fabric.barrier()  # ranks may start far apart, for which the groups' time-out is no measure
    result = task(fabric, *make_groups(fabric, 1, timeout)[::2], path)
    torch.save(result, path / f"{rank}.pt")


class Big(NamedTuple):
    """4 MiB, more than sockets hold back."""

    number: int
    rows: Tensor = torch.zeros(1 << 20)


class Last(NamedTuple):
    """The same under another name."""

    number: int
    rows: Tensor = torch.zeros(1 << 20)


def exchange(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 0 sends more than its readers take at once; nobody reads before the sender has got so far."""
    channel = Channel(world, capacity=3)

    def when(done: str) -> None:
        while not (path / done).exists():
            time.sleep(0.01)
        time.sleep(0.5)

    if fabric.global_rank == 0:
        records = [kind(n, torch.full((1 << 20,), float(n))) for n, kind in enumerate((Big, Big, Last, Big))]
        packets = [Packet(record).fill(record) for record in records]
        for n in range(3):
            channel.send(packets[n], 1, n)
        times, since = [time.perf_counter()], channel._since
        (path / "sent").touch()
        channel.send(packets[3], 2, 3)  # waits for the first
        times.append(time.perf_counter())
        (path / "fourth").touch()
        channel.flush()
        times.append(time.perf_counter())
        (path / "flushed").touch()
        code = channel.receive(Packet(Ready()), 1, 0).code
        told = {"times": times, "code": code, "waited": channel.waited, "laps": [channel.lap(), channel.lap()]}
        return told | {"passed": channel._since - since}
    kinds = (Last, Big, Big) if fabric.global_rank == 1 else (Big,)
    when("sent" if fabric.global_rank == 1 else "fourth")
    received = []
    for kind in kinds:  # Last was sent last
        record = channel.receive(Packet(kind(0)), PLAYER, 0)
        received.append((kind.__name__, record.number, record.rows.unique().tolist()))
    if fabric.global_rank == 1:
        when("flushed")
        channel.send(Packet(Ready()).fill(Ready(17)), PLAYER, 0)
        channel.flush()
    return {"received": received, "rank": channel.rank, "world_size": channel.world_size}


def test_messages_arrive_whole_under_their_name_and_in_their_order_and_sending_does_not_wait(tmp_path: Path) -> None:
    player, first, second = ranks(exchange, 3, tmp_path)
    assert first["received"] == [("Last", 2, [2.0]), ("Big", 0, [0.0]), ("Big", 1, [1.0])]
    assert second["received"] == [("Big", 3, [3.0])]
    assert (first["rank"], first["world_size"]) == (1, 3)
    begin, fourth, flushed = player["times"]
    assert fourth - begin > 0.3, "more messages are on their way than capacity says"
    assert flushed - fourth > 0.3, "the last message had not been received"
    assert player["code"] == 17
    (waited, passed), (nothing, more) = player["laps"]
    assert 0 < waited == player["waited"] < passed
    assert nothing == 0
    assert passed + more == pytest.approx(player["passed"])  # since the lap before


def grouped(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """The player alone, the trainers as a world of their own."""
    rank = fabric.global_rank
    group = Group(fabric) if rank == PLAYER else Group(fabric, team)
    torch.manual_seed(7)
    module = torch.nn.Linear(3, 1)
    wrapped, optimizer = group.setup(module, Adam(module.parameters(), 1e-3))
    rows = torch.arange(12.0).view(4, 3)[2 * max(rank - 1, 0) :][:2] if rank else torch.arange(12.0).view(4, 3)
    group.backward(wrapped(rows).square().mean())
    metrics = average_gradients(group, optimizer, torch.tensor([float(rank)]))  # type: ignore[arg-type]
    with mock.patch.object(ranks_module, "FEW", 1):  # more ranks than that leave the sum to the collective
        row = torch.tensor([rank, 1.0])
        many = [mean_over_ranks(group, row), row] if rank != PLAYER else []  # type: ignore[arg-type]
    stop = StopSignal()
    stop.received = {0: 0, 1: 0, 2: 15}[rank]
    result = {
        "size": group.world_size, "rank": group.global_rank, "grad": optimizer.gradient, "metrics": metrics,
        "sum": group.all_reduce(torch.tensor([rank + 1.0])), "gathered": all_gather(group, torch.tensor(rank)),
        "max": all_max(group, rank), "stop": stop.exit_code(group), "device": str(group.device), "told": [],
        "many": many,
    }  # fmt: skip
    if rank == PLAYER:
        return result | {"broadcast": group.broadcast("path")}
    try:
        end = SimpleNamespace(report_failure=result["told"].append, iteration=0)
        with reporting_failures(end, 1), failing_together(group):
            if rank == 2:
                raise NonFiniteError("on rank 2 alone")
    except RunError as error:
        result |= {"code": error.exit_code, "text": str(error)}
    return result


def test_trainers_average_gradients_and_agree_among_themselves_and_the_player_is_alone(tmp_path: Path) -> None:
    player, first, second = ranks(grouped, 3, tmp_path)
    assert [(rank["size"], rank["rank"]) for rank in (player, first, second)] == [(1, 0), (2, 0), (2, 1)]
    assert torch.equal(first["grad"], second["grad"]), "trainers step by different gradients"
    torch.testing.assert_close(first["grad"], player["grad"])  # of all rows at once
    assert [rank["metrics"].item() for rank in (player, first, second)] == [0, 1.5, 1.5]
    assert [[part.tolist() for part in rank["many"]] for rank in (first, second)] == [
        [[1.5, 1.0], [rank, 1.0]] for rank in (1.0, 2.0)
    ]
    assert [rank["sum"].item() for rank in (player, first, second)] == [1, 5, 5]
    assert [rank["gathered"].tolist() for rank in (player, first, second)] == [[0], [1, 2], [1, 2]]
    assert [rank["max"] for rank in (player, first, second)] == [0, 2, 2]
    assert [rank["stop"] for rank in (player, first, second)] == [0, 143, 143]
    assert player["broadcast"] == "path"
    # Both end with the code and without text: the rank that it concerns has reported it
    assert [(r["code"], r["text"], r["told"]) for r in (first, second)] == [(5, "", [5])] * 2


def lost(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 1 receives the order to begin and ends at once; rank 0 learns of it in receiving and in sending."""
    channel = Channel(world, capacity=1)
    if fabric.global_rank == 1:
        channel.receive(Packet(Hello()), PLAYER, 0)
        torch.save({}, path / "1.pt")
        os._exit(0)
    channel.send(Packet(Hello()), 1, 0)
    texts = []
    for action in (
        lambda: channel.receive(Packet(Ready()), 1, 42),
        lambda: [channel.send(Packet(Hello()), 1, 43) for _ in range(3)],
    ):
        try:
            action()
        except LostPeerError as error:
            texts.append((str(error), error.exit_code))
    Trainers(some_run(), channel).report_failure(5)  # those that are gone need none
    return {"texts": texts}


def test_a_peer_that_is_gone_is_named_with_message_and_iteration(tmp_path: Path) -> None:
    player, _ = ranks(lost, 2, tmp_path)
    (received, code), (sent, other) = player["texts"]
    assert received.startswith("rank 0 lost rank 1: message Ready from it in iteration 42: ")
    assert sent.startswith("rank 0 lost rank 1: message Hello to it in iteration 43: ")
    assert (code, other) == (7, 7)


def late(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 1 is silent for longer than rank 0 waits, and finds that it is gone when it wakes up."""
    channel, started = Channel(world, capacity=1), time.perf_counter()
    try:
        if fabric.global_rank == 0:
            channel.receive(Packet(Ready()), 1, 8)
        while not (path / "lost").exists():
            time.sleep(0.01)
        channel.receive(Packet(Hello()), 0, 9)
    except LostPeerError as error:
        (path / "lost").touch()
        return {"text": str(error), "after": time.perf_counter() - started}
    return {}


def test_a_peer_that_is_silent_for_longer_than_the_time_out_is_lost(tmp_path: Path) -> None:
    player, trainer = ranks(late, 2, tmp_path, timeout=4 / 60)
    assert player["text"].startswith("rank 0 lost rank 1: message Ready from it in iteration 8: ")
    assert player["after"] >= 4
    assert trainer["text"].startswith("rank 1 lost rank 0: message Hello from it in iteration 9: ")


def failed(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 1 tells that its update has failed, and takes its time to end, as ranks do that Fabric has launched."""
    channel, code = Channel(world, capacity=1), 0
    if fabric.global_rank == 1:
        end = Player(some_run(0), channel)
        try:
            with reporting_failures(end, 1):
                end.meet(some_messages())
                for _ in end.orders():
                    raise NonFiniteError("it is NaN")
        except EndedByPeerError:
            deadline = time.monotonic() + 30
            while not (path / "ended").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return {"saw its end": (path / "ended").exists()}
    trainers = Trainers(some_run(0), channel)
    try:
        with reporting_failures(trainers):
            trainers.begin(some_messages())
            trainers.train([Data(0)])
    except RunError as error:
        code = error.exit_code
    (path / "ended").touch()
    return {"code": code}


def test_the_player_does_not_wait_for_trainers_that_have_told_it_that_they_end(tmp_path: Path) -> None:
    player, trainer = ranks(failed, 2, tmp_path)
    assert player["code"] == 5
    assert trainer["saw its end"]


# --- Bad input


def no_run_in(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-lag", -1], "--max-lag is -1: it must be between 0 and 100"),
        (["--max-lag", 101], "--max-lag is 101: it must be between 0 and 100"),
        (["--timeout", -1], "--timeout is -1.0: it must be a number of minutes, at most 100000; or 0: for ever"),
        (["--timeout", "inf"], "--timeout is inf: it must be a number of minutes, at most 100000; or 0: for ever"),
        (["--timeout", "nan"], "--timeout is nan: it must be a number of minutes, at most 100000; or 0: for ever"),
        (["--player-device", "tpu"], "--player-device is tpu: it must be one of auto, cpu, cuda"),
        ([], "--devices is 1: a decoupled script needs at least 2 ranks, one to play and the others to train: "
             "add --devices 2, or take the script of the same name without _decoupled"),
        (["--devices", 1], "--devices is 1: a decoupled script needs at least 2 ranks"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("algo", SCRIPTS)
def test_an_impossible_run_is_refused_in_one_line_before_anything_starts(
    algo: str, flags: list[object], words: str, tmp_path: Path
) -> None:
    env = "CartPole-v1" if "ppo" in algo else "Pendulum-v1"
    with pytest.raises(ConfigError) as caught:
        call(SCRIPTS[algo].main, "--env-id", env, *flags, "--log-dir", tmp_path)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(words)
    assert len(str(caught.value).splitlines()) == 1
    assert no_run_in(tmp_path)
    assert not torch.distributed.is_initialized()


def test_the_player_acts_where_it_is_told_to_if_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert player_device(SimpleNamespace(player_device="auto"), fabric) == torch.device("cpu")  # type: ignore[arg-type]
    assert player_device(SimpleNamespace(player_device="cpu"), fabric) == torch.device("cpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--player-device is cuda: it must be cpu: there is no GPU here"):
        player_device(SimpleNamespace(player_device="cuda"), fabric)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert player_device(SimpleNamespace(player_device="cuda"), fabric).type == "cuda"  # type: ignore[arg-type]
    fabric.device = torch.device("cuda", 0)
    assert player_device(SimpleNamespace(player_device="cpu"), fabric).type == "cpu"  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_a_trainer_frees_its_graphs_also_when_it_fails(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, which ends after it, would wait for them."""
    for name in ("Channel", "Group", "trainer_device"):
        monkeypatch.setattr(decoupled_ranks, name, lambda *_: None)
    monkeypatch.setattr(decoupled_ranks, "make_groups", lambda *_: (None, None, None))
    monkeypatch.setattr(decoupled_ranks, "Player", lambda *_: SimpleNamespace(exit_code=0))
    events: list[str] = []
    args, fabric = SimpleNamespace(players=1, max_lag=1, timeout=1), SimpleNamespace(global_rank=1, world_size=2)
    runner = SimpleNamespace(release=lambda: events.append("released"))
    run: Any = SimpleNamespace(args=args, fabric=fabric, join=lambda group: None, runner=runner)
    run.failing_together = contextlib.nullcontext

    def trainer(*_: Any) -> None:
        events.append("trained")
        if fails:
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        decoupled_ranks.run_ranks(run, lambda *_: 0, trainer, lambda *_: None)
    assert events == ["trained", "released"]


def test_what_the_fabric_of_some_ranks_lacks_is_told() -> None:
    group = Group(Fabric(accelerator="cpu", devices=1))
    with pytest.raises(AttributeError, match=r"has no clip_gradients: see Group in fabricrl/utils/decoupled\.py"):
        group.clip_gradients(None, None, max_norm=1.0)
    assert not hasattr(group, "barrier")
