"""Decoupled training: the groups of ranks, and messages that say what they are.

Ranks 0 to P - 1 play, ranks P to W - 1 train. Groups are Lightning's TorchCollective. A message is a record, a
NamedTuple whose fields both ends know by name; it travels from process to process as one flat buffer of bytes,
allocated once. `fabricrl.algos.decoupled` has the two ends.
"""

import contextlib
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress, cycle
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.collectives import TorchCollective
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fabricrl.utils.ending import reason
from fabricrl.utils.errors import ConfigError, LostPeerError, RunError, require
from fabricrl.utils.peers import patience
from fabricrl.utils.process import PLACE
from fabricrl.utils.seeding import generators

PLAYER = 0  # the rank of the only player, or of the first of several, who leads
TRAIN, STOP, ABORT, KEEPALIVE, SAVE = 0, 1, 2, 3, 4  # what the player commands
PATH_MAX = 4096  # bytes of a path
NUMBERS = {bool: "?7x", int: "q", float: "d"}  # eight bytes each, as `struct` writes them


class Hello(NamedTuple):
    """Each player → each trainer, once: it is ready."""

    command: int = TRAIN
    code: int = 0  # exit code to end with, after ABORT
    hash: int = 0  # of the parameters it starts from
    skips: bool = False  # whether some of its environments' steps only reset
    folder: Tensor = torch.zeros(PATH_MAX, dtype=torch.uint8)  # of the run


class Ready(NamedTuple):
    """First trainer → each player, once: so are the trainers."""

    code: int = 0  # exit code of a fault
    refill: bool = False  # whether a run that is resumed has to fill a new replay buffer first


class Order(NamedTuple):
    """Each player → each trainer: the data of an iteration or of several, and what to do with them.

    The first player alone sends other commands.
    """

    command: int  # TRAIN, STOP, ABORT, KEEPALIVE for the next Order, or SAVE: a State is awaited, for a checkpoint
    code: int  # exit code to end with
    iteration: int  # of the run, from 0
    step: int  # environment steps so far
    answers: bool  # an Answer is awaited
    wants_losses: bool  # those since the last Answer that had them
    bulk: bool  # the next Order has the record of many iterations
    data: Any  # the script's record


class Answer(NamedTuple):
    """First trainer → each player, after an update: what to act with, and how training goes."""

    code: int  # exit code of a fault
    signal: int  # exit code that a signal to a trainer asks for
    waited: float  # seconds that the trainer has waited for data since the last answer
    passed: float  # seconds since then
    losses: Tensor | None  # sums and numbers of the metrics fetched, [2, metrics]
    weights: Tensor  # parameters of the policy [P], in bfloat16 with --weights-precision bf16


class State(NamedTuple):
    """First trainer → first player, at a checkpoint: what it holds besides."""

    generators: Tensor  # of all trainers, [K, 2, bytes]
    learned: list[Tensor]  # optimizers' moments, and parameters that players do not have as they are


class Rows(NamedTuple):
    """The end of a record: as many rows of a tensor as it was declared with, or fewer.

    The message is so much shorter; other fields tell how many there are.
    """

    tensor: Tensor  # [R, ...]


