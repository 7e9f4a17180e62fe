"""Replay buffers of off-policy algorithms, and the schedule of their updates."""

import math
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fabricrl.algos.off_policy.args import EntropyArgs, OffPolicyArgs
from fabricrl.algos.run import Run
from fabricrl.data import Batch, DeviceReplayBuffer, NewestSteps, Replay, ReplayBuffer, TensorReplayBuffer
from fabricrl.data.memory import GIB, check_memory
from fabricrl.data.transitions import record_type
from fabricrl.utils.checkpoint import load_shard, reading, shard_ranks
from fabricrl.utils.errors import CheckpointError, ConfigError, from_here, require
from fabricrl.utils.launch import ranks_here
from fabricrl.utils.ranks import all_max
from fabricrl.utils.records import Records

SHARE = 0.5  # of a GPU's free memory that a replay buffer takes at most unless it is told to
MAX_CAPTURED = 64  # updates in all graphs together
BLOCK = 64  # steps of exploration that travel together


def make_schedule(run: Run) -> "UpdateSchedule":
    """Makes the schedule of updates.

    Raises:
        ConfigError: learning would never start, or buffers or batches do not fit into memory.
        CheckpointError: the temperature was learned in the run that is resumed, and is fixed here, or the other way.
    """
    args = run.args
    with run.failing_together():
        if isinstance(args, EntropyArgs) and run.state and run.state["args"]["autotune"] != args.autotune:
            there, here = ("fixed", "learned") if args.autotune else ("learned", "fixed")
            raise CheckpointError(f"--autotune: the temperature was {there} in the checkpoint and is {here} now")
        schedule = UpdateSchedule(args, run.fabric.world_size if run.trainers is None else 1, run.team.global_rank == 0)
        if run.trainers is None:  # whose buffers are theirs to check
            check_buffer(run)
            args.check_batches(run.fabric.world_size)
    return schedule


def check_buffer(run: Run) -> None:
    """Raises ConfigError unless the buffers of this machine's ranks fit into its memory, or this one onto its GPU."""
    args = run.args
    on_gpu = args.buffer_device == "cuda" or buffer_device(run)[0] is not None
    if not args.buffer_memmap and not on_gpu:
        record = record_type(run.obs_space, _num_actions(run), has_implicit_next(run))
        advice = "--buffer-memmap keeps the buffer on disk"
        if run.uses_tensor_envs:
            advice = "a smaller one may fit"
        elif not has_implicit_next(run):
            advice += ", --implicit-next-obs takes less"
        check_memory(args.buffer_size * record.itemsize, ranks_here(run.fabric), advice)


def has_implicit_next(run: Run) -> bool:
    """Tells if the buffer stores each observation once, as always with images."""
    return run.args.implicit_next_obs or isinstance(run.obs_space, Records)


def buffer_device(run: Run) -> tuple[torch.device | None, str]:
    """The GPU that the replay buffer is to lie on, or None; and why it does not, if it might.

    Raises:
        ConfigError: it is to lie on a GPU, and there is none, or too little memory on it.
    """
    args, device = run.args, run.fabric.device
    asked = args.buffer_device == "cuda"
    require(not asked or device.type == "cuda", "buffer_device", "cuda", "cpu or auto where the run trains on the CPU")
    images = isinstance(run.obs_space, Records)
    require(not (asked and images), "buffer_device", "cuda", "cpu or auto with images, each of which memory holds once")
    in_memory = args.buffer_device == "cpu" or device.type != "cuda"
    clash = run.uses_tensor_envs and in_memory and device.type == "cuda"
    require(not clash, "buffer_device", "cpu", "cuda or auto where environments are tensors on a GPU")
    if in_memory or args.buffer_memmap or has_implicit_next(run):
        return None, ""
    need = (args.buffer_size + args.num_envs) * record_type(run.obs_space, _num_actions(run), False).itemsize
    free = torch.cuda.mem_get_info(device)[0]
    figures = f"{need / GIB:.2f} GiB of the {free / GIB:.2f} GiB that are free on {device}"
    if need > free and run.uses_tensor_envs:
        raise ConfigError(f"--buffer-size is {args.buffer_size}: the buffer would take {figures}")
    if need > free and asked:
        raise ConfigError(f"--buffer-device is cuda: the buffer would take {figures}; cpu keeps it in memory")
    if need > SHARE * free and not asked and not run.uses_tensor_envs:
        return None, f", as it would take {figures}; --buffer-device cuda puts it there all the same"
    return device, ""


