"""Environments that fail and numbers that are not finite: the run says why it ends, the last checkpoint is good."""

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import main
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.ending import end_if_out_of_memory
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError, RunError
from fabricrl.utils.seeding import env_seeds
from tests.conftest import BareRun, on_ranks
from tests.process import FORKED, PPO, Running, Team, call, load, run, run_folder, run_team, saved_steps

# An iteration is 2 environments × 16 steps; a checkpoint after each. The fault comes in the third
SMALL = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 3200]
SMALL += ["--checkpoint-every", 1, "--keep-checkpoints", 100, "--env-id", "tests.envs:Fault-v0"]
AT_STEP = 40  # of an environment: in its third rollout
SECOND = f', "only_seed": {env_seeds(1, 0, 2)[1]}'  # --seed 1, rank 0, environment 1


def fault(tmp_path: Path, kind: str, *flags: object, extra: str = "", at_step: int = AT_STEP) -> RunError:
    """The error that ends a run on an environment with this fault."""
    kwargs = f'{{"kind": "{kind}", "at_step": {at_step}{extra}}}'
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(RunError) as caught:
        call(main, *SMALL, "--env-kwargs", kwargs, "--log-dir", tmp_path, *flags)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def assert_last_checkpoint_is_good(tmp_path: Path, steps: list[int]) -> None:
    """The checkpoints of the iterations before the fault are there and no other; the newest has finite numbers."""
    folder = run_folder(tmp_path)
    assert saved_steps(folder) == steps
    assert not list(folder.glob("checkpoints/.*"))
    state, _ = load_checkpoint(folder, "ppo")
    assert state["global_step"] == steps[-1]
    assert all(tensor.isfinite().all() for tensor in state["agent"].values())
    assert all(tensor.isfinite().all() for tensor in state["optimizer"]["state"][0].values())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reward_nan", ["reward", "environment 1", "step 8 "]),  # step 40 = 2 rollouts of 16, and the one with index 8
        ("reward_inf", ["reward", "environment 1", "step 8 "]),
        ("obs_nan", ["observation", "environment 1", "step 8 "]),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_before_they_are_learned(
    tmp_path: Path, kind: str, words: list[str]
) -> None:
    error = fault(tmp_path, kind, extra=SECOND)
    assert isinstance(error, NonFiniteError)
    assert error.exit_code == 5
    assert all(word in f"{error} " for word in words), error
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise_step", ["environment 1", "step", "RuntimeError: this environment cannot step"]),
        ("raise_reset", ["RuntimeError: this environment cannot be reset"]),
        ("multi_arg_error", ["environment 1", "TwoArgumentError: code 17: this environment is out of order"]),
    ],
)
def test_an_exception_of_an_environment_ends_the_run_and_is_reported(
    tmp_path: Path, kind: str, words: list[str]
) -> None:
    error = fault(tmp_path, kind, extra=SECOND)
    assert isinstance(error, EnvError)
    assert error.exit_code == 4
    assert all(word in str(error) for word in words), error
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


@pytest.mark.parametrize("kind", ["raise_init", "raise_reset"])
def test_an_environment_that_cannot_start_ends_the_run_before_any_checkpoint(tmp_path: Path, kind: str) -> None:
    error = fault(tmp_path, kind, at_step=0)
    assert isinstance(error, EnvError)
    assert "this environment cannot be" in str(error)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [("raise_step", "RuntimeError: this environment cannot step"), ("multi_arg_error", "TwoArgumentError: code 17")],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Gymnasium reports the worker's error as warnings
def test_an_environment_fails_alike_in_a_process_of_its_own(tmp_path: Path, kind: str, words: str) -> None:
    error = fault(tmp_path, kind, "--vectorization", "async", extra=SECOND)
    assert isinstance(error, EnvError)
    assert words in str(error)
    assert "environment 1" in str(error)
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


def test_a_killed_environment_process_is_named_and_ends_the_run_with_code_4(tmp_path: Path) -> None:
    kwargs = f'{{"kind": "die", "at_step": {AT_STEP}{SECOND}}}'
    flags = ["--env-kwargs", kwargs, "--vectorization", "async", "--log-dir", tmp_path]
    ended = run(*FORKED, PPO, *SMALL, *flags)
    assert ended.code == 4, ended.report()
    assert ended.errors == ["error: env worker 1 died in step (SIGKILL)"]
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


@pytest.mark.parametrize("norm", ["--norm-obs", "--norm-reward"])
def test_normalisers_never_see_what_is_not_finite(tmp_path: Path, norm: str) -> None:
    assert fault(tmp_path, "obs_nan" if norm == "--norm-obs" else "reward_inf", norm).exit_code == 5
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


def test_a_gradient_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(tmp_path: Path) -> None:
    """The first iterations learn at a usual rate; the third at one at which parameters overflow."""
    rates = iter([1e-3, 1e-3, 1e38])
    with mock.patch("fabricrl.algos.ppo.ppo.anneal", lambda initial, *_: next(rates) if initial == 1e-3 else initial):
        error = fault(tmp_path, "none", "--learning-rate", 1e-3)
    assert error.exit_code == 5
    assert "not finite" in str(error)
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


