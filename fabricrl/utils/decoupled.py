"""Decoupled training: the two groups of ranks, and messages that say what they are.

Rank 0 plays, ranks 1 to W - 1 train. Groups are Lightning's TorchCollective; tensors travel from process to process as
flat buffers of bytes that are allocated once. Every message has a letter, which its sender and its receiver both name.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.collectives import TorchCollective
from torch import Tensor, nn

from fabricrl.utils.ending import is_communication_error, reason, report
from fabricrl.utils.errors import ConfigError, LostPeerError, RunError
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.peers import patience
from fabricrl.utils.process import own_rank
from fabricrl.utils.utils import generators, require

PLAYER, FIRST_TRAINER = 0, 1  # ranks
TRAIN, STOP, ABORT = 0, 1, 2  # what the header of an iteration commands
TO_EACH = "DS"  # letters of the messages that go to every trainer: data, start
Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name → shape and type
INTEGER, REAL = ((), torch.int64), ((), torch.float64)
HEADER: Fields = {"command": INTEGER, "code": INTEGER}  # the head of [H] and of every [D]
HELLO: Fields = {**HEADER, "hash": INTEGER}  # [H]
REPORT: Fields = {"code": INTEGER, "signal": INTEGER, "waited": REAL, "passed": REAL}


class EndedByPeerError(RunError):
    """Ends a rank because of another one, which has told why and knows what to do itself; without text."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.exit_code = code


class Group:
    """Some of the ranks, as what is written for all of them sees Fabric: the trainers as a world of their own, or one
    rank alone.

    `setup` leaves gradients to `average_gradients`, which averages them over the group; `all_reduce` sums over it. All
    else is Fabric's: precision, backward, optimizers.

    Args:
        collective: the group; None: this rank alone.
        device: where this rank computes; None: where Fabric has put it.
    """

    def __init__(
        self, fabric: Fabric, collective: TorchCollective | None = None, device: torch.device | None = None
    ) -> None:
        self._fabric, self._collective = fabric, collective
        self.device = fabric.device if device is None else device
        self.world_size = 1 if collective is None else collective.world_size
        self.global_rank = 0 if collective is None else collective.rank
        self.strategy = fabric.strategy
        self.process_group = None if collective is None else collective.group  # None where there is nobody else
        self.autocast, self.backward = fabric.autocast, fabric.backward

    def setup(self, module: nn.Module, *optimizers: Any) -> Any:
        wrapped = _InPrecision(self._fabric, module.to(self.device))
        return (wrapped, *optimizers) if optimizers else wrapped

    def no_backward_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def all_reduce(self, tensor: Tensor, reduce_op: str = "sum") -> Tensor:
        return tensor if self._collective is None else self._collective.all_reduce(tensor, reduce_op)

    def broadcast(self, value: Any) -> Any:
        """For what rank 0 of a world of one tells itself."""
        assert self.world_size == 1
        return value


class _InPrecision(nn.Module):
    """Evaluates a module in Fabric's precision, as what Fabric wraps does."""

    def __init__(self, fabric: Fabric, module: nn.Module) -> None:
        super().__init__()
        self.module, self._fabric = module, fabric

    def forward(self, *inputs: Any) -> Any:
        precision = self._fabric.strategy.precision
        with self._fabric.autocast():
            outputs = self.module(*precision.convert_input(inputs))
        return precision.convert_output(outputs)


