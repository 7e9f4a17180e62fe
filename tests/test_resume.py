"""Resuming: a run that was stopped ends as if it had not been, and goes on where it was in every respect."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fabricrl.algos.ppo import ppo
from fabricrl.utils import run as run_module
from fabricrl.utils.checkpoint import save_checkpoint
from fabricrl.utils.errors import CheckpointError
from tests.process import (
    FORKED,
    PPO,
    Finished,
    call,
    differences,
    files,
    load,
    logged,
    run,
    run_folder,
    saved_steps,
    stopped_in,
)

# Episodes of 8 steps end with the rollouts of 32, so that a resumed environment is where it would have been. An
# iteration takes 2 × 32 = 64 steps, the run 16 of them. Everything that has a state is on
FLAGS = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 1024]
FLAGS += ["--norm-obs", "--norm-reward", "--anneal-lr", "--anneal-clip", "--anneal-ent", "--learning-rate", 1e-2]
FLAGS += ["--log-every", 64, "--checkpoint-every", 192, "--keep-checkpoints", 100]


def content(path: Path | str) -> dict[str, Any]:
    """Contents of a checkpoint, without those that depend on how the run was started."""
    return {name: value for name, value in load(path).items() if name != "args"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return call(ppo.main, *FLAGS, "--log-dir", tmp_path_factory.mktemp("straight"))


def stopped(log_dir: Path, iterations: int, *flags: object) -> Finished:
    """The same run, stopped by a signal in its n-th iteration."""
    with stopped_in(iterations):
        finished = call(ppo.main, *FLAGS, *flags, "--log-dir", log_dir)
    assert finished.code == 143
    return finished


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_stopped_and_resumed_run_equals_the_straight_run_to_the_last_bit(
    straight: Finished, tmp_path: Path, vectorization: str
) -> None:
    first = stopped(tmp_path, 5, "--vectorization", vectorization)
    assert first.result["steps"] == "320"
    second = call(ppo.main, "--resume", first.folder)
    assert second.code == 0
    assert second.folder == first.folder
    assert {"agent", "optimizer", "episodes", "generators", "best_return", "global_step"} <= content(
        straight.checkpoint
    ).keys()
    assert differences(content(straight.checkpoint), content(second.checkpoint)) == []
    assert differences(content(straight.checkpoint), content(first.checkpoint)), (
        "a run of 5 iterations equals one of 16"
    )
    for field in ("steps", "return_mean", "episodes"):
        assert second.result[field] == straight.result[field]


def test_a_run_that_was_stopped_three_times_equals_the_straight_run(straight: Finished, tmp_path: Path) -> None:
    folder = stopped(tmp_path, 2).folder
    for _ in range(2):
        stopped(tmp_path, 4, "--resume", folder)
    finished = call(ppo.main, "--resume", folder)
    assert differences(content(straight.checkpoint), content(finished.checkpoint)) == []


def test_tensorboard_goes_on_without_gap_or_overlap(straight: Finished, tmp_path: Path) -> None:
    folder = stopped(tmp_path, 5).folder
    call(ppo.main, "--resume", folder)
    expected, found = logged(straight.folder), logged(folder)
    assert expected.keys() == found.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == list(range(64, 1025, 64)), tag
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert found[tag] == values, tag


def test_entries_after_the_checkpoint_of_a_crash_are_replaced(straight: Finished, tmp_path: Path) -> None:
    """The last checkpoint is that of step 192 (iteration 3), the last entry that of 320, where the machine fails."""

    class PowerCutError(Exception):
        pass

    calls = []

    def cut(*args: object) -> tuple:
        calls.append(1)
        if len(calls) == 6:
            raise PowerCutError
        return original(*args)  # type: ignore[arg-type]

    original = ppo.gae
    # The lock of a run goes with its process, and this one stays
    with (
        mock.patch.object(ppo, "gae", cut),
        mock.patch.object(run_module, "_lock", return_value=None),
        pytest.raises(PowerCutError),
    ):
        call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    folder = run_folder(tmp_path)
    assert saved_steps(folder) == [192]
    finished = call(ppo.main, "--resume", folder)
    assert finished.folder == folder
    assert logged(folder)["losses/value_loss"] == logged(straight.folder)["losses/value_loss"]
    assert differences(content(straight.checkpoint), content(finished.checkpoint)) == []


def test_csv_goes_on_without_gap_or_overlap(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 5, "--logger", "csv").folder
    call(ppo.main, "--resume", folder)
    with (folder / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(64, 1025, 64))


@pytest.mark.parametrize("which", ["step_000000000384.ckpt", "best.ckpt"])
def test_an_older_or_the_best_checkpoint_begins_a_new_run_and_leaves_the_old_one_alone(
    straight: Finished, tmp_path: Path, which: str
) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    if which == "best.ckpt":  # the run learns: its best is its last, unless we say otherwise
        shutil.copy(folder / "checkpoints" / "step_000000000576.ckpt", folder / "checkpoints" / which)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder) if "tfevents" not in name}
    start = load(folder / "checkpoints" / which)["global_step"]
    finished = call(ppo.main, "--resume", folder / "checkpoints" / which, "--log-dir", tmp_path / "logs")
    assert finished.folder == run_folder(tmp_path / "logs")
    assert before == {name: (folder / name).stat().st_mtime_ns for name in files(folder) if "tfevents" not in name}
    assert len(list(folder.glob("events*"))) == 1
    assert differences(content(straight.checkpoint), content(finished.checkpoint)) == []
    assert [step for step, _ in logged(finished.folder)["charts/SPS"]] == list(range(start + 64, 1025, 64))


def test_the_best_checkpoint_stays_if_the_resumed_run_does_not_surpass_it(tmp_path: Path) -> None:
    """The checkpoint says that a mean return of 100 has been reached, of which 8 cosines fall short."""
    folder = stopped(tmp_path, 3).folder
    state = load(folder / "checkpoints" / "step_000000000192.ckpt") | {"best_return": 100.0}
    save_checkpoint(folder / "checkpoints", 192, state, keep=9, best=True)
    finished = call(ppo.main, "--resume", folder, "--total-timesteps", 512)
    assert load(finished.checkpoint)["best_return"] == 100
    assert load(folder / "checkpoints" / "best.ckpt")["global_step"] == 192


def test_a_finished_run_has_nothing_to_do(straight: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    files = [path for path in folder.rglob("*") if path.is_file()]  # checkpoints and logs
    before = {path: path.read_bytes() for path in files}
    finished = call(ppo.main, "--resume", folder)
    assert finished.code == 0
    assert "nothing to do" in finished.out + finished.err
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del before[folder / "args.json"], after[folder / "args.json"]  # which tells of the flag
    assert after == before


def test_flags_beside_resume_win_and_others_are_those_of_the_checkpoint(straight: Finished, tmp_path: Path) -> None:
    older = straight.folder / "checkpoints" / "step_000000000384.ckpt"
    finished = call(ppo.main, "--resume", older, "--log-dir", tmp_path, "--learning-rate", 1e-3)
    stored = json.loads((finished.folder / "args.json").read_text())
    assert stored["learning_rate"] == 1e-3
    assert (stored["num_steps"], stored["norm_obs"], stored["anneal_clip"]) == (32, True, True)
    assert differences(content(straight.checkpoint)["agent"], content(finished.checkpoint)["agent"])


def test_another_number_of_environments_is_allowed_and_steps_are_counted_on(straight: Finished, tmp_path: Path) -> None:
    """384 steps are done; iterations of 3 × 32 = 96 steps fit 6 times into the 640 that are left."""
    older = straight.folder / "checkpoints" / "step_000000000384.ckpt"
    finished = call(ppo.main, "--resume", older, "--num-envs", 3, "--log-dir", tmp_path)
    assert finished.code == 0
    assert "warning: an iteration of the checkpoint has 64 steps (1 ranks), here 96" in finished.err
    assert finished.result["steps"] == str(384 + 6 * 96)
    # 384 steps of 8-step episodes before, 576 after
    assert finished.result["episodes"] == str(960 // 8)


def test_a_finished_run_goes_on_with_a_larger_budget(straight: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight.folder, tmp_path / "run"))
    finished = call(ppo.main, "--resume", folder, "--total-timesteps", 1280)
    assert finished.folder == folder
    assert (finished.code, finished.result["steps"]) == (0, "1280")
    assert [step for step, _ in logged(folder)["charts/SPS"]] == list(range(64, 1281, 64))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same run on two ranks; an iteration takes 128 steps."""
    log_dir = tmp_path_factory.mktemp("two_ranks")
    ended = run(*FORKED, PPO, *FLAGS, "--devices", 2, "--strategy", "ddp", "--log-dir", log_dir)
    assert ended.code == 0, ended.report()
    return run_folder(log_dir)