def test_a_learning_rate_at_which_parameters_overflow_is_not_finite_from_the_start(tmp_path: Path) -> None:
    assert fault(tmp_path, "none", "--learning-rate", 1e30).exit_code == 5
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(
    tmp_path: Path, max_grad_norm: float
) -> None:
    """In the third iteration one advantage is NaN, as after a bug in what somebody has changed."""
    calls = []

    def broken(values: object, returns: object, *rest: object) -> tuple:
        from fabricrl.utils.returns import gae

        advantages, returns = gae(values, returns, *rest)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 3:
            advantages[0, 0] = math.nan
        return advantages, returns

    with mock.patch("fabricrl.algos.ppo.ppo.gae", broken):
        error = fault(tmp_path, "none", "--max-grad-norm", max_grad_norm)
    assert error.exit_code == 5
    assert_last_checkpoint_is_good(tmp_path, [32, 64])


def test_of_two_faults_at_once_the_first_rank_tells_its_own_and_all_end_with_its_code() -> None:
    def work(fabric: Any) -> tuple[int, int]:
        run = BareRun(PPOArgs(), fabric)

        def step() -> None:
            with run.failing_together():
                if fabric.global_rank in (1, 2):
                    raise (EnvError, NonFiniteError)[fabric.global_rank - 1]("of this rank")

        with pytest.raises(RunError) as caught:
            step()
        return caught.value.told_by, caught.value.exit_code

    assert on_ranks(4, work) == [(1, EnvError.exit_code)] * 4


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [("raise_step", 4, "this environment cannot step"), ("reward_nan", 5, "reward of environment 0")],
)
def test_a_fault_on_one_of_two_ranks_ends_both_with_its_code_and_one_line(
    tmp_path: Path, kind: str, code: int, words: str
) -> None:
    kwargs = f'{{"kind": "{kind}", "at_step": {AT_STEP}, "only_seed": {env_seeds(1, 1, 2)[0]}}}'
    flags = [*SMALL, "--env-kwargs", kwargs, "--log-dir", tmp_path / "logs"]
    ended: Running | Team
    if kind == "raise_step":  # under Fabric's launcher
        ended = run(*FORKED, PPO, *flags, "--devices", 2, "--strategy", "ddp")
        assert ended.code == code, ended.report()
    else:
        ended = run_team("fabricrl.algos.ppo.ppo", *flags, folder=tmp_path, code=code)
    assert len(ended.errors) == 1, ended.report()
    assert words in ended.errors[0]
    assert_last_checkpoint_is_good(tmp_path / "logs", [64, 128])
    assert load(run_folder(tmp_path / "logs") / "checkpoints" / "best.ckpt")["global_step"] in (64, 128)


# --- Memory


def short_of_memory(rank: int) -> None:
    """The last rank asks PyTorch for more memory than any machine has, in its tenth update."""
    from fabricrl.utils.optimizer import FlatState

    gather, calls = FlatState.gather, []

    def asking(flat: FlatState) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 10 and rank == int(os.environ["WORLD_SIZE"]) - 1:
            torch.empty(2**60)
        return gather(flat)

    FlatState.gather = asking  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("algo", "world_size", "advice"),
    [
        ("ppo", 1, "lower --num-envs or --num-steps, or raise --num-minibatches"),
        ("ppo", 3, "lower --num-envs or --num-steps, or raise --num-minibatches"),
        ("sac", 1, "lower --num-envs, --batch-size or --buffer-size"),
        ("ppo_decoupled", 3, "lower --num-envs or --num-steps, or raise --num-minibatches"),
    ],
)
def test_too_little_memory_ends_all_ranks_in_a_line_that_says_what_takes_less(
    algo: str, world_size: int, advice: str, tmp_path: Path
) -> None:
    """PyTorch's own error, as it is on a CPU; who waits for the rank that has it is told by way of the store."""
    flags = ["--total-timesteps", 3200, "--log-dir", tmp_path / "logs"]
    small = ["--learning-starts", 20, "--batch-size", 4, "--hidden-sizes", 8]
    flags += small if algo == "sac" else ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2]
    script = f"fabricrl.algos.{algo.removesuffix('_decoupled')}.{algo}"
    ended = run_team(script, *flags, folder=tmp_path, code=2, world_size=world_size, prepare=short_of_memory)
    asked = 4 * 2**60
    assert ended.errors == [
        f"error: rank {world_size - 1} is out of memory, as it needs {asked} bytes more: {advice}"
    ], ended.report()
    assert "Traceback" not in ended.printed("err")


@pytest.mark.parametrize(
    ("error", "kind", "amount"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a capacity"),
            "GPU memory",
            "20.00 MiB more",
        ),
        (
            MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
            "memory",
            "7.28 TiB more",
        ),
        (MemoryError(), "memory", "more"),
    ],
)
def test_what_a_gpu_and_numpy_say_of_memory_is_understood(error: Exception, kind: str, amount: str) -> None:
    with pytest.raises(ConfigError, match=f"^rank 0 is out of {kind}, as it needs {amount}: lower --num-envs or "):
        end_if_out_of_memory(error, PPOArgs())
    end_if_out_of_memory(RuntimeError("something else"), PPOArgs())
