"""SAC and DroQ when things go wrong: numbers that are not finite, environments that fail, signals; the run says why."""

import contextlib
import io
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fabricrl.algos.droq import droq
from fabricrl.algos.sac import sac
from fabricrl.data.replay import ReplayBuffer
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.errors import EnvError, NonFiniteError, RunError
from fabricrl.utils.optimizer import FlatState
from fabricrl.utils.seeding import env_seeds
from tests.envs import Fault
from tests.process import LIMIT, Finished, call, load, run_folder, run_team, saved_steps, signal_self, team

SCRIPTS: dict[str, Any] = {"sac": sac, "droq": droq}

# An iteration is a step in each of 2 environments; learning starts at 32, the fault comes at 64, a checkpoint each 16
SMALL: list[object] = ["--num-envs", 2, "--total-timesteps", 200, "--learning-starts", 32, "--batch-size", 8]
SMALL += ["--buffer-size", 100, "--hidden-sizes", 16, "--num-threads", 1, "--replay-ratio", 1]
SMALL += ["--checkpoint-every", 16, "--keep-checkpoints", 100, "--env-id", "tests.envs:Fault-v0"]
AT_STEP = 32  # of an environment
SECOND = f', "only_seed": {env_seeds(1, 0, 2)[1]}'  # --seed 1, rank 0, environment 1


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


def fault(algo: str, tmp_path: Path, kind: str, *flags: object, extra: str = "", at_step: int = AT_STEP) -> RunError:
    """The error that ends a run on an environment with this fault."""
    kwargs = f'{{"continuous": true, "kind": "{kind}", "at_step": {at_step}{extra}}}'
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(RunError) as caught:
        call(SCRIPTS[algo].main, *SMALL, "--env-kwargs", kwargs, "--log-dir", tmp_path, *flags)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict | list):
        return [tensor for part in (state.values() if isinstance(state, dict) else state) for tensor in tensors(part)]
    return [state] if isinstance(state, torch.Tensor) else []


def assert_last_checkpoint_is_good(tmp_path: Path, steps: list[int]) -> Path:
    """The checkpoints before the fault are there and no other; the newest has finite numbers."""
    folder = run_folder(tmp_path)
    assert saved_steps(folder) == steps
    assert not list(folder.glob("checkpoints/.*"))
    state, path = load_checkpoint(folder, "sac" if "sac" in folder.parts else "droq")
    assert state["global_step"] == steps[-1]
    learned = [state[name] for name in ("agent", "q_optimizer", "actor_optimizer")]
    assert all(tensor.isfinite().all() for tensor in tensors(learned))
    return path


BEFORE = [16, 32, 48, 64]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reward_nan", ["reward", "environment 1"]),
        ("reward_inf", ["reward", "environment 1"]),
        ("obs_nan", ["observation", "environment 1"]),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_before_they_are_learned(
    algo: str, tmp_path: Path, kind: str, words: list[str]
) -> None:
    error = fault(algo, tmp_path, kind, extra=SECOND)
    assert isinstance(error, NonFiniteError)
    assert error.exit_code == 5
    assert all(word in str(error) for word in words), error
    assert_last_checkpoint_is_good(tmp_path, BEFORE)


def test_a_final_observation_that_is_not_finite_is_noticed_though_the_next_episode_has_begun(
    algo: str, tmp_path: Path
) -> None:
    """Episodes take 8 steps: that with index 39 returns an episode's last observation, and the reset's beside it."""
    error = fault(algo, tmp_path, "obs_nan", extra=SECOND, at_step=39)
    assert "final observation of environment 1 is not finite" in str(error)
    assert_last_checkpoint_is_good(tmp_path, [16, 32, 48, 64])


@pytest.mark.parametrize("kind", ["obs_nan", "reward_nan"])
def test_the_normaliser_never_sees_what_is_not_finite(algo: str, tmp_path: Path, kind: str) -> None:
    assert fault(algo, tmp_path, kind, "--norm-obs").exit_code == 5
    assert_last_checkpoint_is_good(tmp_path, BEFORE)


