"""Robustness against dying launchers, exiting environments, lying files and full disks."""

import contextlib
import io
import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.envs import make_envs
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint
from fabricrl.utils.errors import CheckpointError, ConfigError, EnvError, NonFiniteError
from fabricrl.utils.launch import launch
from fabricrl.utils.logger import CsvLogger
from tests.process import FORKED, PPO, Finished, call, command, run_folder, started, wait_for

SMALL = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 1]


@pytest.fixture
def trained(tmp_path: Path) -> Finished:
    return call(ppo.main, *SMALL, "--total-timesteps", 64, "--log-dir", tmp_path)


def misbehave(kind: str, tmp_path: Path, *flags: object) -> Finished:
    kwargs = f'{{"kind": "{kind}"}}'
    with contextlib.redirect_stderr(io.StringIO()):
        return call(
            ppo.main,
            "--env-id",
            "tests.envs:Misbehaving-v0",
            "--env-kwargs",
            kwargs,
            *SMALL,
            *flags,
            "--log-dir",
            tmp_path,
        )


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("kind", "words"), [("exit", "SystemExit"), ("shape", "shape (1,)")])
def test_an_environment_that_exits_or_changes_shape_is_an_error_of_it(
    kind: str, words: str, vectorization: str, tmp_path: Path
) -> None:
    with pytest.raises(EnvError, match=r"environment [01]") as caught:
        misbehave(kind, tmp_path, "--vectorization", vectorization)
    assert words in str(caught.value)


def test_an_infinite_loss_ends_the_run_although_the_parameters_are_finite(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="value_loss"):
        misbehave("much", tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_final_observations_survive_an_environment_that_reuses_its_array(vectorization: str, tmp_path: Path) -> None:
    envs = make_envs(
        PPOArgs(env_id="tests.envs:Misbehaving-v0", num_envs=1, num_minibatches=1, vectorization=vectorization),
        0,
        tmp_path,
    )
    envs.reset(seed=0)
    for _ in range(5):
        obs, _, _, truncated, infos = envs.step(np.array([0]))
    assert truncated.all()
    assert obs.tolist() == [[0.0, 0.0]]
    assert infos["final_obs"][0].tolist() == [5.0, 5.0]
    envs.close()


@pytest.mark.parametrize("change", ["exp_avg", "args", "global_step", "generators", "nan", "episodes"])
def test_a_checkpoint_with_a_good_checksum_and_bad_contents_is_refused(
    change: str, trained: Finished, tmp_path: Path
) -> None:
    state, _ = load_checkpoint(trained.checkpoint)
    if change == "exp_avg":  # fused Adam would read beyond its end
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    elif change == "nan":
        next(iter(state["agent"].values())).fill_(torch.nan)
    elif change == "args":
        state["args"]["gamma"] = "much"
    else:
        del state[change]
    bad = save_checkpoint(tmp_path / "bad", 64, {k: v for k, v in state.items() if k != "format"}, keep=1)
    with pytest.raises(CheckpointError):
        call(ppo.main, "--resume", bad, "--total-timesteps", 128, "--log-dir", tmp_path / "new")
    if change in ("global_step", "nan"):
        with pytest.raises(CheckpointError):
            call(evaluate.main, bad, "--episodes", 1)


def test_a_run_can_be_resumed_by_one_process_at_a_time(trained: Finished) -> None:
    import fcntl

    descriptor = os.open(trained.folder / "args.json", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process"):
            call(ppo.main, "--resume", trained.folder, "--total-timesteps", 128)
    finally:
        os.close(descriptor)
    assert call(ppo.main, "--resume", trained.folder, "--total-timesteps", 128).code == 0


def test_training_goes_on_when_its_log_cannot_be_written(tmp_path: Path) -> None:
    with mock.patch.object(CsvLogger, "log_metrics", side_effect=OSError(28, "No space left on device")):
        flags = ["--total-timesteps", 96, "--log-every", 1, "--logger", "csv", "--log-dir", tmp_path]
        finished = call(ppo.main, *SMALL, *flags)
    assert (finished.code, finished.result["steps"]) == (0, "96")
    assert finished.err.count("warning: no more metrics are written: No space left on device") == 1


def test_csv_entries_may_have_other_columns_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path, 0)
    first.log_metrics({"a": 1.0, "b": 2.0}, 1)
    first.log_metrics({"a": 3.0}, 2)
    again = CsvLogger(path, 1)
    again.log_metrics({"c": 5.0}, 2)
    assert path.read_text().splitlines() == ["step,a,b,c", "1,1.0,2.0,", "2,,,5.0"]


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "TORCHELASTIC_RUN_ID"])
def test_variables_of_a_launcher_that_is_not_there_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_PORT", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "0")
    with pytest.raises(ConfigError, match=variable):
        launch(PPOArgs(devices="2"))


@pytest.mark.parametrize("launcher", ["torchrun", "rank 0"])
def test_ranks_do_not_outlive_what_started_them(launcher: str, tmp_path: Path) -> None:
    endless = [*SMALL, "--total-timesteps", 1_000_000_000, "--checkpoint-every", 320, "--log-dir", tmp_path]
    start = [command("torchrun"), "--standalone", "--nproc-per-node", 2, PPO]
    if launcher == "rank 0":
        start = [*FORKED, PPO, "--devices", 2]
    with started(*start, *endless) as running:
        wait_for(lambda: list(tmp_path.rglob("step_*.ckpt")), running)
        os.kill(running.process.pid, signal.SIGKILL)
        running.finish()  # asserts that no process is left
    assert load_checkpoint(run_folder(tmp_path))[0]["global_step"] > 0