class Packet:
    """Tensors of fixed shapes as views of one buffer of bytes, each from a multiple of eight on."""

    def __init__(self, fields: Fields) -> None:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in fields.values()]
        self.buffer = torch.zeros(sum(-(-size // 8) * 8 for size in sizes), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        offset = 0
        for (name, (shape, dtype)), size in zip(fields.items(), sizes, strict=True):
            self.tensors[name] = self.buffer[offset : offset + size].view(dtype).view(shape)
            offset += -(-size // 8) * 8

    def fill(self, **values: Any) -> "Packet":
        """Writes tensors, or numbers, into their places."""
        for name, value in values.items():
            self.tensors[name].copy_(value) if isinstance(value, Tensor) else self.tensors[name].fill_(value)
        return self

    def __getitem__(self, name: str) -> Any:
        """A tensor; of a single number, that number."""
        tensor = self.tensors[name]
        return tensor if tensor.ndim else tensor.item()


class Channel:
    """Messages between the player and the trainers.

    Sending does not wait for the receiver, so that who is behind does not hold up who is ahead; what is sent must stay
    as it is until `capacity` more messages have been.

    Attributes:
        waited: seconds spent in `receive` since `lap` was called last.

    Raises:
        LostPeerError: in `send` and `receive`, if the other rank is gone, or silent for the group's time-out; says
            which rank, which message, which iteration.
    """

    def __init__(self, collective: TorchCollective, capacity: int) -> None:
        self.rank, self.world_size = collective.rank, collective.world_size
        self._group: Any = collective.group
        self._capacity = capacity
        self._sent: deque[tuple[Any, str, int, int]] = deque()
        self.waited, self._since = 0.0, time.perf_counter()

    def send(self, letter: str, packet: Packet, to: int, iteration: int) -> None:
        with self._naming(letter, to, iteration, "to"):
            work = torch.distributed.isend(packet.buffer, to, group=self._group, tag=ord(letter))
        self._sent.append((work, letter, to, iteration))
        self._settle(self._capacity)

    def receive(self, letter: str, packet: Packet, source: int, iteration: int) -> Packet:
        """The packet, once it has come."""
        started = time.perf_counter()
        with self._naming(letter, source, iteration, "from"):
            torch.distributed.recv(packet.buffer, source, group=self._group, tag=ord(letter))
        self.waited += time.perf_counter() - started
        return packet

    def lap(self) -> tuple[float, float]:
        """Seconds spent waiting, and seconds passed, since the last call."""
        waited, since, self.waited, self._since = self.waited, self._since, 0.0, time.perf_counter()
        return waited, self._since - since

    def flush(self) -> None:
        """Waits until everything sent has been received."""
        self._settle(0)

    def _settle(self, count: int) -> None:
        while len(self._sent) > count:
            work, letter, to, iteration = self._sent.popleft()
            with self._naming(letter, to, iteration, "to"):
                work.wait()

    @contextmanager
    def _naming(self, letter: str, peer: int, iteration: int, way: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            what = f"message {letter} {way} it in iteration {iteration}"
            raise LostPeerError(f"rank {self.rank} lost rank {peer}: {what}: {reason(error)}") from error


class Messages:
    """The packets of each letter, alike on both sides; several in turn, so that none that is on its way is touched.

    Args:
        fields: letter → fields of its packets.
        count: trainers; each is sent packets of its own.
        max_lag: iterations that may be on their way.
    """

    def __init__(self, fields: Mapping[str, Fields], count: int, max_lag: int) -> None:
        often = {letter: max_lag + 2 if letter in "DW" else 1 for letter in fields}  # of the others one is on its way
        turns = {letter: often[letter] * (count if letter in TO_EACH else 1) for letter in fields}
        self._packets = {letter: cycle([Packet(fields[letter]) for _ in range(turns[letter])]) for letter in fields}

    def __getitem__(self, letter: str) -> Packet:
        """The next packet to fill, or to receive into."""
        return next(self._packets[letter])


class Trainers:
    """The trainers as the player sees them.

    Attributes:
        count: how many.
        ahead: iterations whose data have been sent and whose weights have not come back: what the policy lags behind.
        iteration: the next.
        signal: exit code that a signal to a trainer asks for, or 0.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel, self.count = channel, channel.world_size - FIRST_TRAINER
        self.messages: Messages | None = None
        self.ahead: deque[int] = deque()
        self.iteration, self.signal = 0, 0
        self._waited = self._passed = 0.0

    def begin(self, messages: Messages, agent: nn.Module) -> None:
        """[H] to each: the player is ready, and starts from these parameters."""
        self._order(TRAIN, 0, hash=parameter_hash(agent))
        self.messages = messages

    def send(self, shares: Iterable[Mapping[str, Tensor]], answers: bool = True, **command: float) -> None:
        """[D] to each, of an iteration that is answered by [W] or by nothing."""
        assert self.messages is not None
        for rank, share in enumerate(shares, FIRST_TRAINER):
            packet = self.messages["D"].fill(command=TRAIN, **command, **share)
            self.channel.send("D", packet, rank, self.iteration)
        if answers:
            self.ahead.append(self.iteration)
        self.iteration += 1

    def collect(self, most: int) -> Iterator[Packet]:
        """[W] of the oldest iterations, until the player is `most` ahead.

        Raises:
            RunError: without text, if an update failed; the trainer has said why.
        """
        assert self.messages is not None
        while len(self.ahead) > most:
            iteration = self.ahead.popleft()
            answer = self.channel.receive("W", self.messages["W"], FIRST_TRAINER, iteration)
            if answer["code"] == LostPeerError.exit_code:
                raise LostPeerError(f"rank 0 lost a trainer in iteration {iteration}: rank {FIRST_TRAINER} says so")
            if answer["code"]:
                raise EndedByPeerError(answer["code"])
            self.signal = max(self.signal, answer["signal"])
            self._waited, self._passed = self._waited + answer["waited"], self._passed + answer["passed"]
            yield answer

    def receive(self, letter: str) -> Packet:
        """Receives what else the first trainer sends in the newest iteration."""
        assert self.messages is not None
        return self.channel.receive(letter, self.messages[letter], FIRST_TRAINER, max(self.iteration - 1, 0))

    def share_waited(self) -> float:
        """Share of the time that the first trainer has waited for data since the last call."""
        share, self._waited, self._passed = self._waited / max(self._passed, 1e-9), 0.0, 0.0
        return share

    def dismiss(self, command: int, code: int) -> None:
        """The last order to each, STOP or ABORT, and the exit code to end with. Those that are gone need none."""
        with contextlib.suppress(LostPeerError):
            self._order(command, code)
            if code != LostPeerError.exit_code:  # there one may not be listening
                self.channel.flush()

    def _order(self, command: int, code: int, **more: Any) -> None:
        for rank in range(FIRST_TRAINER, self.channel.world_size):
            packet = Packet(HELLO) if self.messages is None else self.messages["D"]
            letter = "H" if self.messages is None else "D"
            self.channel.send(letter, packet.fill(command=command, code=code, **more), rank, self.iteration)


def make_groups(fabric: Fabric, timeout: float) -> tuple[TorchCollective, TorchCollective]:
    """All ranks on the CPU, for messages, and the trainers on their devices; every rank calls it.

    Args:
        timeout: minutes to wait for a message before giving up; 0: for ever.

    Raises:
        ConfigError: there is nobody but the player.
    """
    if fabric.world_size == 1:
        raise ConfigError(
            "--devices is 1: a decoupled script needs at least 2 ranks, one to play and the others to train: "
            "add --devices 2, or take the script of the same name without _decoupled"
        )
    world, trainers = TorchCollective(), TorchCollective()
    limit = patience(timeout)
    backend = "gloo" if fabric.device.type == "cpu" else None  # None: that of the devices
    world.create_group(backend="gloo", timeout=limit)
    trainers.create_group(ranks=list(range(FIRST_TRAINER, fabric.world_size)), backend=backend, timeout=limit)
    return world, trainers


def player_device(args: Any, fabric: Fabric) -> torch.device:
    """Device on which the player acts.

    Raises:
        ConfigError: on a GPU that is not there.
    """
    there = args.player_device != "cuda" or torch.cuda.is_available()
    require(there, "player_device", args.player_device, "cpu: there is no GPU here")
    return fabric.device if args.player_device == "auto" else torch.device(args.player_device)


def with_player(states: Tensor, act_rng: torch.Generator, seed: int, global_step: int) -> Tensor:
    """Generators as coupled scripts store them: those that act, train, and torch's own, of each of their ranks.

    `states` [W - 1, 2, bytes] are the trainers'; the player is the first one's other half.
    """
    acting = [generators(seed, rank, global_step)[0].get_state() for rank in range(len(states))]
    acting[0] = act_rng.get_state()
    states = torch.cat((torch.stack(acting)[:, None], states), 1)  # [W - 1, 3, bytes]
    states[0, -1] = torch.get_rng_state()
    return states


@contextmanager
def telling(tell: Callable[[int], None], first_rank: int = PLAYER, iteration: int = 0) -> Iterator[None]:
    """Reports an error of this rank at once, which ends its peers, too, rather than leave them waiting.

    `first_rank` is that of the group that has agreed on who reports the error.

    Raises:
        EndedByPeerError: in place of the error that has been reported.
    """
    try:
        yield
    except LostPeerError:  # the others notice as this one ends
        raise
    except EndedByPeerError as error:
        tell(error.exit_code)
        raise
    except RunError as error:
        if own_rank() == error.told_by + first_rank:  # before the others end, which may end this process
            report(str(error), error.exit_code, own_rank())
        tell(error.exit_code)
        raise EndedByPeerError(error.exit_code) from error
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        lost = f"rank {own_rank()} lost another trainer in iteration {iteration}"
        report(f"{lost}: {reason(error)}", LostPeerError.exit_code)
        tell(LostPeerError.exit_code)
        raise EndedByPeerError(LostPeerError.exit_code) from error


@contextmanager
def before_the_player(channel: "Channel") -> Iterator[None]:
    """Takes [H] before it reports a trainer's early error: the player has often had the same."""
    try:
        yield
    except RunError:
        with contextlib.suppress(RunError):
            await_player(channel)
        raise


def give_up(channel: "Channel", messages: "Messages", letter: str, speaks: bool, iteration: int, code: int) -> None:
    """A trainer's last message, if it speaks for all, and its end: when the player orders it, or is gone."""
    with contextlib.suppress(LostPeerError):
        if speaks:
            channel.send(letter, messages[letter].fill(code=code), PLAYER, iteration)
        while channel.receive("D", messages["D"], PLAYER, iteration)["command"] == TRAIN:
            pass


def await_player(channel: Channel, agent: nn.Module | None = None) -> None:
    """[H], before the first iteration.

    Raises:
        RunError: without text, if the player cannot begin, which has said why; or `agent` differs from the player's.
    """
    hello = _heed(channel.receive("H", Packet(HELLO), PLAYER, 0))
    if agent is not None and hello["hash"] != parameter_hash(agent).item():
        raise RunError(
            f"rank {channel.rank} starts from other parameters than the player: does the environment draw from torch?"
        )


def receive_data(channel: Channel, messages: Messages, iteration: int) -> Packet:
    """[D], of which each iteration has one.

    Raises:
        RunError: without text, if the player has failed; it has said why.
    """
    return _heed(channel.receive("D", messages["D"], PLAYER, iteration))


def _heed(packet: Packet) -> Packet:
    if packet["command"] == ABORT:
        raise EndedByPeerError(packet["code"])
    return packet