def test_the_first_observation_must_be_finite(algo: str, tmp_path: Path) -> None:
    with mock.patch.object(Fault, "_obs", return_value=np.full(2, np.nan, np.float32)):
        error = fault(algo, tmp_path, "none")
    assert error.exit_code == 5
    assert "observation" in str(error)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise_step", ["environment 1", "step", "RuntimeError: this environment cannot step"]),
        ("raise_reset", ["RuntimeError: this environment cannot be reset"]),
    ],
)
def test_an_exception_of_an_environment_ends_the_run_and_is_reported(
    algo: str, tmp_path: Path, kind: str, words: list[str]
) -> None:
    error = fault(algo, tmp_path, kind, extra=SECOND)
    assert isinstance(error, EnvError)
    assert error.exit_code == 4
    assert all(word in str(error) for word in words), error
    assert saved_steps(run_folder(tmp_path))[-1] in (48, 64)


def spoiled(original: Callable, at_call: int) -> Callable:
    """Returns NaN from its n-th call on, as after a bug in what somebody has changed."""
    calls = []

    def loss(*given: Any) -> Any:
        calls.append(1)
        factor, found = math.nan if len(calls) >= at_call else 1, original(*given)
        return tuple(part * factor for part in found) if isinstance(found, tuple) else found * factor

    return loss


@pytest.mark.parametrize("name", ["critic_loss", "actor_loss", "alpha_loss", "td_target"])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(
    algo: str, tmp_path: Path, name: str
) -> None:
    """34 updates after learning has started, at step 66: a critic update and an actor's per step on average."""
    with mock.patch.object(SCRIPTS[algo], name, spoiled(getattr(SCRIPTS[algo], name), 33)):
        error = fault(algo, tmp_path, "none")
    assert isinstance(error, NonFiniteError)
    assert "not finite" in str(error)
    assert_last_checkpoint_is_good(tmp_path, BEFORE)


def test_nan_that_was_learned_is_noticed_at_the_next_action_also_where_nothing_is_logged_or_saved(
    algo: str, tmp_path: Path
) -> None:
    steps, step = [], ReplayBuffer.add

    def counted(*given: Any) -> None:
        steps.append(1)
        step(*given)

    rarely = ["--checkpoint-every", 1_000_000, "--log-every", 1_000_000]
    spoil = mock.patch.object(SCRIPTS[algo], "actor_loss", spoiled(SCRIPTS[algo].actor_loss, 33))
    with spoil, mock.patch.object(ReplayBuffer, "add", counted):
        error = fault(algo, tmp_path, "none", *rarely)
    assert error.exit_code == 5
    assert str(error).startswith("not finite after the update: ")
    assert 32 < len(steps) <= 34


def test_a_gradient_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(algo: str, tmp_path: Path) -> None:
    """The loss is finite, its gradient is not, and a checkpoint follows at once: that of step 64 holds no NaN."""
    gather, calls = FlatState.gather, []

    def spoil(flat: FlatState) -> torch.Tensor:
        gradient = gather(flat)
        calls.append(1)
        if len(calls) == 64:  # critics and actor take 32 updates each up to step 64
            gradient[0] = math.nan
        return gradient

    with mock.patch.object(FlatState, "gather", spoil):
        error = fault(algo, tmp_path, "none")
    assert error.exit_code == 5
    assert_last_checkpoint_is_good(tmp_path, BEFORE[:3])


@pytest.mark.parametrize("rate", ["--q-lr", "--policy-lr"])
def test_a_learning_rate_at_which_parameters_overflow_ends_the_run(algo: str, rate: str, tmp_path: Path) -> None:
    assert fault(algo, tmp_path, "none", rate, 1e30).exit_code == 5
    assert_last_checkpoint_is_good(tmp_path, [16, 32])


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [("raise_step", 4, "this environment cannot step"), ("reward_nan", 5, "reward of environment 0")],
)
def test_a_fault_on_one_of_two_ranks_ends_both_with_its_code_and_one_line(
    tmp_path: Path, kind: str, code: int, words: str
) -> None:
    kwargs = f'{{"continuous": true, "kind": "{kind}", "at_step": 24, "only_seed": {env_seeds(1, 1, 2)[0]}}}'
    flags = [*SMALL, "--env-kwargs", kwargs, "--log-dir", tmp_path / "logs"]
    ended = run_team(sac.__name__, *flags, folder=tmp_path, code=code)
    (message,) = ended.errors
    assert words in message
    path = assert_last_checkpoint_is_good(tmp_path / "logs", [16, 32, 48, 64, 80, 96])
    assert path.with_suffix(".shard1").exists()


