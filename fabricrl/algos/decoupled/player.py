"""The player as a trainer sees it: whose orders it obeys, and who gets its answers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fabricrl.algos.decoupled.messages import Messages
from fabricrl.algos.run import Run
from fabricrl.data import Replay
from fabricrl.utils.checkpoint import save_shard
from fabricrl.utils.decoupled import (
    ABORT,
    KEEPALIVE,
    PLAYER,
    SAVE,
    STOP,
    TRAIN,
    Answer,
    Channel,
    EndedByPeerError,
    Hello,
    Order,
    Outbox,
    Packet,
    Ready,
    State,
)
from fabricrl.utils.errors import LostPeerError, RunError
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.process import freeze_gc
from fabricrl.utils.run import rank_generators


class Player:
    """The player as a trainer sees it; several as if they were one.

    Attributes:
        count: how many there are.
        iteration: the one that is trained on.
        exit_code: that of the last Order.
        folder: the run's.
        skips: True if some of the player's steps only reset an environment.
    """

    def __init__(self, run: Run, channel: Channel) -> None:
        self.run, self.channel, self.count = run, channel, run.args.players
        self.speaks = run.fabric.global_rank == 0  # the first trainer, for all of them
        self.iteration = self.exit_code = 0
        self.folder, self.skips = Path(), False
        self._messages: Messages | None = None
        self._dismissed = self._ready = False
        self._bulk = self._next_bulk = False  # the record of this Order's data, and of the next one's

    def meet(self, messages: Messages) -> Path:
        """← Hello: waits until all players are ready; the run's folder.

        Raises:
            RunError: without text, if the players cannot start, who have said why; or one starts from other parameters.
        """
        run = self.run
        run.restore_generators()
        hello, *others = (self._receive(Packet(Hello()), rank) for rank in range(self.count))
        self.folder = Path(bytes(hello.folder.tolist()).rstrip(b"\0").decode())
        self.skips = hello.skips
        self._messages, max_lag = messages, run.args.max_lag
        messages.full_precision = run.args.weights_precision == "fp32"
        self._orders = {k: [Packet(order) for _ in range(self.count)] for k, order in messages.orders().items()}
        self._answers, self._states = (
            Outbox(messages.answer(), max_lag + 2),
            Outbox(messages.state(run.fabric.world_size), 1),
        )
        with run.failing_together():
            if {hello.hash, *(other.hash for other in others)} != {int(parameter_hash(messages.agent))}:
                us = f"rank {self.channel.rank}"
                raise RunError(
                    f"{us} starts with different parameters from the player's: does the environment draw from torch?"
                )
        return self.folder

    def orders(self, rb: Replay | None = None, refill: bool = False) -> Iterator[Order]:
        """→ Ready, then ← Order of each iteration, until the player stops. Its tensors are overwritten by the next.

        Those of several players come as one, with the data of all: their records have a method `joined`.

        Args:
            rb: this trainer's replay buffer, if it has one: saved with each checkpoint.
            refill: whether a run that is resumed has to fill a new replay buffer first.

        Raises:
            OutputError: the replay buffer cannot be saved.
            RunError: without text, if the player has failed; it has said why.
        """
        freeze_gc()
        self._say(Packet(Ready()).fill(Ready(refill=refill)))
        self._ready = True
        while (order := self._receive_order()).command in (TRAIN, SAVE):
            self.iteration = order.iteration
            if order.command == SAVE:
                self._save(order, rb)
            else:
                yield self._whole(order)
            self.iteration += 1
        self.channel.flush()
        self.exit_code = order.code

    def answer(self, order: Order) -> None:
        """→ Answer, if the order wants one.

        Raises:
            NonFiniteError: a metric or a parameter is not finite.
        """
        assert self._messages is not None
        if not order.answers:
            return
        run, messages, metrics = self.run, self._messages, {}
        with run.failing_together():
            if order.wants_losses or run.fetch_is_due or not run.metrics.is_healthy():
                metrics = run.metrics.fetch()
        if self.speaks:
            noted = [metrics.get(tag, torch.zeros(0)) for tag in messages.metrics]
            losses = torch.tensor([[m.sum() for m in noted], [m.numel() for m in noted]]) if metrics else None
            answer = Answer(0, run.exit_code, *self.channel.lap(), losses, messages.weights)
            self._say(self._answers.pack(answer))

    def _save(self, order: Order, rb: Replay | None) -> None:
        """→ Answer, → State, once the replay buffer is saved."""
        assert self._messages is not None
        run = self.run
        generators = rank_generators(run.fabric, run.train_rng)
        if rb is not None and run.args.checkpoint_buffer:
            with run.failing_together():
                save_shard(self.folder / "checkpoints", order.step, run.fabric.global_rank, run.shard(rb))
        self.answer(order)
        if self.speaks:
            state = State(generators, self._messages.learned)
            self.channel.send(self._states.pack(state), PLAYER, self.iteration)

    def report_failure(self, code: int) -> None:
        """→ Ready, or Answer and then ← Order until the player ends, too: the trainers have failed, with this code."""
        if self._dismissed:
            return
        with contextlib.suppress(RunError):
            if not self._ready:
                self._say(Packet(Ready()).fill(Ready(code)))
                self.channel.flush()
                return
            self._say(self._answers.pack(self._answers.record._replace(code=code, losses=None)))
            while (order := self._receive_order()).command != STOP:
                if order.command == TRAIN:
                    self._whole(order)

    def await_hello(self) -> None:
        """← Hello, if it has not come.

        Raises:
            RunError: without text, if the player has failed; it has said why.
        """
        if self._messages is None and not self._dismissed:
            with contextlib.suppress(LostPeerError):
                self._receive(Packet(Hello()))

    def _say(self, packet: Packet) -> None:
        """→ Ready or Answer, to every player."""
        for rank in range(self.count if self.speaks else 0):
            self.channel.send(packet, rank, self.iteration)

    def _receive_order(self) -> Order:
        """← Order of the first player."""
        self._bulk = self._next_bulk
        order = self._receive(self._orders[self._bulk][PLAYER])
        while order.command == KEEPALIVE:
            order = self._receive(self._orders[self._bulk][PLAYER])
        self._next_bulk = order.bulk
        return order

    def _whole(self, order: Order) -> Order:
        """← Order of the other players, whose data join those of the first."""
        others = [self._receive(self._orders[self._bulk][rank], rank).data for rank in range(1, self.count)]
        return order._replace(data=order.data.joined(others)) if others else order

    def _receive(self, packet: Packet, rank: int = PLAYER) -> Any:
        """← Hello or Order, unless it is to end at once."""
        record = self.channel.receive(packet, rank, self.iteration)
        if record.command == ABORT:
            self._dismissed = True
            raise EndedByPeerError(record.code)
        return record
