"""The trainers as a player sees them: it orders updates, and takes the weights that come back."""

import contextlib
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from fabricrl.algos.decoupled.messages import Messages
from fabricrl.algos.run import Run
from fabricrl.utils.decoupled import (
    ABORT,
    KEEPALIVE,
    PATH_MAX,
    PLAYER,
    SAVE,
    STOP,
    Channel,
    EndedByPeerError,
    Hello,
    Outbox,
    Packet,
    Ready,
    add_acting_generators,
)
from fabricrl.utils.errors import LostPeerError, require
from fabricrl.utils.metric import Stopwatch
from fabricrl.utils.model import parameter_hash


class Trainers:
    """The trainers as a player sees them.

    Attributes:
        count: how many; first: the rank of the first.
        leads: True for the first player.
        ahead: iterations whose data have been sent and whose weights have not been taken: what the policy lags behind.
        iteration: the next.
        bulk: True if the next order is of many iterations.
        refill: True if a run that is resumed has to fill a new replay buffer first.
    """

    def __init__(self, run: Run, channel: Channel) -> None:
        self.run, self.channel, self.first = run, channel, run.args.players
        self.count, self.leads = channel.world_size - self.first, channel.rank == PLAYER
        self.ahead: deque[int] = deque()
        self.iteration, self.bulk, self.refill = 0, False, False
        self._held = 0  # iterations whose data wait
        self._spoke = 0.0  # when the last Order was sent
        run.while_evaluating = self.send_keepalive
        self._messages: Messages | None = None
        self._listening = True  # the trainers, until they say that they cannot start
        self._lag = 0  # the most since the last log entry
        self._waited = self._passed = 0.0

    def begin(self, messages: Messages) -> None:
        """→ Hello, ← Ready: all start from the same parameters.

        Raises:
            RunError: without text, if a trainer cannot start; it has said why.
        """
        run = self.run
        name = str(run.folder).encode()
        require(len(name) <= PATH_MAX, "log_dir", run.folder, f"a path of at most {PATH_MAX} bytes")
        folder = torch.frombuffer(bytearray(name.ljust(PATH_MAX, b"\0")), dtype=torch.uint8)
        hello = Hello(hash=int(parameter_hash(messages.agent)), skips=run.skips, folder=folder)
        self._each(Outbox(Hello(), self.count), hello)
        self._messages = messages
        messages.full_precision = run.args.weights_precision == "fp32"
        messages.round_weights()
        turns = self.count * (run.args.max_lag + 2)
        self._orders = {bulk: Outbox(order, turns) for bulk, order in messages.orders().items()}
        self._answer, self._state = Packet(messages.answer()), Packet(messages.state(self.count))
        run.clock = Stopwatch("env", "act", "train", "comm", "wait_player", "log")
        if run.needs_warmup:
            with run.warmup():  # of acting, while trainers warm up their updates
                pass
        ready = self.channel.receive(Packet(Ready()), self.first, self.iteration)
        if ready.code:
            self._listening = False
            raise EndedByPeerError(ready.code)
        self.refill = ready.refill

    def train(self, shares: Iterable[Any], due: bool = True, bulk: bool = False) -> None:
        """The line `train(...)` of the coupled script, done by others: → Order, ← Answer.

        Notes losses and takes weights: the newest, where a checkpoint or an evaluation is due.

        Args:
            shares: the record for each trainer; not asked for where data may wait.
            due: whether updates are.
            bulk: whether data may wait for those of further iterations, as long as nothing is due.

        Raises:
            RunError: without text, if an update failed; the trainer has said why.
        """
        run, max_lag = self.run, self.run.args.max_lag
        saves, logs = run.checkpoint_is_due, run.log_is_due
        # As a coupled run fetches them: after a rollout, or now and then
        wants_losses = saves or logs or hasattr(run.args, "num_steps")
        iteration, self._held = self.iteration, self._held + 1
        self._lag = max(self._lag, iteration - self.ahead[0] if self.ahead else 0)
        run.clock.lap("train")
        self.collect(iteration - max(max_lag, 1))
        run.clock.lap("wait_player")
        may_wait = bulk and not (due or wants_losses)
        if may_wait and self._messages is not None and self._held < self._messages.max_iterations:
            self.iteration += 1
            return
        self.send(shares, bulk, answers=due or wants_losses, wants_losses=wants_losses)
        run.clock.lap("comm")
        self.collect(iteration - (0 if run.is_last or saves or run.evaluation_is_due else max_lag))
        if logs:
            run.charts = {"charts/lag": self._lag, "time/wait_trainer": self._waited / max(self._passed, 1e-9)}
            self._lag, self._waited, self._passed = 0, 0.0, 0.0
        run.clock.lap("wait_player")

    def send(self, shares: Iterable[Any], bulk: bool = False, **wanted: bool) -> None:
        """→ Order: its record to each trainer, and what is `wanted` of it. `bulk`: the next one is of many."""
        order = self._orders[self.bulk].record._replace(step=self.run.global_step, iteration=self.iteration, bulk=bulk)
        for rank, share in enumerate(shares, self.first):
            packet = self._orders[self.bulk].pack(order._replace(data=share, **wanted))
            self.channel.send(packet, rank, self.iteration)
        if wanted.get("answers"):
            self.ahead.append(self.iteration)
        self.iteration, self.bulk, self._held = self.iteration + 1, bulk, 0
        self._spoke = time.monotonic()

    def send_keepalive(self) -> None:
        """→ Order: keeps trainers from timing out during a long evaluation."""
        quarter = 15 * self.run.args.timeout  # of what they wait, in seconds
        if 0 < quarter < time.monotonic() - self._spoke:
            self._spoke = time.monotonic()
            self._command(KEEPALIVE)

    def collect(self, last: int) -> None:
        """← Answer of each iteration up to the `last`, where one was wanted: the oldest first."""
        assert self._messages is not None
        while self.ahead and self.ahead[0] <= last:
            iteration = self.ahead.popleft()
            answer = self.channel.receive(self._answer, self.first, iteration)
            if answer.code == LostPeerError.exit_code:
                lost = f"rank {self.channel.rank} lost a trainer in iteration {iteration}"
                raise LostPeerError(f"{lost}: rank {self.first} says so")
            if answer.code:
                raise EndedByPeerError(answer.code)
            self.run.exit_code = max(self.run.exit_code, answer.signal)
            self._waited, self._passed = self._waited + answer.waited, self._passed + answer.passed
            if answer.losses is not None:
                for tag, total, count in zip(self._messages.metrics, *answer.losses.clone(), strict=True):
                    if count:
                        self.run.losses.add(tag, total, int(count))
            self._messages.load_weights(answer.weights)

    def save(self) -> None:
        """→ Order, ← Answer, ← State: takes what a checkpoint holds besides; trainers save their replay buffers.

        The first of several players alone does more than wait for the Answer, as it is the one that writes.

        Raises:
            RunError: without text, if a trainer cannot save; it has said why.
        """
        assert self._messages is not None
        run, iteration = self.run, self.iteration - 1  # the one that has ended
        self._command(SAVE, step=run.global_step, iteration=iteration, answers=True)
        self.ahead.append(iteration)
        self.collect(iteration)
        if not self.leads:
            run.generators = torch.empty(0)
            return
        state = self.channel.receive(self._state, self.first, iteration)
        self._messages.load(state.learned)
        run.generators = add_acting_generators(state.generators, run.act_rng, run.args.seed, run.global_step)

    def saved(self) -> None:
        """Goes on, once a checkpoint is written, with the weights that the player had before."""
        assert self._messages is not None
        self._messages.round_weights()

    def stop(self) -> None:
        """← Answer of what is still under way, as before an early end; → Order, the last one: the run is over."""
        self.collect(self.iteration)
        self._dismiss(STOP, self.run.exit_code)

    def report_failure(self, code: int) -> None:
        """→ Order, or Hello: the players have failed, with this exit code."""
        self._dismiss(ABORT, code)

    def _dismiss(self, command: int, code: int) -> None:
        """Of several players the first tells all trainers; the others stay until what they have sent is there."""
        with contextlib.suppress(LostPeerError):  # who is gone needs no order
            if not self._listening:
                return
            if self._messages is not None:
                self._command(command, code=code)
            elif self.leads:
                self._each(Outbox(Hello(), self.count), Hello(command, code))
            if code != LostPeerError.exit_code:  # there one may not be listening
                self.channel.flush()

    def _command(self, command: int, **fields: Any) -> None:
        """→ Order, without data, of the first player."""
        orders = self._orders[self.bulk]
        if self.leads:
            self._each(orders, orders.record._replace(command=command, bulk=self.bulk, **fields))

    def _each(self, outbox: Outbox, record: Any) -> None:
        for rank in range(self.first, self.channel.world_size):
            self.channel.send(outbox.pack(record), rank, self.iteration)
