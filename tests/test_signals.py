"""SIGINT, SIGTERM and SIGUSR1: the iteration ends, a checkpoint is written, all ranks leave with 130, 143 or 75."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fabricrl.algos.ppo import ppo
from fabricrl.data.rollout import RolloutBuffer
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.ending import requeue
from fabricrl.utils.signals import StopSignal
from tests.process import (
    FORKED,
    PPO,
    PYTHON,
    Running,
    call,
    load,
    run_folder,
    run_team,
    saved_steps,
    signal_again,
    signal_self,
    started,
    team,
    wait_for,
)
from tests.test_decoupled_run import MODULE, endless
from tests.test_launching import as_srun

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


CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)]


@pytest.mark.parametrize(("number", "code"), CODES)
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
            signal_self(number)

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
        signal_self(signal.SIGTERM)
        return gae(*args)  # type: ignore[arg-type]

    with mock.patch.object(ppo, "gae", signalled):
        stopped = call(ppo.main, *ENDLESS, *log_under(tmp_path))
    assert (stopped.code, stopped.result["steps"]) == (143, "32")
    assert f"stopped at step 32; to continue: --resume {stopped.folder}" in stopped.err.splitlines()
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


def test_slurm_s_signal_to_every_process_of_a_job_ends_none_of_them_before_the_checkpoint(tmp_path: Path) -> None:
    """Also those of environments, and the server that has started these, which have a session of their own."""
    with started(*PYTHON, PPO, *ENDLESS, "--vectorization", "async", *log_under(tmp_path)) as running:
        wait_for(lambda: checkpoints(tmp_path), running)
        pids = list(running.processes())
        for _ in range(2):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        running.finish()
    assert len(pids) >= 4  # the script, the server, two environments
    assert_stopped_with_a_checkpoint(running, tmp_path, 75)
    assert running.err.count("saving after this iteration, to make room") == 1


@pytest.mark.parametrize(
    ("rank", "number", "code"), [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130), (1, signal.SIGUSR1, 75)]
)
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path: Path, rank: int, number: int, code: int) -> None:
    flags = ["--devices", 2, "--strategy", "ddp", *log_under(tmp_path)]
    with started(*FORKED, PPO, *ENDLESS, *flags) as running:
        wait_for(lambda: checkpoints(tmp_path), running)
        os.kill(running.rank_pid(rank), number)
        running.finish()
    assert_stopped_with_a_checkpoint(running, tmp_path, code)


# --- SIGUSR1: save, and make room


def test_a_scheduler_may_send_sigterm_after_sigusr1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """At the time limit, with minutes between them: the iteration in which both come still ends in a checkpoint."""
    times, ends = iter([100.0, 101.0, 105.0, 105.5, 107.0, 107.0]), []
    stop = StopSignal()
    stop.can_save = True
    with (
        mock.patch("fabricrl.utils.signals.time.monotonic", times.__next__),
        mock.patch("os._exit", ends.append),
    ):
        stop.hear(signal.SIGUSR1)
        stop.hear(signal.SIGUSR1)
        stop.hear(signal.SIGTERM)
        stop.hear(signal.SIGUSR1)
        assert (ends, stop.code) == ([], 75)
        stop.hear(signal.SIGTERM)  # the second of its kind
    assert ends == [143]
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["saving after this iteration, to make room", "stopping after this iteration; again to stop now"]


def test_where_there_is_nothing_to_save_yet_sigusr1_ends_the_process_at_once() -> None:
    ends: list[int] = []
    with mock.patch("os._exit", ends.append):
        StopSignal().hear(signal.SIGUSR1)
    assert ends[0] == 75


def test_sigusr1_that_a_launcher_held_back_is_answered_once_somebody_can() -> None:
    code = (
        "import os, signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from fabricrl.utils.signals import StopSignal\n"
        "StopSignal()\n"
        "time.sleep(20)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75


SCONTROL = """#!/bin/sh
echo "$@" >> "$REQUEUED"
{then}
"""
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train"}


def scontrol(tmp_path: Path, then: str) -> tuple[Path, dict[str, str]]:
    """Makes a command that notes what it is asked for; returns its notes, and variables by which ranks find it."""
    command, requeued = tmp_path / "bin/scontrol", tmp_path / "requeued"
    command.parent.mkdir()
    command.write_text(SCONTROL.format(then=then))
    command.chmod(0o755)
    return requeued, {"PATH": f"{command.parent}:{os.environ['PATH']}", "REQUEUED": str(requeued)}


def signal_itself(job: dict[str, str], rank: int) -> None:
    """Makes a rank one of srun's in this job, which signals itself in its third iteration if it is the last."""
    as_srun(rank)
    os.environ |= job
    os.environ["STOPPED_IN"] = "3" if rank else "0"
    os.environ["STOPPED_BY"] = str(int(signal.SIGUSR1))