class EndedByPeerError(RunError):
    """Ends a rank because of another one, which has told why and knows what to do itself; without text."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.exit_code = code


class Group:
    """A subset of the ranks with what scripts call of Fabric, so that code written for all ranks also runs on the
    players or the trainers alone, or on one rank.

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
        self.process_group: Any = None if collective is None else collective.group  # None where there is nobody else
        self.autocast, self.backward = fabric.autocast, fabric.backward

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the fabric of some ranks alone has no {name}: see Group in fabricrl/utils/decoupled.py")

    def setup(self, module: nn.Module, *optimizers: Any) -> Any:
        wrapped = _InPrecision(self._fabric, module.to(self.device))
        return (wrapped, *optimizers) if optimizers else wrapped

    def no_backward_sync(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def all_reduce(self, tensor: Tensor, reduce_op: str = "sum") -> Tensor:
        return tensor if self._collective is None else self._collective.all_reduce(tensor, reduce_op)

    def broadcast(self, value: Any) -> Any:
        """A value of the group's first rank, on all of them."""
        values = [value]
        if self._collective is not None and self.world_size > 1:
            torch.distributed.broadcast_object_list(values, group=self.process_group, group_src=0)
        return values[0]


class _InPrecision(nn.Module):
    """Evaluates a module in Fabric's precision, as what Fabric wraps does."""

    def __init__(self, fabric: Fabric, module: nn.Module) -> None:
        super().__init__()
        self.module, self._fabric = module, fabric

    def forward(self, *inputs: Any, **more: Any) -> Any:
        precision = self._fabric.strategy.precision
        inputs, more = precision.convert_input((inputs, more))
        with self._fabric.autocast():
            outputs = self.module(*inputs, **more)
        return precision.convert_output(outputs)


class Packet:
    """A record as one buffer of bytes, each field from a multiple of eight on.

    Args:
        record: the NamedTuple that declares the fields, with batches, lists and other records in it. Numbers travel as
            64 bits, tensors as they are in shape and type; a tensor that is None when it is sent is None at the other
            end. The last may be `Rows`.

    Attributes:
        message: what of the buffer travels; all, but for rows that are not there.
    """

    def __init__(self, record: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(record)
        self.name = type(record).__name__
        ends = pytree.tree_leaves(record, is_leaf=lambda node: isinstance(node, Rows))
        self._has_rows = isinstance(ends[-1], Rows)
        leaves = [torch.zeros(0) if leaf is None else leaf for leaf in leaves]
        self._are_tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        examples = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = "".join(NUMBERS[type(leaf)] for leaf in leaves if not isinstance(leaf, Tensor))
        self._head = Struct(f"={len(examples)}?{-len(examples) % 8}x{kinds}")  # which tensors are there; the numbers
        offset, offsets = self._head.size, []
        for example in examples:
            offsets.append(offset)
            offset += -(-example.nbytes // 8) * 8
        self.buffer = torch.zeros(offset, dtype=torch.uint8)
        self.tensors = [
            self.buffer[start : start + example.nbytes].view(example.dtype).view(example.shape)
            for start, example in zip(offsets, examples, strict=True)
        ]
        self._bytes = self.buffer.numpy().data
        self.message, self._start_of_rows = self.buffer, offsets[-1] if offsets else offset

    def fill(self, record: Any) -> "Packet":
        """Writes a record into the buffer, with the fields and shapes, and in the types that were declared."""
        leaves, spec = pytree.tree_flatten(record)
        assert spec == self._spec, f"{self.name} has other fields than declared: {spec}"
        tensors = list(compress(leaves, self._are_tensors))
        numbers = [leaf for leaf, is_tensor in zip(leaves, self._are_tensors, strict=True) if not is_tensor]
        try:
            self._head.pack_into(self._bytes, 0, *(tensor is not None for tensor in tensors), *numbers)
        except StructError as error:
            raise AssertionError(f"{self.name} has other numbers than declared: {error}") from error
        views = self.tensors
        if self._has_rows:
            *whole, room = views
            rows = room[: len(tensors[-1])]
            views, self.message = [*whole, rows], self.buffer[: self._start_of_rows + rows.nbytes]
        for view, tensor in zip(views, tensors, strict=True):
            if tensor is not None:
                assert view.shape == tensor.shape, f"{self.name}: a field is {[*tensor.shape]}, not {[*view.shape]}"
                view.copy_(tensor)
        return self

    def read(self) -> Any:
        """The record in the buffer; its tensors are views."""
        head = self._head.unpack_from(self._bytes)
        tensors = iter([view if there else None for view, there in zip(self.tensors, head, strict=False)])
        numbers = iter(head[len(self.tensors) :])
        leaves = [next(tensors) if is_tensor else next(numbers) for is_tensor in self._are_tensors]
        return pytree.tree_unflatten(leaves, self._spec)


class Outbox:
    """Packets of one message in turn, so that none that is on its way is touched."""

    def __init__(self, record: Any, turns: int) -> None:
        self.record = record
        self._packets = cycle([Packet(record) for _ in range(turns)])

    def pack(self, record: Any) -> Packet:
        """A record in the next packet."""
        return next(self._packets).fill(record)


class Channel:
    """Messages between players and trainers.

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

    def send(self, packet: Packet, to: int, iteration: int) -> None:
        """Sends a packet under its record's name."""
        with self._naming(packet.name, to, iteration, "to"):
            work = torch.distributed.isend(packet.message, to, group=self._group, tag=tag(packet.name))
        self._sent.append((work, packet.name, to, iteration))
        self._settle(self._capacity)

    def receive(self, packet: Packet, source: int, iteration: int) -> Any:
        """The next record of the packet's name, once it has come; the next one overwrites its tensors."""
        started = time.perf_counter()
        with self._naming(packet.name, source, iteration, "from"):
            # Gloo takes a message that is shorter than the buffer
            torch.distributed.recv(packet.buffer, source, group=self._group, tag=tag(packet.name))
        self.waited += time.perf_counter() - started
        return packet.read()

    def lap(self) -> tuple[float, float]:
        """Seconds spent waiting, and seconds passed, since the last call."""
        waited, since, self.waited, self._since = self.waited, self._since, 0.0, time.perf_counter()
        return waited, self._since - since

    def flush(self) -> None:
        """Waits until everything sent has been received."""
        self._settle(0)

    def _settle(self, count: int) -> None:
        while len(self._sent) > count:
            work, name, to, iteration = self._sent.popleft()
            with self._naming(name, to, iteration, "to"):
                work.wait()

    @contextmanager
    def _naming(self, name: str, peer: int, iteration: int, way: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            what = f"message {name} {way} it in iteration {iteration}"
            raise LostPeerError(f"rank {self.rank} lost rank {peer}: {what}: {reason(error)}") from error


def tag(name: str) -> int:
    """The number that a message of this name travels under."""
    return zlib.crc32(name.encode()) >> 1


def check_players(players: int, ranks: int) -> None:
    """Raises ConfigError if there is nobody to train."""
    if ranks == 1:
        flag = "--nproc-per-node" if "TORCHELASTIC_RUN_ID" in os.environ else "--devices"
        raise ConfigError(
            f"{flag} is 1: a decoupled script needs at least 2 ranks, one to play and the others to train: "
            f"add {flag} 2, or take the script of the same name without _decoupled"
        )
    allowed = f"less than {ranks}, the number of ranks (--devices), since the others train"
    require(players < ranks, "players", players, allowed)


def make_groups(
    fabric: Fabric, players: int, timeout: float
) -> tuple[TorchCollective, TorchCollective | None, TorchCollective]:
    """All ranks, and the players, if there are several, on the CPU; the trainers on their devices. Every rank calls it.

    Messages travel over Gloo; gradients, where trainers have GPUs, over NCCL.

    Args:
        players: how many; the others train.
        timeout: minutes to wait for a message before giving up; 0: for ever.

    Raises:
        ConfigError: there is nobody to train.
    """
    check_players(players, fabric.world_size)
    world, team, trainers = TorchCollective(), TorchCollective() if players > 1 else None, TorchCollective()
    limit = patience(timeout)
    backend = "gloo" if fabric.device.type == "cpu" and PLACE.gpu is None else "nccl"
    world.create_group(backend="gloo", timeout=limit)
    if team is not None:
        team.create_group(ranks=list(range(players)), backend="gloo", timeout=limit)
    trainers.create_group(ranks=list(range(players, fabric.world_size)), backend=backend, timeout=limit)
    return world, team, trainers


def trainer_device(fabric: Fabric) -> torch.device:
    """Device on which a trainer learns: its GPU, beside players on the CPU; else where Fabric has put it."""
    return fabric.device if PLACE.gpu is None else torch.device("cuda", PLACE.gpu)


def player_device(args: Any, fabric: Fabric) -> torch.device:
    """Device on which a player acts.

    Raises:
        ConfigError: on a GPU that is not there.
    """
    there = args.player_device != "cuda" or torch.cuda.is_available()
    require(there, "player_device", args.player_device, "cpu: there is no GPU here")
    return fabric.device if args.player_device == "auto" else torch.device(args.player_device)


def add_acting_generators(states: Tensor, act_rng: torch.Generator, seed: int, global_step: int) -> Tensor:
    """Generators as a coupled run stores them, [K, 3, bytes]: of acting, of training, and torch's own, of each rank.

    `states` [K, 2, bytes] are the trainers', which do not act; rank 0's acting generator is the player's, and draws the
    noise of all environments.
    """
    acting = [generators(seed, rank, global_step)[0].get_state() for rank in range(len(states))]
    acting[0] = act_rng.get_state()
    states = torch.cat((torch.stack(acting)[:, None], states), 1)  # [K, 3, bytes]
    states[0, -1] = torch.get_rng_state()
    return states
