"""Checkpoints with a replay buffer: a copy of its moment, shards that come and go with their file, no second buffer."""

import errno
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from fabricrl.algos.sac import sac
from fabricrl.data.replay import ReplayBuffer
from fabricrl.utils import checkpoint as checkpoint_module
from fabricrl.utils.checkpoint import load_checkpoint, load_shard, save_checkpoint, save_shard
from fabricrl.utils.errors import CheckpointError
from fabricrl.utils.metric import EpisodeStatistics
from fabricrl.utils.run import RunFolder
from tests.process import FORKSERVER, LIMIT, call, differences, load, run_folder, run_team, saved_steps
from tests.test_off_policy_resume import FLAGS, checkpoint, content

SAC = "fabricrl.algos.sac.sac"


@pytest.mark.parametrize("flags", [[], ["--buffer-memmap"], ["--buffer-memmap", "--implicit-next-obs"]], ids=str)
def test_a_checkpoint_holds_the_buffer_of_its_moment_and_does_not_change_when_the_run_goes_on(
    flags: list[str], tmp_path: Path
) -> None:
    written: dict[Path, tuple[bytes, torch.Tensor]] = {}
    save = RunFolder.save

    def noted(run: RunFolder, step: int, mean_return: float, state: dict[str, Any], shard: dict[str, Any]) -> None:
        records = shard["records"].clone()
        save(run, step, mean_return, state, shard)
        assert run.checkpoint is not None
        written[run.checkpoint] = (run.checkpoint.read_bytes(), records)

    with mock.patch.object(RunFolder, "save", noted):
        finished = call(sac.main, *FLAGS, *flags, "--log-dir", tmp_path)
    assert saved_steps(finished.folder) == list(range(16, 241, 16))
    for path, (content_then, records_then) in written.items():
        assert path.read_bytes() == content_then, path
        assert torch.equal(load(path)["shard"]["records"], records_then)
    last = [records for _, records in written.values()][-2:]
    assert not torch.equal(*last), "the buffer did not change: nothing is shown"


# --- Shards


def falling(rank: int) -> None:
    """The mean return of a run falls with every episode, so that the first checkpoint stays the best."""
    EpisodeStatistics.mean_return = property(lambda self: -float(self.count))  # type: ignore[assignment]