@pytest.mark.parametrize(
    ("job", "then", "asked", "told"),
    [
        (JOB, "", ["requeue 17"], "job 17 is requeued"),
        (JOB | {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "4"}, "", ["requeue 16_4"], "job 16_4 is requeued"),
        (
            JOB,
            "echo 'Requested operation is presently disabled' >&2; exit 1",
            ["requeue 17"],
            "warning: job 17 is not requeued: Requested operation is presently disabled",
        ),
    ],
    ids=["job", "array", "refused"],
)
def test_under_slurm_a_job_that_makes_room_is_requeued_once_when_all_is_saved(
    tmp_path: Path, job: dict[str, str], then: str, asked: list[str], told: str
) -> None:
    """Two ranks on two nodes; `scontrol` notes what it is asked for, and that there is a checkpoint by then."""
    then = f"ls {tmp_path}/logs/*/*/*/checkpoints/step_000000000192.ckpt || exit 2\n{then}"
    requeued, variables = scontrol(tmp_path, then)
    flags = ["fabricrl.algos.ppo.ppo", *ENDLESS, "--num-nodes", 2, *log_under(tmp_path)]
    options: dict[str, Any] = {"prepare": partial(signal_itself, job), "variables": variables, "code": 75}
    ended = run_team("tests.stopped", *flags, folder=tmp_path / "out", **options)
    assert requeued.read_text().splitlines() == asked
    assert ended.printed("err").splitlines().count(told) == 1, ended.report()
    assert ended.result["steps"] == str(3 * 2 * 2 * 16)
    assert ended.errors == []


def as_task(rank: int) -> None:
    """Makes a rank one of srun's in a job."""
    as_srun(rank)
    os.environ |= JOB


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_twin_s_player_requeues_the_job_at_each_signal_to_all_ranks_and_the_next_start_goes_on(
    algo: str, tmp_path: Path
) -> None:
    """`scontrol` notes which rank asks and what is saved by then, and succeeds if none has ended yet.

    Slurm may end the others as soon as one has.
    """
    saved = f"cd {tmp_path}/logs/*/*/*/checkpoints; ls step_*.ckpt | tail -n 1"
    lives = f"for pid in $(cat {tmp_path}/pids); do grep -q 'State:.[RSD]' /proc/$pid/status || exit 2; done"
    requeued, variables = scontrol(tmp_path, f'(echo $SLURM_PROCID; {saved}) >> "$REQUEUED"\nsleep 0.5\n{lives}')
    flags = [MODULE[algo], *endless(algo, tmp_path), "--num-nodes", 2, "--resume", "auto"]
    steps = [0]

    def goes_on() -> bool:
        return any(int(path.stem.removeprefix("step_")) > steps[-1] for path in checkpoints(tmp_path))

    for start in range(2):
        with team(*flags, folder=tmp_path / f"{start}", prepare=as_task, variables=variables) as ranks:
            wait_for(lambda: goes_on() or any(rank.exitcode for rank in ranks.ranks))
            (tmp_path / "pids").write_text(" ".join(str(rank.pid) for rank in ranks.ranks))
            for rank in ranks.ranks:
                os.kill(rank.pid or 0, signal.SIGUSR1)
            ranks.finish()
        assert (ranks.code, ranks.errors) == (75, []), ranks.report()
        assert ranks.printed("err").splitlines().count("job 17 is requeued") == 1, ranks.report()
        steps.append(int(ranks.result["steps"]))
    asked = [line for step in steps[1:] for line in ("requeue 17", "0", f"step_{step:012d}.ckpt")]
    assert requeued.read_text().splitlines() == asked
    assert run_folder(tmp_path / "logs") == Path(ranks.result["checkpoint"]).parent.parent


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "interactive"}])
def test_elsewhere_and_in_interactive_jobs_nothing_is_requeued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("subprocess.run", None)
    requeue()
    assert capsys.readouterr().err == ""


def test_without_scontrol_the_run_says_that_it_is_not_requeued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", "")
    requeue()
    assert capsys.readouterr().err.startswith("warning: job 17 is not requeued: [Errno 2] No such file or directory")


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
        time.sleep(0.5)
        (tmp_path / "stepping").unlink()
        wait_for((tmp_path / "stepping").exists, running)  # the first one alone does not end it
        signal_again(running.process, signal.SIGINT)
        running.finish()
    assert running.code == 130, running.report()
    assert not checkpoints(tmp_path)
