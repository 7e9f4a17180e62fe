"""Replay buffers of off-policy algorithms, and the schedule of their updates."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric

from fabricrl.algos.off_policy.args import EntropyArgs, OffPolicyArgs
from fabricrl.algos.run import Run
from fabricrl.data.buffers import NewestSteps, ReplayBuffer, record_type
from fabricrl.data.memory import GIB, check_memory
from fabricrl.utils.checkpoint import load_shard, reading, shard_ranks
from fabricrl.utils.errors import CheckpointError, from_here
from fabricrl.utils.launch import ranks_here
from fabricrl.utils.ranks import all_max
from fabricrl.utils.utils import require

BLOCK = 64  # steps of exploration that travel together


def make_schedule(run: Run) -> "UpdateSchedule":
    """Makes the schedule of updates.

    Raises:
        ConfigError: learning would never start, or the buffers of this machine's ranks do not fit into its memory.
        CheckpointError: the temperature was learned in the run that is resumed, and is fixed here, or the other way.
    """
    args = run.args
    with run.together():
        if isinstance(args, EntropyArgs) and run.state and run.state["args"]["autotune"] != args.autotune:
            there, here = ("fixed", "learned") if args.autotune else ("learned", "fixed")
            raise CheckpointError(f"--autotune: the temperature was {there} there and is {here} here")
        schedule = UpdateSchedule(args, run.fabric)
        record = record_type(run.obs_space, int(np.prod(run.action_space.shape)), args.implicit_next_obs)
        if not args.buffer_memmap:
            check_memory(args.buffer_size * record.itemsize, ranks_here(run.fabric), args.implicit_next_obs)
    return schedule


def make_buffer(run: Run, folder: Path | None = None) -> ReplayBuffer:
    """The replay buffer of this rank; rank 0 prints what it takes. `folder`: the run's, where another rank has made it.

    A decoupled player has only the newest steps: each trainer keeps the transitions of its environments.

    Raises:
        ConfigError: it does not fit into memory or onto the disk.
    """
    args, folder = run.args, (folder or run.folder) if run.args.buffer_memmap else None
    shape = args.num_envs, run.obs_space, int(np.prod(run.action_space.shape))
    if run.trainers is not None:
        return NewestSteps(BLOCK, *shape)
    with run.together():
        rb = ReplayBuffer(args.buffer_size, *shape, args.gamma, args.n_step, args.implicit_next_obs, folder)
    if run.fabric.global_rank == 0:
        where = f"in a temporary file in {from_here(folder)}" if folder else "in memory"
        size = f"{rb.capacity * rb.num_envs} transitions, {rb.num_bytes / GIB:.3f} GiB"
        print(f"replay buffer: {size} per rank, {where}", file=sys.stderr, flush=True)
    return rb


def restore_replay(run: Run, rb: ReplayBuffer, schedule: "UpdateSchedule | None" = None) -> bool:
    """Goes on with the buffer and the schedule of the checkpoint that is resumed; True if a new buffer is to be filled.

    A decoupled player has no buffer, a trainer no schedule.

    Raises:
        CheckpointError: as `restore_buffer`.
    """
    refill = False
    if run.state and run.path:
        with run.together(), reading(run.path):
            if run.trainers is None:
                refill = not restore_buffer(rb, run.state, run.path, run.args, run.fabric)
            else:
                refill = run.trainers.refill
            if schedule is not None:
                schedule.load_state_dict(run.state["schedule"], run.global_step, refill)
    return refill


def restore_buffer(rb: ReplayBuffer, state: dict[str, Any], path: Path, args: Any, fabric: Fabric) -> bool:
    """Fills the buffer with this rank's part of a checkpoint; whether it did. Rank 0 says so if not.

    Raises:
        CheckpointError: the part is missing or does not fit, and neither `checkpoint_buffer` was off in the run that
            saved it nor `allow_empty_buffer` is on.
    """
    problem: CheckpointError | None = None
    stored = state["args"]["checkpoint_buffer"]
    if stored:
        try:
            with reading(path):  # also what is no buffer at all: every rank has to come to the next line
                load_buffer(rb, state, path, fabric)
        except CheckpointError as error:
            problem = error
        if not all_max(fabric, int(problem is not None)):
            return True
        if not args.allow_empty_buffer:
            if problem is None:
                return False  # the rank that it concerns says why, and ends all
            raise CheckpointError(f"{problem}; --allow-empty-buffer goes on without, after filling a new one")
        if problem is not None:
            print(f"warning: {from_here(problem)}", file=sys.stderr, flush=True)
    if fabric.global_rank == 0:
        steps = max(args.learning_starts, args.batch_size * fabric.world_size)
        left = args.total_timesteps - state["global_step"]
        after = "before the next update" if steps < left else f"and only {left} are left, so nothing is learned"
        print(f"the replay buffer starts empty: {steps} steps fill it {after}", file=sys.stderr, flush=True)
    rb.clear()
    return False


def load_buffer(rb: ReplayBuffer, state: dict[str, Any], path: Path, fabric: Fabric) -> None:
    """Loads this rank's environments from a checkpoint of as many ranks, or of another number.

    Raises:
        CheckpointError: a part is missing, or of another layout.
    """
    shards, world_size = shard_ranks(state), fabric.world_size
    if len(shards) in (0, world_size):
        rb.load_state_dict(load_shard(state, path, fabric.global_rank))
    else:
        parts = [load_shard(state, path, rank) for rank in shards]
        rb.load_shards(parts, fabric.global_rank * rb.num_envs, world_size * rb.num_envs)


class UpdateSchedule:
    """Critic updates that are due: exactly `replay_ratio` times the steps since learning started, resumed or not.

    Attributes:
        starts: environment steps, over all ranks, after which updates are due.
        done: critic updates taken, or handed out by `take`, so far.
    """

    def __init__(self, args: OffPolicyArgs, fabric: Fabric) -> None:
        """Raises ConfigError if learning would never start."""
        self.args, self.ratio = args, Fraction(str(args.replay_ratio))  # exact, which a float is not
        self.least = max(args.learning_starts, args.batch_size * fabric.world_size)
        if self.least > args.learning_starts and fabric.global_rank == 0:
            print(f"warning: learning starts after {self.least} steps, a batch of each rank", file=sys.stderr)
        self.starts, self.before, self.done = self.least, 0, 0
        allowed = f"above {self.least}, when learning starts"
        require(args.total_timesteps > self.least, "total_timesteps", args.total_timesteps, allowed)
        steps = args.total_timesteps - self.least
        allowed = f"such that the {steps} steps after learning starts have an update"
        require(int(self.ratio * steps) > 0, "replay_ratio", args.replay_ratio, allowed)

    def explores(self, step: int) -> bool:
        """Tells if actions are drawn uniformly: before the first update."""
        return self.done == 0 and step < self.starts

    def take(self, step: int) -> tuple[int, int]:
        """Number of the first update that is due after `step` environment steps, from 1, and how many are."""
        first = self.done + 1
        self.done = max(self.done, self.before + int(self.ratio * max(step - self.starts, 0)))
        return first, self.done + 1 - first

    def state_dict(self) -> dict[str, Any]:
        counters = {"starts": self.starts, "before": self.before, "done": self.done}
        return counters | {"least": self.least, "ratio": self.args.replay_ratio}

    def load_state_dict(self, state: dict[str, Any], step: int, refill: bool) -> None:
        """Goes on after `step` steps; from anew, without catching up, if the buffer is to be filled first or the ratio
        is another one. Before the first update, another `learning_starts` counts."""
        self.starts, self.before, self.done = state["starts"], state["before"], state["done"]
        if not self.done and self.least != state["least"]:
            self.starts = max(step, self.starts + self.least - state["least"])
        if refill:
            self.starts, self.before = step + self.least, self.done
        elif state["ratio"] != self.args.replay_ratio:
            self.starts, self.before = max(step, self.starts), self.done
