"""Parts of decoupled scripts: packets, messages between ranks, groups of ranks, and commands to them."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fabricrl.algos.ppo import ppo_decoupled
from fabricrl.algos.sac import sac_decoupled
from fabricrl.data import Batch, StackedFrames
from fabricrl.utils.decoupled import (
    ABORT,
    FIRST_TRAINER,
    HEADER,
    INTEGER,
    PLAYER,
    REAL,
    REPORT,
    STOP,
    TRAIN,
    Channel,
    EndedByPeerError,
    Group,
    Messages,
    Packet,
    Trainers,
    await_player,
    give_up,
    make_groups,
    player_device,
    receive_data,
    telling,
    with_player,
)
from fabricrl.utils.ending import failing_together
from fabricrl.utils.errors import ConfigError, LostPeerError, NonFiniteError, RunError
from fabricrl.utils.optimizer import Adam, average_gradients
from fabricrl.utils.ranks import all_gather, all_max
from fabricrl.utils.signals import StopSignal
from fabricrl.utils.utils import generators
from tests.process import FORKSERVER, LIMIT, call, free_port, load

SCRIPTS: dict[str, Any] = {"ppo": ppo_decoupled, "sac": sac_decoupled}

# --- Packets


FIELDS = {
    "flags": ((3,), torch.bool),
    "number": INTEGER,
    "rate": REAL,
    "table": ((2, 3), torch.float32),
    "none": ((0, 4), torch.float32),
    "actions": ((5, 1), torch.int64),
    "pixels": ((7,), torch.uint8),
}


def filled() -> Packet:
    return Packet(FIELDS).fill(
        flags=torch.tensor([True, False, True]),
        number=-(2**62),
        rate=1 / 3,
        table=torch.arange(6.0).view(2, 3),
        actions=torch.arange(5)[:, None],
        pixels=torch.arange(250, 257).to(torch.uint8),
    )


def test_fields_filled_in_on_one_side_arrive_on_the_other() -> None:
    sent, received = filled(), Packet(FIELDS)
    received.buffer.copy_(sent.buffer)
    assert received["number"] == -(2**62)
    assert received["rate"] == 1 / 3  # all 64 bits
    assert received["flags"].tolist() == [True, False, True]
    assert received["table"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert received["actions"].tolist() == [[0], [1], [2], [3], [4]]
    assert received["pixels"].tolist() == [250, 251, 252, 253, 254, 255, 0]
    assert received["none"].shape == (0, 4)


def test_fields_do_not_overlap_and_lie_where_their_type_can_be_read() -> None:
    packet = Packet(FIELDS)
    begin = packet.buffer.data_ptr()
    places = []
    for name, (shape, dtype) in FIELDS.items():
        tensor = packet.tensors[name]
        assert (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype)
        first = tensor.data_ptr() - begin if tensor.numel() else 0
        assert first % 8 == 0
        places.append((first, first + tensor.numel() * dtype.itemsize))
    for (_, end), (start, stop) in itertools.pairwise(sorted(place for place in places if place[0] < place[1])):
        assert end <= start < stop <= len(packet.buffer)


def test_filling_copies() -> None:
    """Messages are copies: they do not change with the tensors they were made from."""
    source = torch.ones(2, 3)
    packet = Packet(FIELDS).fill(table=source)
    source += 1
    assert packet["table"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_shares_are_the_rollout_each_row_once_as_it_is_seen() -> None:
    frames, places = torch.arange(20.0).view(10, 2), torch.randint(10, (9, 4))
    rows = Batch(obs=StackedFrames(frames, places), advantages=torch.arange(9.0), counts=None)
    first, second, third = ppo_decoupled.divide(rows, 3)
    assert [share["advantages"].tolist() for share in (first, second, third)] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert torch.equal(second["obs"], frames[places[1::3]])  # frames put together
    assert second["counts"].tolist() == [1, 1, 1]
    counted = [share["counts"].tolist() for share in ppo_decoupled.divide(rows.with_columns(counts=torch.eye(9)[4]), 3)]
    assert counted == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_a_packet_is_used_again_only_after_all_that_may_be_on_their_way() -> None:
    """With lag K, K + 1 iterations may be on their way, each with a packet of a letter for every trainer."""
    for count, max_lag in itertools.product((1, 3), (0, 2)):
        messages = Messages({"D": FIELDS, "W": FIELDS, "O": HEADER}, count, max_lag)
        for letter, each in (("D", count), ("W", 1)):
            packets = [messages[letter] for _ in range(100)]
            again = packets[1:].index(packets[0]) + 1
            assert again > each * (max_lag + 1)
            assert len({packet.buffer.data_ptr() for packet in packets[:again]}) == again


# --- Trainers as the player sees them, with a channel that only notes


class Notes:
    """Stands for the channel of a player; `answers` are what it receives."""

    def __init__(self, count: int, answers: list[dict[str, Any]] | None = None) -> None:
        self.world_size, self.answers, self.sent = FIRST_TRAINER + count, list(answers or ()), []
        self.flushed = 0

    def send(self, letter: str, packet: Packet, to: int, iteration: int) -> None:
        self.sent.append((letter, to, iteration, {name: packet[name] for name in packet.tensors}))

    def receive(self, letter: str, packet: Packet, source: int, iteration: int) -> Packet:
        assert source == FIRST_TRAINER
        answer = self.answers.pop(0)
        assert (letter, iteration) == ("W", answer.pop("iteration"))
        return packet.fill(**answer)

    def flush(self) -> None:
        self.flushed += 1


def watched(count: int, *answers: dict[str, Any], max_lag: int = 2) -> tuple[Trainers, Notes]:
    notes = Notes(count, [{"code": 0, "signal": 0, "waited": 0.0, "passed": 1.0} | answer for answer in answers])
    trainers = Trainers(notes)  # type: ignore[arg-type]
    fields = {"D": HEADER | {"save": INTEGER, "row": INTEGER}, "W": REPORT | {"weights": INTEGER}}
    trainers.begin(Messages(fields, count, max_lag), torch.nn.Linear(1, 1))
    return trainers, notes


def shares(count: int, row: int) -> list[dict[str, Any]]:
    return [{"row": torch.tensor(row + i)} for i in range(count)]


def test_each_trainer_is_sent_its_share_and_all_the_same_order() -> None:
    trainers, notes = watched(2)
    assert [(letter, to, sent["command"]) for letter, to, _, sent in notes.sent] == [("H", 1, TRAIN), ("H", 2, TRAIN)]
    trainers.send(shares(2, 10), save=1)
    trainers.send(shares(2, 20), save=0)
    expected = [("D", rank, i, {"command": TRAIN, "code": 0, "save": 1 - i, "row": 10 * (i + 1) + rank - 1})
                for i in (0, 1) for rank in (1, 2)]  # fmt: skip
    assert notes.sent[2:] == expected
    assert list(trainers.ahead) == [0, 1]


def test_answers_are_taken_oldest_first_until_the_player_is_no_further_ahead_than_it_may_be() -> None:
    answers = [{"iteration": i, "weights": 100 + i, "waited": 0.25 * i, "passed": 2.0} for i in (0, 2, 3)]
    answers[1]["signal"] = 143
    trainers, notes = watched(1, *answers)
    trainers.send(shares(1, 0))
    trainers.send(shares(1, 0), answers=False)  # nothing was due: nothing comes back
    trainers.send(shares(1, 0))
    trainers.send(shares(1, 0))
    assert list(trainers.collect(3)) == []
    assert [answer["weights"] for answer in trainers.collect(2)] == [100]
    assert (list(trainers.ahead), trainers.signal) == ([2, 3], 0)
    assert [answer["weights"] for answer in trainers.collect(0)] == [102, 103]
    assert (list(trainers.ahead), trainers.signal) == ([], 143)
    assert trainers.share_waited() == pytest.approx(1.25 / 6)
    assert trainers.share_waited() == 0
    assert not notes.answers


def test_a_failed_update_ends_the_player_silently_with_the_code_of_the_trainer() -> None:
    trainers, _ = watched(1, {"iteration": 0, "code": 5})
    trainers.send(shares(1, 0))
    with pytest.raises(RunError) as caught:
        list(trainers.collect(0))
    assert (caught.value.exit_code, str(caught.value)) == (5, "")


def test_the_last_order_goes_to_every_trainer_whether_they_have_begun_or_not() -> None:
    notes = Notes(2)
    Trainers(notes).dismiss(ABORT, 4)  # type: ignore[arg-type]
    assert notes.sent == [("H", rank, 0, {"command": ABORT, "code": 4, "hash": 0}) for rank in (1, 2)]
    trainers, notes = watched(2)
    trainers.dismiss(STOP, 143)
    assert [entry[:2] for entry in notes.sent[2:]] == [("D", 1), ("D", 2)]
    assert all((sent["command"], sent["code"]) == (STOP, 143) for *_, sent in notes.sent[2:])
    assert notes.flushed == 1


def test_a_rank_that_fails_tells_its_peers_and_one_that_has_lost_them_does_not(capsys: pytest.CaptureFixture) -> None:
    told: list[int] = []
    with pytest.raises(EndedByPeerError) as caught, telling(told.append):
        raise NonFiniteError("it is NaN")
    assert (told, caught.value.exit_code, str(caught.value)) == ([5], 5, "")
    assert capsys.readouterr().err == "error: it is NaN\n"  # at once: the peers' end may end this process
    with pytest.raises(EndedByPeerError) as caught, telling(told.append):
        raise EndedByPeerError(6)
    assert (told, caught.value.exit_code) == ([5, 6], 6)
    with pytest.raises(LostPeerError), telling(told.append):
        raise LostPeerError("rank 1 is gone")
    with telling(told.append):
        pass
    assert told == [5, 6]
    assert not capsys.readouterr().err


def test_a_trainer_whose_parameters_are_others_than_the_players_does_not_begin() -> None:
    agents = [torch.nn.Linear(2, 2) for _ in range(2)]
    notes = Notes(1)
    Trainers(notes).begin(Messages({"D": HEADER, "W": REPORT}, 1, 0), agents[0])  # type: ignore[arg-type]
    ((_, _, _, hello),) = notes.sent

    class Heard:
        rank = 1

        def receive(self, letter: str, packet: Packet, source: int, iteration: int) -> Packet:
            return packet.fill(**hello)

    await_player(Heard(), agents[0])  # type: ignore[arg-type]
    with pytest.raises(RunError, match="other parameters"):
        await_player(Heard(), agents[1])  # type: ignore[arg-type]


def test_generators_are_stored_as_the_coupled_script_stores_those_of_its_ranks() -> None:
    act, _ = generators(3, 0, 64)
    torch.rand(5, generator=act)
    trainers = [generators(3, rank, 64)[1] for rank in (0, 1)]
    states = torch.stack([torch.stack((rng.get_state(), torch.get_rng_state())) for rng in trainers])
    states[:, 1] = 7  # the trainers' own
    stored = with_player(states, act, 3, 64)
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
    result = task(fabric, *make_groups(fabric, timeout), path)
    torch.save(result, path / f"{rank}.pt")


BIG = {"number": INTEGER, "rows": ((1 << 20,), torch.float32)}  # 4 MiB, more than sockets hold back


def exchange(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 0 sends more than its readers take at once; nobody reads before the sender has got so far."""
    channel = Channel(world, capacity=3)

    def when(done: str) -> None:
        while not (path / done).exists():
            time.sleep(0.01)
        time.sleep(0.5)

    if fabric.global_rank == 0:
        packets = [Packet(BIG).fill(number=n, rows=torch.full((1 << 20,), n)) for n in range(4)]
        for n, letter in enumerate("DDS"):
            channel.send(letter, packets[n], 1, n)
        (path / "sent").touch()
        times = [time.perf_counter()]
        channel.send("D", packets[3], 2, 3)  # waits for the first
        times.append(time.perf_counter())
        (path / "fourth").touch()
        channel.flush()
        times.append(time.perf_counter())
        (path / "flushed").touch()
        code = channel.receive("W", Packet(HEADER), 1, 0)["code"]
        return {"times": times, "code": code, "waited": channel.waited, "laps": [channel.lap(), channel.lap()]}
    packet, letters = Packet(BIG), ("S", "D", "D") if fabric.global_rank == 1 else ("D",)
    when("sent" if fabric.global_rank == 1 else "fourth")
    received = []
    for letter in letters:  # S was sent last
        channel.receive(letter, packet, PLAYER, 0)
        received.append((letter, packet["number"], packet["rows"].unique().tolist()))
    if fabric.global_rank == 1:
        when("flushed")
        channel.send("W", Packet(HEADER).fill(code=17), PLAYER, 0)
        channel.flush()
    return {"received": received, "rank": channel.rank, "world_size": channel.world_size}


