"""SIGINT and SIGTERM: the iteration ends, a checkpoint is written, all ranks leave with 130 or 143."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from fabricrl.algos.ppo import ppo
from fabricrl.data.buffers import RolloutBuffer
from fabricrl.utils.checkpoint import load_checkpoint
from tests.process import FORKED, PPO, Running, call, load, run_folder, saved_steps, started, wait_for

# A run that nobody would wait for, in iterations of milliseconds
ENDLESS = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 1, "--update-epochs", 1]
ENDLESS += ["--total-timesteps", 1_000_000_000, "--checkpoint-every", 3200, "--keep-checkpoints", 2]


def log_under(tmp_path: Path) -> list[object]:
    return ["--log-dir", tmp_path / "logs"]


def checkpoints(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "logs").glob("*/*/*/checkpoints/step_*.ckpt"))


def assert_stopped_with_a_checkpoint(running: Running, tmp_path: Path, code: int) -> None:
    """The exit code is right; the result line names the newest checkpoint, that of the step where the run ended."""
    assert running.code == code, running.report()
    assert running.errors == [], running.report()
    state, path = load_checkpoint(run_folder(tmp_path / "logs"), "ppo")
    assert running.result["checkpoint"] == str(path)
    assert int(running.result["steps"]) == state["global_step"]
    assert load(path)["global_step"] == state["global_step"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["rollout", "update"])
def test_a_signal_ends_the_run_after_the_iteration_in_which_it_came(
    tmp_path: Path, number: int, code: int, moment: str
) -> None:
    """The process signals itself in its third iteration, in the middle of the rollout or of the update."""
    calls = []
    add, gae = RolloutBuffer.add, ppo.gae

    def count(limit: int) -> None:
        calls.append(1)
        if len(calls) == limit:
            os.kill(os.getpid(), number)

    def signalled_add(*args: object) -> None:
        count(2 * 16 + 8)
        return add(*args)  # type: ignore[arg-type]

    def signalled_gae(*args: object) -> tuple:
        count(3)
        return gae(*args)  # type: ignore[arg-type]

    target = (RolloutBuffer, "add", signalled_add) if moment == "rollout" else (ppo, "gae", signalled_gae)
    with mock.patch.object(*target):
        finished = call(ppo.main, *ENDLESS, *log_under(tmp_path))
    assert finished.code == code
    assert finished.result["steps"] == "96"  # 3 × 2 × 16
    assert saved_steps(finished.folder) == [96]


def test_after_a_stop_the_run_can_be_resumed(tmp_path: Path) -> None:
    gae = ppo.gae

    def signalled(*args: object) -> tuple:
        os.kill(os.getpid(), signal.SIGTERM)
        return gae(*args)  # type: ignore[arg-type]

    with mock.patch.object(ppo, "gae", signalled):
        stopped = call(ppo.main, *ENDLESS, *log_under(tmp_path))
    assert (stopped.code, stopped.result["steps"]) == (143, "32")
    resumed = call(ppo.main, "--resume", stopped.folder, "--total-timesteps", 96)
    assert (resumed.code, resumed.result["steps"]) == (0, "96")
    assert resumed.folder == stopped.folder


def test_interrupting_a_run_with_environments_in_processes_saves_and_leaves_none_of_them(tmp_path: Path) -> None:
    """The signal goes to the whole process group, as Ctrl-C does: the workers must not fall over it."""
    with started(*FORKED, PPO, *ENDLESS, "--vectorization", "async", *log_under(tmp_path)) as running:
        wait_for(lambda: checkpoints(tmp_path), running)
        os.killpg(running.process.pid, signal.SIGINT)
        running.finish()
    assert_stopped_with_a_checkpoint(running, tmp_path, 130)


@pytest.mark.parametrize(("rank", "number", "code"), [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)])
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path: Path, rank: int, number: int, code: int) -> None:
    flags = ["--devices", 2, "--strategy", "ddp", *log_under(tmp_path)]
    with started(*FORKED, PPO, *ENDLESS, *flags) as running:
        wait_for(lambda: checkpoints(tmp_path), running)
        os.kill(running.rank_pid(rank), number)
        running.finish()
    assert_stopped_with_a_checkpoint(running, tmp_path, code)


SLOW = """
import pathlib, time
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Slow(CartPoleEnv):
    def step(self, action):
        pathlib.Path("stepping").touch()
        time.sleep(0.05)
        return super().step(action)

gym.register("Slow-v0", entry_point=Slow)
"""


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """An iteration here takes more than an hour, so that nothing but the second interrupt can end the run."""
    (tmp_path / "slow.py").write_text(SLOW)
    flags = ["--env-id", "slow:Slow-v0", "--num-envs", 1, "--num-steps", 100_000]
    with started(*FORKED, PPO, *flags, *log_under(tmp_path), cwd=tmp_path) as running:
        wait_for((tmp_path / "stepping").exists, running)
        os.kill(running.process.pid, signal.SIGINT)
        time.sleep(1.2)  # sooner it would count as the same
        (tmp_path / "stepping").unlink()
        wait_for((tmp_path / "stepping").exists, running)  # the first one alone does not end it
        os.kill(running.process.pid, signal.SIGINT)
        running.finish()
    assert running.code == 130, running.report()
    assert not checkpoints(tmp_path)
