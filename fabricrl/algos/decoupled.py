"""Both ends of a decoupled run: `Trainers`, whom a player drives, and `Player`, whom a trainer obeys.

    Hello    player → each trainer    once: it is ready
    Ready    trainer 1 → player       once: so are the trainers
    Order    player → each trainer    the data of an iteration or of several, and what to do with them
    Answer   trainer 1 → player       the weights to act with, if an update was due; losses, faults and signals
    State    trainer 1 → player 1     what else a checkpoint holds, at one

A checkpoint has an Order of its own, because an evaluation may decide whether one is due. With `--max-lag 0`
a player waits for the Answer to its Order, with K it is up to K iterations ahead of it. After the last iteration an
Order ends the trainers; after a fault, whoever has it tells the others, by Order, Ready or Answer.

Several players are a world of their own, as several ranks of a coupled script are: they agree on faults and signals,
share statistics, and do the same at the same time. Each sends the data of its environments; the first leads: it alone
orders what is not training, and writes. With `--max-lag 0` each also sees every step of all environments
(`envs/shared.py`), and computes what one player would.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fabricrl.algos.run import Run
from fabricrl.data import Replay
from fabricrl.utils.checkpoint import save_shard
from fabricrl.utils.decoupled import (
    ABORT,
    KEEPALIVE,
    PATH_MAX,
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
    Outbox,
    Packet,
    Ready,
    State,
    add_acting_generators,
    check_players,
    make_groups,
    player_device,
    trainer_device,
)
from fabricrl.utils.ending import end_if_out_of_memory, is_communication_error, reason, report
from fabricrl.utils.errors import LostPeerError, RunError, require
from fabricrl.utils.launch import ranks_to_start
from fabricrl.utils.metric import Stopwatch
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.process import freeze_gc, own_rank
from fabricrl.utils.run import rank_generators

__all__ = ["Messages", "Player", "Trainers", "checked", "run_ranks"]


class Messages:
    """Declaration of what the two ends exchange; both make one.

    Args:
        data: what a trainer is sent in an iteration, a NamedTuple; its values do not matter.
        metrics: tags of the losses.
        agent: what is trained.
        acting: the optimizer of the parameters that the policy acts with, which come back after each update.
        others: the other optimizers.
        bulk: the record in which data of several iterations travel together, if there are such.
        most: how many iterations these may be.
        beside: parameters that other optimizers train and the policy acts with as well, such as an encoder's.

    Attributes:
        exact: weights travel to players as they are; else rounded, and a checkpoint brings those that are not.
    """

    exact = True

    def __init__(
        self,
        data: Any,
        metrics: tuple[str, ...],
        agent: nn.Module,
        acting: Adam,
        *others: Adam,
        bulk: Any = None,
        most: int = 1,
        beside: Iterable[nn.Parameter] = (),
    ) -> None:
        self._beside = list(beside)
        self.metrics, self.agent, self.acting, self.most = metrics, agent, acting, most
        self._data = {False: data} if bulk is None else {False: data, True: bulk}
        self.optimizers = (acting, *others)
        for optimizer in self.optimizers:
            optimizer.follow()
        trained = {id(parameter) for optimizer in self.optimizers for parameter in optimizer.flat.parameters}
        self._targets = [parameter for parameter in agent.parameters() if id(parameter) not in trained]

    @property
    def weights(self) -> Tensor:
        """The parameters that the policy acts with, [P]; a view if they are those of a single optimizer."""
        vector = self.acting.flat.vector
        beside = [parameter.detach().flatten() for parameter in self._beside]
        return torch.cat((vector, *beside)) if beside else vector

    @property
    def learned(self) -> list[Tensor]:
        """Tensors that training changes besides: parameters, moments, and what follows parameters, as targets do."""
        vector, *moments = self.acting.tensors()
        others = [tensor for other in self.optimizers[1:] for tensor in other.tensors()]
        return moments + others + self._targets + ([] if self.exact else [vector])

    @torch.no_grad()
    def load_weights(self, weights: Tensor) -> None:
        """Takes the parameters [P] that the policy is to act with."""
        owns = [self.acting.flat.vector, *self._beside]
        for own, part in zip(owns, weights.split([own.numel() for own in owns]), strict=True):
            own.copy_(part.view_as(own))

    @torch.no_grad()
    def load(self, learned: list[Tensor]) -> None:
        """Takes what the other end has learned."""
        for own, sent in zip(self.learned, learned, strict=True):
            own.copy_(sent)
        for optimizer in self.optimizers:
            optimizer.flat.compare_steps()

    @torch.no_grad()
    def round_weights(self) -> None:
        """Rounds the parameters of a player to those that it would have been sent."""
        if not self.exact:
            self.load_weights(self.weights.bfloat16())

    def orders(self) -> dict[bool, Order]:
        """The Order of each kind: False, of one iteration; True, of several."""
        return {bulk: Order(TRAIN, 0, 0, 0, False, False, False, data) for bulk, data in self._data.items()}

    def answer(self) -> Answer:
        weights = self.weights if self.exact else self.weights.bfloat16()
        return Answer(0, 0, 0.0, 0.0, torch.zeros(2, len(self.metrics), dtype=torch.float64), weights)

    def state(self, count: int) -> State:
        return State(torch.zeros(count, 2, *torch.get_rng_state().shape, dtype=torch.uint8), self.learned)


class Trainers:
    """The trainers as a player sees them.

    Attributes:
        count: how many; first: the rank of the first.
        leads: True for the first player.
        ahead: iterations whose data have been sent and whose weights have not come back: what the policy lags behind.
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
        messages.exact = run.args.weights_precision == "fp32"
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
        self._lag, self._held = max(self._lag, len(self.ahead)), self._held + 1
        if bulk and not (due or wants_losses) and self._messages is not None and self._held < self._messages.most:
            self.iteration += 1
            return
        run.clock.lap("train")
        self.collect(max(max_lag, 1) - 1)
        run.clock.lap("wait_player")
        self.send(shares, bulk, answers=due or wants_losses, wants_losses=wants_losses)
        run.clock.lap("comm")
        self.collect(0 if run.is_last or saves or run.evaluation_is_due else max_lag)
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

    def collect(self, most: int) -> None:
        """← Answer of the oldest iterations, until the player is `most` ahead."""
        assert self._messages is not None
        while len(self.ahead) > most:
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
        self.collect(0)
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
        self.collect(0)
        self._dismiss(STOP, self.run.exit_code)

    def tell(self, code: int) -> None:
        """→ Order, or Hello: the players have failed, with this exit code."""
        self._dismiss(ABORT, code)

    def _dismiss(self, command: int, code: int) -> None:
        """Of several players the first tells all trainers; the others stay until what they have sent is there."""
        with contextlib.suppress(LostPeerError):  # who is gone needs no order
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
        messages.exact = run.args.weights_precision == "fp32"
        self._orders = {k: [Packet(order) for _ in range(self.count)] for k, order in messages.orders().items()}
        self._answers, self._states = (
            Outbox(messages.answer(), max_lag + 2),
            Outbox(messages.state(run.fabric.world_size), 1),
        )
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

    def tell(self, code: int) -> None:
        """→ Answer, or Ready: the trainers have failed, with this exit code. Waits until the player ends, too."""
        if self._dismissed:
            return
        with contextlib.suppress(RunError):
            if self._ready:
                self._say(self._answers.pack(self._answers.record._replace(code=code, losses=None)))
            else:
                self._say(Packet(Ready()).fill(Ready(code)))
                self.channel.flush()
            while self._messages is not None and (order := self._receive_order()).command != STOP:
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


