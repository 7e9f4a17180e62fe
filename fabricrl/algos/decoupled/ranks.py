"""Ranks of a decoupled run: which of them play and which train, and how a fault of one ends all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from fabricrl.algos.decoupled.player import Player
from fabricrl.algos.decoupled.trainers import Trainers
from fabricrl.algos.run import Run
from fabricrl.utils.decoupled import (
    PLAYER,
    Channel,
    EndedByPeerError,
    Group,
    check_players,
    make_groups,
    player_device,
    trainer_device,
)
from fabricrl.utils.ending import end_if_out_of_memory, is_communication_error, reason, report
from fabricrl.utils.errors import LostPeerError, RunError
from fabricrl.utils.launch import ranks_to_start
from fabricrl.utils.process import own_rank


class Endpoint(Protocol):
    """An end that can tell the other of its failure."""

    run: Run
    iteration: int

    def report_failure(self, code: int) -> None: ...


@contextmanager
def reporting_failures(end: Endpoint, first_rank: int = PLAYER) -> Iterator[None]:
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
        end.report_failure(error.exit_code)
        raise
    except RunError as error:
        if own_rank() == error.told_by + first_rank:  # before the others end, which may end this process
            report(str(error), error.exit_code, own_rank())
        end.report_failure(error.exit_code)
        raise EndedByPeerError(error.exit_code) from error
    except (RuntimeError, MemoryError) as error:
        end_if_out_of_memory(error, end.run.global_args)
        if isinstance(error, MemoryError) or not is_communication_error(error):
            raise
        who = "trainer" if first_rank else "player"
        lost = f"rank {own_rank()} lost another {who} in iteration {end.iteration}"
        report(f"{lost}: {reason(error)}", LostPeerError.exit_code)
        end.report_failure(LostPeerError.exit_code)
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
    """Does this rank's part of a decoupled run, the player's or a trainer's. Returns its exit code.

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
        with reporting_failures(trainers):
            device = player_device(args, fabric)
            if args.max_lag > 0:  # what each sees is its own
                run.args = replace(args, num_envs=args.num_envs // players, players=1)
                run.join(Group(fabric, team, device))
            else:  # each sees all, as if it were alone
                run.join(Group(fabric, device=device), Group(fabric, team, device))
            return player(run.args, run, trainers)
    run.join(Group(fabric, learners, trainer_device(fabric)))
    end = Player(run, Channel(world, players * (args.max_lag + 1)))
    try:
        with reporting_failures(end, players), before_hello(end):
            trainer(args, run, end)
    finally:
        run.runner.release()
    return end.exit_code