def test_messages_arrive_whole_under_their_letter_and_in_their_order_and_sending_does_not_wait(tmp_path: Path) -> None:
    player, first, second = ranks(exchange, 3, tmp_path)
    assert first["received"] == [("S", 2, [2.0]), ("D", 0, [0.0]), ("D", 1, [1.0])]
    assert second["received"] == [("D", 3, [3.0])]
    assert (first["rank"], first["world_size"]) == (1, 3)
    begin, fourth, flushed = player["times"]
    assert fourth - begin > 0.3, "more messages are on their way than capacity says"
    assert flushed - fourth > 0.3, "the last message had not been received"
    assert player["code"] == 17
    (waited, passed), (nothing, soon) = player["laps"]
    assert 0.3 < waited == player["waited"] < passed
    assert (nothing, soon < 0.3) == (0, True)


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
    stop = StopSignal()
    stop.received = {0: 0, 1: 0, 2: 15}[rank]
    result = {
        "size": group.world_size, "rank": group.global_rank, "grad": optimizer.gradient, "metrics": metrics,
        "sum": group.all_reduce(torch.tensor([rank + 1.0])), "gathered": all_gather(group, torch.tensor(rank)),
        "max": all_max(group, rank), "stop": stop.exit_code(group), "device": str(group.device), "told": [],
    }  # fmt: skip
    if rank == PLAYER:
        return result | {"broadcast": group.broadcast("path")}
    try:
        with telling(result["told"].append, FIRST_TRAINER), failing_together(group):
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
        await_player(channel)
        torch.save({}, path / "1.pt")
        os._exit(0)
    trainers = Trainers(channel)
    trainers.begin(Messages({"D": HEADER, "W": HEADER}, 1, 0), torch.nn.Linear(1, 1))
    texts = []
    for action in (
        lambda: channel.receive("W", Packet(HEADER), 1, 42),
        lambda: [channel.send("D", Packet(HEADER), 1, 43) for _ in range(3)],
    ):
        try:
            action()
        except LostPeerError as error:
            texts.append((str(error), error.exit_code))
    trainers.dismiss(ABORT, 5)  # those that are gone need none
    return {"texts": texts}