def nan_on_rank_1(rank: int) -> None:
    if rank == 1:
        sac.critic_loss = spoiled(sac.critic_loss, 33)


def test_a_loss_that_is_not_finite_on_one_of_two_ranks_ends_both(tmp_path: Path) -> None:
    flags = [*SMALL, "--env-kwargs", '{"continuous": true}', "--log-dir", tmp_path / "logs"]
    ended = run_team(sac.__name__, *flags, folder=tmp_path, code=5, prepare=nan_on_rank_1)
    assert ended.errors
    assert all("not finite" in line for line in ended.errors)
    assert_last_checkpoint_is_good(tmp_path / "logs", BEFORE)


# --- Signals

ENDLESS: list[object] = [*SMALL, "--env-kwargs", '{"continuous": true}', "--total-timesteps", 1_000_000_000]
ENDLESS += ["--checkpoint-every", 3200, "--keep-checkpoints", 2]


def signalled(algo: str, number: int, moment: str, *flags: object) -> Finished:
    """A run that signals itself in its 30th iteration, in the middle of the rollout or of the update."""
    calls = []
    add, train = ReplayBuffer.add, SCRIPTS[algo].train

    def count(limit: int) -> None:
        calls.append(1)
        if len(calls) == limit:
            signal_self(number)

    def signalled_add(*given: Any) -> None:
        count(30)
        add(*given)

    def signalled_train(*given: Any) -> Any:
        # The first updates come after the 17th iteration; DroQ trains once an environment step, of which it has two
        count((30 - 16) * (2 if algo == "droq" else 1))
        return train(*given)

    targets = {"rollout": (ReplayBuffer, "add", signalled_add), "update": (SCRIPTS[algo], "train", signalled_train)}
    with mock.patch.object(*targets[moment]):
        return call(SCRIPTS[algo].main, *ENDLESS, "--total-timesteps", 400, *flags)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["rollout", "update"])
def test_a_signal_ends_the_run_after_the_iteration_with_a_checkpoint_that_resumes(
    algo: str, moment: str, number: int, code: int, tmp_path: Path
) -> None:
    finished = signalled(algo, number, moment, "--log-dir", tmp_path)
    assert finished.code == code
    assert finished.result["steps"] == "60"
    assert saved_steps(finished.folder) == [60]
    resumed = call(SCRIPTS[algo].main, "--resume", finished.folder, "--total-timesteps", 80)
    assert (resumed.code, resumed.result["steps"]) == (0, "80")
    state = load(resumed.checkpoint)
    assert state["q_optimizer"]["state"][0]["step"] == state["schedule"]["done"] == 80 - 32


@pytest.mark.parametrize(("rank", "number", "code"), [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)])
def test_a_signal_to_one_of_two_ranks_stops_both_and_each_saves_its_buffer(
    tmp_path: Path, rank: int, number: int, code: int
) -> None:
    flags = [*ENDLESS, "--checkpoint-every", 160, "--buffer-memmap", "--log-dir", tmp_path / "logs"]
    with team(sac.__name__, *flags, folder=tmp_path) as running:
        deadline = time.monotonic() + LIMIT
        while not list((tmp_path / "logs").glob("*/*/*/checkpoints/step_*.ckpt")):
            assert time.monotonic() < deadline, running.report()
            time.sleep(0.05)
        os.kill(running.ranks[rank].pid or 0, number)
        running.finish()
    assert running.code == code, running.report()
    assert running.errors == []
    state, path = load_checkpoint(run_folder(tmp_path / "logs"), "sac")
    assert running.result["checkpoint"] == str(path)
    assert int(running.result["steps"]) == state["global_step"]
    assert load(path.with_suffix(".shard1"))["global_step"] == state["global_step"]


def test_a_run_that_fails_does_not_leave_the_file_of_its_buffer(tmp_path: Path) -> None:
    """It may be larger than memory, and what it held is in the checkpoints."""
    fault("sac", tmp_path, "raise_step", "--buffer-memmap")
    assert {path.name for path in run_folder(tmp_path).iterdir() if path.is_file()} == {
        "args.json", *(path.name for path in run_folder(tmp_path).glob("events*")),
    }  # fmt: skip