def make_buffer(run: Run, folder: Path | None = None) -> Replay:
    """The replay buffer of this rank; rank 0 prints what it takes. `folder`: the run's, where another rank has made it.

    A decoupled player has only the newest steps: each trainer keeps the transitions of its environments.

    Raises:
        ConfigError: it does not fit into memory, onto the GPU or onto the disk.
    """
    args, folder = run.args, (folder or run.folder) if run.args.buffer_memmap else None
    shape = args.num_envs, run.obs_space, _num_actions(run)
    if run.trainers is not None:
        return NewestSteps(BLOCK, *shape, args.frame_stack)
    rb: Replay
    with run.failing_together():
        device, why_not = buffer_device(run)
        settings = args.buffer_size, *shape, args.gamma, args.n_step
        if run.uses_tensor_envs:
            rb = run.storage = TensorReplayBuffer(*settings, run.fabric.device)
            run.runner.tensors += rb.tensors()
        elif device is not None:
            rb = DeviceReplayBuffer(*settings, device)
        else:
            rb = ReplayBuffer(*settings, has_implicit_next(run), folder, args.frame_stack)
    run.draw_on(run.fabric.device)
    if run.fabric.global_rank == 0:
        in_file = f"in a temporary file in {from_here(folder)}" if folder else ""
        where = f"on {device}" if device else in_file or f"in memory{why_not}"
        size = f"{rb.capacity * rb.num_envs} transitions, {rb.num_bytes / GIB:.3f} GiB"
        print(f"replay buffer: {size} per rank, {where}", file=sys.stderr, flush=True)
    return rb


def _num_actions(run: Run) -> int:
    return int(np.prod(run.action_space.shape))


class SampleAndTrain:
    """Draws batches and trains on them: on a GPU as one CUDA graph, the sampling included if the buffer is there.

    Args:
        train: a function (batches [K, B, ...], plan) → metrics by their tags.
        period: updates after which the pattern of target and actor updates repeats.
    """

    def __init__(
        self, run: Run, rb: Replay, train: Callable[..., dict[tuple[str, ...], Tensor]], period: int = 1
    ) -> None:
        self._run, self._rb, self._train, self._period = run, rb, train, period
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
        yield from ((first, count) for count in self._counts for first in range(1, min(self._period, 1000) + 1))

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


def restore_replay(run: Run, rb: Replay, schedule: "UpdateSchedule | None" = None) -> bool:
    """Goes on with the buffer and the schedule of the checkpoint that is resumed; True if a new buffer is to be filled.

    A decoupled player has no buffer, a trainer no schedule.

    Raises:
        CheckpointError: as `restore_buffer`.
    """
    refill = False
    if run.state and run.path:
        with run.failing_together(), reading(run.path):
            refill = not restore_buffer(run, rb) if run.trainers is None else run.trainers.refill
            if schedule is not None:
                schedule.load_state_dict(run.state["schedule"], run.global_step, refill)
    return refill


def restore_buffer(run: Run, rb: Replay) -> bool:
    """Fills the buffer with this rank's part of the checkpoint that is resumed; whether it did. Rank 0 says so if not.

    Raises:
        CheckpointError: the part is missing or does not fit, and neither `checkpoint_buffer` was off in the run that
            saved it nor `allow_empty_buffer` is on.
    """
    problem: CheckpointError | None = None
    args, fabric, state = run.args, run.fabric, run.state
    stored = state["args"]["checkpoint_buffer"]
    if stored:
        try:
            with reading(run.path):  # also what is no buffer at all: every rank has to come to the next line
                load_buffer(run, rb)
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
        print(
            f"the replay buffer starts empty: {steps} steps are played to fill it {after}", file=sys.stderr, flush=True
        )
    rb.clear()
    return False


def load_buffer(run: Run, rb: Replay) -> None:
    """Loads this rank's environments from a checkpoint of as many ranks, or of another number.

    Raises:
        CheckpointError: a part is missing, or of another layout.
    """
    state, path, world_size = run.state, run.path, run.fabric.world_size
    assert path is not None
    shards = shard_ranks(state)
    if len(shards) in (0, world_size):
        shard = load_shard(state, path, run.fabric.global_rank)
        rb.load_state_dict(shard)
        if "device_rng" in shard and run.device_rng is not run.train_rng:
            run.device_rng.set_state(shard["device_rng"])
    else:
        parts = [load_shard(state, path, rank) for rank in shards]
        rb.load_shards(parts, run.fabric.global_rank * rb.num_envs, world_size * rb.num_envs)


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
