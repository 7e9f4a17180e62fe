"""Updates of off-policy algorithms: when they are due, and how batches are drawn and trained on."""

import math
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fabricrl.algos.off_policy.args import EntropyArgs, OffPolicyArgs
from fabricrl.algos.run import Run
from fabricrl.data import Batch, DeviceReplayBuffer, Replay
from fabricrl.utils.errors import CheckpointError, require

MAX_CAPTURED = 64  # updates in all graphs together


def make_schedule(run: Run) -> "UpdateSchedule":
    """Makes the schedule of updates.

    Raises:
        ConfigError: learning would never start, or batches do not fit into memory.
        CheckpointError: the temperature was learned in the run that is resumed, and is fixed here, or the other way.
    """
    args = run.args
    with run.failing_together():
        if isinstance(args, EntropyArgs) and run.state and run.state["args"]["autotune"] != args.autotune:
            there, here = ("fixed", "learned") if args.autotune else ("learned", "fixed")
            raise CheckpointError(f"--autotune: the temperature was {there} in the checkpoint and is {here} now")
        schedule = UpdateSchedule(args, run.fabric.world_size if run.trainers is None else 1, run.team.global_rank == 0)
        if run.trainers is None:  # who check for themselves
            args.check_batches(run.fabric.world_size)
    return schedule


class UpdateSchedule:
    """Critic updates that are due: exactly `replay_ratio` times the steps since learning started, resumed or not.

    Attributes:
        starts: environment steps, over all ranks, after which updates are due.
        done: critic updates taken, or handed out by `take`, so far.
    """

    def __init__(self, args: OffPolicyArgs, batches: int = 1, speaks: bool = True) -> None:
        """`batches`: that one update is made of, a rank each. Raises ConfigError if learning would never start."""
        self.args, self.ratio = args, Fraction(str(args.replay_ratio))  # exact, which a float is not
        self.least = max(args.learning_starts, args.batch_size * batches)
        if self.least > args.learning_starts and speaks:
            print(f"warning: learning starts after {self.least} steps, a batch of each rank", file=sys.stderr)
        self.starts, self.before, self.done = self.least, 0, 0
        allowed = f"above {self.least}, when learning starts"
        require(args.total_timesteps > self.least, "total_timesteps", args.total_timesteps, allowed)
        steps = args.total_timesteps - self.least
        allowed = f"such that the {steps} steps after learning starts have an update"
        require(int(self.ratio * steps) > 0, "replay_ratio", args.replay_ratio, allowed)

    def explores(self, step: int) -> bool:
        """Tells if actions are drawn uniformly: until learning starts."""
        return self.done == 0 and step < self.starts

    def take(self, step: int) -> tuple[int, int]:
        """Number of the first update that is due after `step` environment steps, from 1, and how many are."""
        first = self.done + 1
        self.done = max(self.done, self.before + int(self.ratio * max(step - self.starts, 0)))
        return first, self.done + 1 - first

    def steps_due(self, before: int, now: int) -> int:
        """Number of environment steps after `before`, up to `now`, for which updates are due."""
        return min(max(now - self.starts, 0), now - before)

    def state_dict(self) -> dict[str, Any]:
        counters = {"starts": self.starts, "before": self.before, "done": self.done}
        return counters | {"least": self.least, "ratio": self.args.replay_ratio}

    def load_state_dict(self, state: dict[str, Any], step: int, refill: bool) -> None:
        """Continues after `step` environment steps.

        Counts afresh, without catching up, if the buffer has to be refilled or the ratio has changed; before the first
        update, a changed `learning_starts` takes effect.
        """
        self.starts, self.before, self.done = state["starts"], state["before"], state["done"]
        if not self.done and self.least != state["least"]:
            self.starts = max(step, self.starts + self.least - state["least"])
        if refill:
            self.starts, self.before = step + self.least, self.done
        elif state["ratio"] != self.args.replay_ratio:
            self.starts, self.before = max(step, self.starts), self.done


class SampleAndTrain:
    """Draws batches and trains on them: on a GPU as one CUDA graph, the sampling included if the buffer is there.

    Args:
        train: a function (batches [K, B, ...], plan) → metrics by their tags.
        every: numbers of updates after which something happens besides, such as an update of the targets.
    """

    def __init__(self, run: Run, rb: Replay, train: Callable[..., dict[tuple[str, ...], Tensor]], *every: int) -> None:
        self._run, self._rb, self._train, self._every = run, rb, train, every
        self._period = period = math.lcm(*every)  # after which the pattern repeats
        self._on_device = run.captured(lambda count, *plan: self._watched(self._sample(count, run.device_rng), *plan))
        self._on_batches = run.captured(self._watched)
        due = Fraction(str(run.args.replay_ratio)) * run.args.num_envs * run.fabric.world_size
        counts = {math.floor(due), math.ceil(due)} if run.captures else set()  # an iteration's
        self._counts = {1} | {count for count in counts if 0 < count * period <= MAX_CAPTURED}

    def __call__(self, count: int, *plan: Any) -> None:
        """Draws K batches, trains on them as planned, and keeps the metrics for the log."""
        run = self._run
        if isinstance(self._rb, DeviceReplayBuffer):
            metrics = self._on_device(count, *plan)
        else:
            metrics = self._on_batches(self._sample(count, run.train_rng).to(run.fabric.device), *plan)
        for tags, values in metrics.items():
            run.add_metrics(tags, values)

    def kinds(self) -> Iterator[tuple[int, int]]:
        """Yields (first, count) for each kind of call that a run makes, for the warm-up."""
        yield from ((first, 1) for first in (1, *self._every, self._period))
        yield from ((first, count) for count in self._counts - {1} for first in range(1, self._period + 1))

    def parts(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """The updates that are due, all at once; or one by one, where graphs would be too many or too large."""
        if not self._run.captures or count in self._counts:
            yield from [(first, count)] if count else []
        else:
            yield from ((number, 1) for number in range(first, first + count))

    def _sample(self, count: int, rng: torch.Generator) -> Batch:
        return self._rb.sample(count, self._run.args.batch_size, rng)

    def _watched(self, batches: Batch, *plan: Any) -> dict[tuple[str, ...], Tensor]:
        metrics = self._train(batches, *plan)
        self._run.metrics.watch(metrics.values())
        return metrics