def test_two_ranks_resume_to_the_last_bit(two_ranks: Path, tmp_path: Path) -> None:
    older = two_ranks / "checkpoints" / "step_000000000384.ckpt"
    before = load(older)
    assert before["world_size"] == 2
    assert differences(before["generators"][0], before["generators"][1]), "both ranks draw the same numbers"
    ended = run(*FORKED, PPO, "--resume", older, "--log-dir", tmp_path)  # devices and strategy are in the checkpoint
    assert ended.code == 0, ended.report()
    last = two_ranks / "checkpoints" / "step_000000001024.ckpt"
    assert differences(content(last), content(ended.result["checkpoint"])) == []


def test_a_run_of_two_ranks_goes_on_with_one_which_takes_the_environments_of_both(
    two_ranks: Path, tmp_path: Path
) -> None:
    older = two_ranks / "checkpoints" / "step_000000000384.ckpt"
    flags = ["--resume", older, "--devices", 1, "--strategy", "auto", "--log-dir", tmp_path]
    with pytest.raises(CheckpointError, match=r"has 128 steps \(2 ranks\), here 64 \(1\)"):
        call(ppo.main, *flags, "--num-envs", 2)
    finished = call(ppo.main, *flags)
    assert (finished.code, finished.result["steps"]) == (0, "1024")
    assert "ranks: 1, 2 in the checkpoint: each now has --num-envs 4" in finished.err.splitlines()
    assert finished.result["episodes"] == str(1024 // 8)
    assert load(finished.checkpoint)["args"]["num_envs"] == 4