def test_shards_are_kept_with_their_checkpoints_and_the_best_has_its_own(tmp_path: Path) -> None:
    flags = [*FLAGS, "--num-envs", 1, "--checkpoint-every", 80, "--keep-checkpoints", 2, "--log-dir", tmp_path / "logs"]
    run_team(SAC, *flags, folder=tmp_path, prepare=falling)
    folder = run_folder(tmp_path / "logs") / "checkpoints"
    names = {"step_000000000160", "step_000000000240", "best"}
    shards = {"step_000000000160.shard1", "step_000000000240.shard1", "best_000000000080.shard1"}
    assert {path.name for path in folder.iterdir()} == shards | {f"{name}.ckpt" for name in names}
    for name, step in zip(sorted(names), (80, 160, 240), strict=True):
        state, path = load_checkpoint(folder / f"{name}.ckpt")
        assert state["global_step"] == step
        assert load_shard(state, path, 1)["size"] == min(step // 2, 48)
    best = folder / "best.ckpt"
    again = run_team(
        SAC, "--resume", best, "--log-dir", tmp_path / "again", folder=tmp_path / "second", prepare=falling
    )
    assert differences(content(checkpoint(folder.parent, 240)), content(again.result["checkpoint"])) == []


def test_the_best_never_lacks_its_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whenever a run is killed: theirs have their names before it has its own, and the old ones leave after it."""
    link, seen = checkpoint_module._link, []

    def noted(path: Path, name: Path) -> None:
        link(path, name)
        seen.append((name.name, sorted(shard.name for shard in tmp_path.glob("best_*"))))

    monkeypatch.setattr(checkpoint_module, "_link", noted)
    for step in (1, 2):
        save_shard(tmp_path, step, 1, {})
        save_checkpoint(tmp_path, step, {"algo": "sac", "global_step": step, "shard": None}, keep=9, best=True)
    first, second = "best_000000000001.shard1", "best_000000000002.shard1"
    both = [first, second]
    assert seen == [(first, [first]), ("best.ckpt", [first]), (second, both), ("best.ckpt", both)]
    assert [shard.name for shard in tmp_path.glob("best_*")] == [second]


def test_a_run_folder_gives_the_newest_that_is_whole_else_the_newest(tmp_path: Path) -> None:
    """Those who play a policy need no buffer."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_checkpoint(folder, step, {"algo": "sac", "global_step": step, "shards": 1}, keep=9)
    assert load_checkpoint(tmp_path)[0]["global_step"] == 3
    for step in (1, 2):
        save_shard(folder, step, 0, {})
    assert load_checkpoint(tmp_path)[0]["global_step"] == 2


def test_a_shard_of_another_step_or_damaged_is_refused(tmp_path: Path) -> None:
    state = {"algo": "sac", "global_step": 2, "shard": None}
    path = save_checkpoint(tmp_path, 2, state, keep=9)
    save_shard(tmp_path, 2, 1, {"size": 7})
    assert load_shard(state, path, 1) == {"size": 7}
    with pytest.raises(CheckpointError, match="without the replay buffer of rank 2"):
        load_shard(state, path, 2)
    shard = path.with_suffix(".shard1")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_shard(state, path, 1)
    save_shard(tmp_path, 3, 1, {"size": 8})
    shutil.copy(tmp_path / "step_000000000003.shard1", shard)
    with pytest.raises(CheckpointError, match="is of step 3"):
        load_shard(state, path, 1)


def test_shards_without_a_checkpoint_are_removed_by_the_next_save(tmp_path: Path) -> None:
    """As a run leaves them that is killed, or finds the disk full, after its shards and before the checkpoint."""
    state = {"algo": "sac", "global_step": 1, "shard": None}
    save_shard(tmp_path, 1, 1, {})
    save_checkpoint(tmp_path, 1, state, keep=9, best=True)
    save_shard(tmp_path, 5, 1, {})
    save_shard(tmp_path, 9, 1, {})
    save_checkpoint(tmp_path, 9, state, keep=9)
    shards = {"step_000000000001.shard1", "step_000000000009.shard1", "best_000000000001.shard1"}
    assert {path.name for path in tmp_path.glob("*.shard*")} == shards


def full_disk(rank: int) -> None:
    """The disk is full for one rank from its third write on; a write calls fsync for file and folder."""
    calls: list[int] = []
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if str(rank) == os.environ["FULL"] and len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = failing


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_ends_all_and_leaves_the_checkpoints_before(rank: int, tmp_path: Path) -> None:
    flags = [*FLAGS, "--num-envs", 1, "--log-dir", tmp_path / "logs"]
    ended = run_team(SAC, *flags, folder=tmp_path, code=6, prepare=full_disk, variables={"FULL": str(rank)})
    (message,) = ended.errors
    assert "No space left on device" in message
    assert f"step_{48:012d}" in message
    folder = run_folder(tmp_path / "logs")
    assert saved_steps(folder) == [16, 32]
    state, path = load_checkpoint(folder, "sac")
    assert state["global_step"] == 32
    assert load_shard(state, path, 1)["size"] == 16
    assert not list(folder.glob("checkpoints/.*"))


# --- Memory

ROWS, WIDTH = 4096, 6400  # 200 MiB with observations that take 4 · 6400 bytes, twice
MIB = 2**20


def peak() -> int:
    """Bytes that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_large(folder: Path, memmap: bool) -> None:
    """Ends with code 1 unless saving and reading a large buffer needs far less memory than the buffer."""
    space = Box(-np.inf, np.inf, (WIDTH,), np.float32)
    rb = ReplayBuffer(ROWS, 1, space, 1, folder=folder if memmap else None)
    obs, zero, no = np.ones((1, WIDTH), np.float32), np.zeros(1), np.zeros(1, bool)
    rb.start(obs)
    for step in range(ROWS + 10):
        rb.add(zero[:, None], obs + step, zero, no, no, {})
    assert rb.num_bytes > 190 * MIB
    before = peak()
    assert before > rb.num_bytes
    state = {"algo": "sac", "global_step": 1, "shard": rb.state_dict()}
    path = save_checkpoint(folder, 1, state, keep=1)
    grown = peak() - before
    print(f"saving {rb.num_bytes / MIB:.0f} MiB took {grown / MIB:.0f} MiB", file=sys.stderr)
    assert path.stat().st_size > rb.num_bytes
    assert grown < rb.num_bytes / 8, grown


@pytest.mark.parametrize("memmap", [False, True], ids=["in memory", "in a file"])
def test_saving_a_large_buffer_does_not_take_the_memory_of_another(memmap: bool, tmp_path: Path) -> None:
    child = FORKSERVER.Process(target=save_large, args=(tmp_path, memmap))
    child.start()
    child.join(LIMIT)
    child.kill()
    shutil.rmtree(tmp_path)  # half a gigabyte
    assert child.exitcode == 0
