"""Replay buffers of a run: made where there is room for them, and restored from checkpoints."""

import sys
from pathlib import Path

import numpy as np
import torch

from fabricrl.algos.off_policy.updates import UpdateSchedule
from fabricrl.algos.run import Run
from fabricrl.data import DeviceReplayBuffer, NewestSteps, Replay, ReplayBuffer, TensorReplayBuffer
from fabricrl.data.memory import GIB, check_memory
from fabricrl.data.transitions import record_type
from fabricrl.utils.checkpoint import load_shard, reading, shard_ranks
from fabricrl.utils.errors import CheckpointError, ConfigError, from_here, require
from fabricrl.utils.launch import ranks_here
from fabricrl.utils.ranks import all_max
from fabricrl.utils.records import Records

SHARE = 0.5  # of a GPU's free memory that a replay buffer takes at most unless it is told to
BLOCK = 64  # steps of exploration that travel together


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
        check_buffer(run)
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


def _num_actions(run: Run) -> int:
    return int(np.prod(run.action_space.shape))


def restore_replay(run: Run, rb: Replay, schedule: UpdateSchedule | None = None) -> bool:
    """Restores buffer and schedule from the checkpoint that is resumed. Returns True if a new buffer is to be filled.

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
    """Fills the buffer from this rank's part of the checkpoint. Returns True if it did; otherwise rank 0 reports it.

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