def test_a_peer_that_is_gone_is_named_with_message_and_iteration(tmp_path: Path) -> None:
    player, _ = ranks(lost, 2, tmp_path)
    (received, code), (sent, other) = player["texts"]
    assert received.startswith("rank 0 lost rank 1: message W from it in iteration 42: ")
    assert sent.startswith("rank 0 lost rank 1: message D to it in iteration 43: ")
    assert (code, other) == (7, 7)


def late(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 1 is silent for longer than rank 0 waits, and finds that it is gone when it wakes up."""
    channel, started = Channel(world, capacity=1), time.perf_counter()
    try:
        if fabric.global_rank == 0:
            channel.receive("W", Packet(HEADER), 1, 8)
        time.sleep(2.5)
        receive_data(channel, Messages({"D": HEADER}, 1, 0), 9)
    except LostPeerError as error:
        return {"text": str(error), "after": time.perf_counter() - started}
    return {}


def test_a_peer_that_is_silent_for_longer_than_the_time_out_is_lost(tmp_path: Path) -> None:
    player, trainer = ranks(late, 2, tmp_path, timeout=1.2 / 60)
    assert player["text"].startswith("rank 0 lost rank 1: message W from it in iteration 8: ")
    assert 1.2 <= player["after"] < 3.5
    assert trainer["text"].startswith("rank 1 lost rank 0: message D from it in iteration 9: ")


def failed(fabric: Any, world: Any, team: Any, path: Path) -> dict[str, Any]:
    """Rank 1 tells that its update has failed, and takes its time to end, as ranks do that Fabric has launched."""
    channel, fields = Channel(world, capacity=1), {"D": HEADER, "W": REPORT}
    if fabric.global_rank == 1:
        await_player(channel)
        messages = Messages(fields, 1, 0)
        receive_data(channel, messages, 0)
        give_up(channel, messages, "W", True, 0, 5)
        time.sleep(4)
        return {}
    trainers = Trainers(channel)
    trainers.begin(Messages(fields, 1, 0), torch.nn.Linear(1, 1))
    code, started = 0, 0.0
    try:
        with telling(lambda code: trainers.dismiss(ABORT, code)):
            trainers.send([{}])
            try:
                list(trainers.collect(0))
            finally:
                started = time.perf_counter()
    except RunError as error:
        code = error.exit_code
    return {"code": code, "seconds": time.perf_counter() - started}


def test_the_player_does_not_wait_for_trainers_that_have_told_it_that_they_end(tmp_path: Path) -> None:
    player, _ = ranks(failed, 2, tmp_path)
    assert player["code"] == 5
    assert player["seconds"] < 3


# --- Bad input


def no_run_in(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-lag", -1], "--max-lag is -1: it must be between 0 and 100"),
        (["--max-lag", 101], "--max-lag is 101: it must be between 0 and 100"),
        (["--timeout", "inf"], "--timeout is inf: it must be a number of minutes, at most 100000; or 0: for ever"),
        (["--timeout", "nan"], "--timeout is nan: it must be a number of minutes, at most 100000; or 0: for ever"),
        (["--player-device", "tpu"], "invalid choice 'tpu' for argument '--player-device'. Expected one of ('auto', "),
        ([], "--devices is 1: a decoupled script needs at least 2 ranks, one to play and the others to train: "
             "add --devices 2, or take the script of the same name without _decoupled"),
        (["--devices", 1], "--devices is 1: a decoupled script needs at least 2 ranks"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("algo", SCRIPTS)
def test_an_impossible_run_is_refused_in_one_line_before_anything_starts(
    algo: str, flags: list[object], words: str, tmp_path: Path
) -> None:
    env = "CartPole-v1" if algo == "ppo" else "Pendulum-v1"
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