class End(Protocol):
    """An end that can tell the other of its failure."""

    run: Run
    iteration: int

    def tell(self, code: int) -> None: ...


@contextmanager
def telling(end: End, first_rank: int = PLAYER) -> Iterator[None]:
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
        end.tell(error.exit_code)
        raise
    except RunError as error:
        if own_rank() == error.told_by + first_rank:  # before the others end, which may end this process
            report(str(error), error.exit_code, own_rank())
        end.tell(error.exit_code)
        raise EndedByPeerError(error.exit_code) from error
    except (RuntimeError, MemoryError) as error:
        end_if_out_of_memory(error, end.run.global_args)
        if isinstance(error, MemoryError) or not is_communication_error(error):
            raise
        who = "trainer" if first_rank else "player"
        lost = f"rank {own_rank()} lost another {who} in iteration {end.iteration}"
        report(f"{lost}: {reason(error)}", LostPeerError.exit_code)
        end.tell(LostPeerError.exit_code)
        raise EndedByPeerError(LostPeerError.exit_code) from error


@contextmanager
def before_hello(end: Player) -> Iterator[None]:
    """Takes Hello before a trainer's early fault is reported: the player has often had the same, and reports it."""
    try:
        yield
    except RunError:
        end.await_hello()
        raise


def checked(args: Any, check: Callable[[Any, int], None]) -> Any:
    """The arguments, checked against the ranks that are to be started, if it is this process that starts them.

    A run that is resumed may change some of them to what its checkpoint has; they are checked in `run_ranks`.

    Args:
        check: a function (arguments, trainers) that raises ConfigError if so many cannot share the work equally.

    Raises:
        ConfigError: they do not fit these ranks.
    """
    ranks = ranks_to_start(args)
    if ranks and args.resume is None:
        check_players(args.players, ranks)
        check(args, ranks - args.players)
    return args


def run_ranks(
    run: Run,
    player: Callable[[Any, Run, Trainers], int],
    trainer: Callable[[Any, Run, Player], None],
    check: Callable[[Any, int], None],
) -> int:
    """Does this rank's part of a decoupled run, the player's or a trainer's; its exit code.

    Args:
        check: as for `checked`.

    Raises:
        ConfigError: there is nobody but players, or no GPU for them; or trainers cannot share the work equally.
        LostPeerError: another rank is gone, or silent for `--timeout` minutes; says which, and in which message.
    """
    args, fabric, players = run.args, run.fabric, run.args.players
    with run.failing_together():  # none leaves while another is still about to meet the rest
        check(args, max(fabric.world_size - players, 1))
    world, team, learners = make_groups(fabric, players, args.timeout)
    if fabric.global_rank < players:
        trainers = run.trainers = Trainers(run, Channel(world, (fabric.world_size - players) * (args.max_lag + 1)))
        with telling(trainers):
            device = player_device(args, fabric)
            if args.max_lag > 0:  # what each sees is its own
                run.args = replace(args, num_envs=args.num_envs // players, players=1)
                run.join(Group(fabric, team, device))
            else:  # each sees all, as if it were alone
                run.join(Group(fabric, device=device), Group(fabric, team, device))
            return player(run.args, run, trainers)
    run.join(Group(fabric, learners, trainer_device(fabric)))
    end = Player(run, Channel(world, players * (args.max_lag + 1)))
    with telling(end, players), before_hello(end):
        trainer(args, run, end)
    return end.exit_code
