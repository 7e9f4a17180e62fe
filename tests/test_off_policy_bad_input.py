"""Mistakes on SAC's and DroQ's command lines end in one line that names the argument, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from fabricrl.algos import run as run_module
from fabricrl.algos.droq import droq
from fabricrl.algos.sac import sac
from fabricrl.data import memory
from fabricrl.data.memory import GIB
from fabricrl.utils.errors import ConfigError
from tests.process import FORKED, SAC, call, run, run_team
from tests.test_launchers import DDP

SCRIPTS: dict[str, Any] = {"sac": sac, "droq": droq}


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ranks nor a run; what only they can know is marked by the test's name. Environments never start."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the mistake was not noticed before anything started")

    names = ["make_envs"] if "launch" in request.node.name else ["launch", "RunFolder", "make_envs"]
    for name in names:
        monkeypatch.setattr(run_module, name, forbidden)


def complaint(algo: str, *flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(SCRIPTS[algo].main, *flags)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


VALUES = [
    # case 34 of the list of faults: counts
    ("--buffer-size", "0", "at least 1"),
    ("--batch-size", "0", "at least 1"),
    ("--batch-size", "2.5", "a whole number"),
    ("--n-step", "0", "at least 1"),
    ("--num-critics", "0", "at least 1"),
    ("--learning-starts", "-1", "0 or more"),
    # case 45: rates and coefficients
    ("--tau", "0", "above 0"),
    ("--tau", "1.1", "between 0 and 1"),
    ("--tau", "nan", "between 0 and 1"),
    ("--gamma", "2", "between 0 and 1"),
    ("--alpha", "0", "above 0"),
    ("--alpha", "inf", "above 0"),
    ("--replay-ratio", "0", "above 0"),
    ("--replay-ratio", "nan", "above 0"),
    ("--policy-lr", "-1", "above 0"),
    ("--q-lr", "0", "above 0"),
    ("--target-entropy", "nan", "a number"),
    ("--activation", "sine", "relu"),
    # numbers that are too large
    ("--n-step", "1001", "at most 1000"),
    ("--num-critics", "1001", "at most 1000"),
    ("--replay-ratio", "1001", "at most 1000"),
    ("--alpha", "1e31", "at most 1e+30"),
    ("--target-entropy", "1e31", "1e+30"),
    ("--buffer-size", "1e20", "an integer below 2^63"),
    ("--accelerator", "tpu", "cpu"),
]
OWN_VALUES = {
    "sac": [
        ("--policy-frequency", "0", "at least 1"),
        ("--policy-frequency", "1001", "at most 1000"),
        ("--target-network-frequency", "0", "at least 1"),
    ],
    "droq": [("--dropout", "1", "between 0 and 0.99"), ("--dropout", "-0.1", "between 0")],
}
ALL_VALUES = [(algo, *values) for algo in SCRIPTS for values in VALUES + OWN_VALUES[algo]]


@pytest.mark.parametrize(("algo", "flag", "value", "allowed"), ALL_VALUES, ids=lambda value: str(value))
def test_a_value_that_is_not_allowed_is_refused_with_flag_value_and_what_is_allowed(
    algo: str, flag: str, value: str, allowed: str
) -> None:
    message = complaint(algo, flag, value)
    assert flag in message
    assert value in message or float(value) == float(message.split(" is ")[1].split(":")[0])
    assert allowed in message


@pytest.mark.parametrize(("typo", "meant"), [("--bufer-size", "--buffer-size"), ("--replay-rato", "--replay-ratio")])
def test_an_unknown_flag_is_refused_with_the_nearest_one(algo: str, typo: str, meant: str) -> None:
    message = complaint(algo, typo, 1)
    assert typo in message
    assert f"did you mean {meant}?" in message


def test_a_flag_of_the_other_algorithm_is_refused() -> None:
    assert "--dropout" in complaint("sac", "--dropout", 0.1)
    assert "--policy-frequency" in complaint("droq", "--policy-frequency", 1)


# --- Cases 38 and 39: spaces


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "tuple"])
def test_actions_that_are_no_box_are_refused_with_what_is_supported(algo: str, kind: str) -> None:
    message = complaint(algo, "--env-id", "tests.envs:Odd-v0", "--env-kwargs", f'{{"action": "{kind}"}}')
    assert "action space" in message
    assert {"discrete": "Discrete(3)", "multi_binary": "MultiBinary(4)"}.get(kind, "(") in message
    assert message.endswith(f"this algorithm takes Box{'' if kind == 'tuple' else '; ppo takes it'}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("box_unbounded", ["inf", "finite bounds"]), ("box_half_bounded", ["inf", "finite bounds"]),
     ("box_point", ["finite bounds"]), ("box_int", ["int64", "real numbers"])],
)  # fmt: skip
def test_a_box_of_actions_that_cannot_be_stretched_to_is_refused(algo: str, kind: str, words: list[str]) -> None:
    message = complaint(algo, "--env-id", "tests.envs:Odd-v0", "--env-kwargs", f'{{"action": "{kind}"}}')
    assert "action space Box(" in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(("kind", "space"), [("sequence", "Sequence"), ("text", "Text")])
def test_observations_that_are_not_supported_are_refused_with_those_that_are(algo: str, kind: str, space: str) -> None:
    message = complaint(algo, "--env-id", "tests.envs:Odd-v0", "--env-kwargs", f'{{"action": "box", "obs": "{kind}"}}')
    assert "observation space" in message
    assert space in message
    assert "MultiBinary" in message


# --- Case 42: a buffer that does not fit


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["of memory is free", "--buffer-memmap", "--implicit-next-obs"]),
        (["--implicit-next-obs"], ["of memory is free", "--buffer-memmap"]),
        (["--buffer-memmap"], ["are free"]),
    ],
    ids=str,
)
def test_a_buffer_that_does_not_fit_is_refused_after_launch_with_both_figures_and_leaves_nothing(
    algo: str, flags: list[str], words: list[str], tmp_path: Path
) -> None:
    """10¹³ transitions of Pendulum take 36 bytes each, or 28."""
    message = complaint(algo, "--buffer-size", 10**13, *flags, "--log-dir", tmp_path)
    size = 28 if "--implicit-next-obs" in flags else 36
    assert message.startswith("--buffer-")
    assert f"{size * 10**13 / GIB:.2f} GiB" in message
    assert message.count("GiB") == 2
    assert all(word in message for word in words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_advice_that_is_followed_already_is_not_given_after_launch(algo: str, tmp_path: Path) -> None:
    message = complaint(algo, "--buffer-size", 10**13, "--implicit-next-obs", "--log-dir", tmp_path)
    assert "--implicit-next-obs" not in message


def test_a_buffer_that_just_fits_is_allowed_after_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ["--buffer-size", 300, "--total-timesteps", 400, "--learning-starts", 300, "--log-dir", tmp_path]
    monkeypatch.setattr(memory, "available_memory", lambda: 36.0 * 300)
    with pytest.raises(AssertionError, match="not noticed"):  # environments start
        call(sac.main, *flags)
    monkeypatch.setattr(memory, "available_memory", lambda: 36.0 * 300 - 1)
    assert "--buffer-size" in complaint("sac", *flags)


def scarce(rank: int) -> None:
    """Memory for one buffer of this size, not for two."""
    memory.available_memory = lambda: 36.0 * 100 * 1.5


def test_ranks_of_a_machine_share_its_memory_and_one_of_them_says_so_after_launch(tmp_path: Path) -> None:
    flags = ["--buffer-size", 100, "--batch-size", 8, "--learning-starts", 50, "--total-timesteps", 200]
    line = ["fabricrl.algos.sac.sac", *flags, "--log-dir", tmp_path / "logs"]
    ended = run_team(*line, folder=tmp_path, code=2, prepare=scarce)
    (message,) = ended.errors
    assert "2 × 0.00 GiB" in message


# --- Cases 43 and 44: amounts


def test_learning_that_would_never_start_is_refused(algo: str) -> None:
    for starts in (1000, 5000):
        message = complaint(algo, "--learning-starts", starts, "--total-timesteps", 1000)
        assert f"--learning-starts is {starts}" in message
        assert "1000" in message.split("must be")[1]


def test_learning_starts_below_a_batch_is_raised_to_one_with_a_warning_after_launch(
    algo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    flags = ["--batch-size", 12, "--learning-starts", 5, "--buffer-size", 40, "--hidden-sizes", 8, "--num-threads", 1]
    finished = call(SCRIPTS[algo].main, *flags, "--replay-ratio", 1, "--total-timesteps", 20, "--log-dir", tmp_path)
    (warning,) = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert "12" in warning
    assert "batch" in warning


def test_a_batch_that_the_run_never_has_is_refused_after_launch(algo: str, tmp_path: Path) -> None:
    flags = ["--batch-size", 64, "--learning-starts", 0, "--total-timesteps", 64, "--log-dir", tmp_path]
    message = complaint(algo, *flags)
    assert "--total-timesteps is 64" in message
    assert "above 64, when learning starts" in message
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_buffer_is_refused(algo: str) -> None:
    message = complaint(algo, "--batch-size", 101, "--buffer-size", 100)
    assert "--batch-size is 101" in message
    assert "buffer-size = 100" in message


def test_a_buffer_that_holds_less_than_a_step_of_all_environments_is_refused(algo: str) -> None:
    message = complaint(algo, "--batch-size", 2, "--buffer-size", 3, "--num-envs", 4)
    assert "--buffer-size is 3" in message
    assert "4" in message


def test_a_run_that_is_shorter_than_one_iteration_is_refused(algo: str) -> None:
    message = complaint(algo, "--num-envs", 8, "--total-timesteps", 7, "--learning-starts", 0)
    assert "--total-timesteps is 7" in message
    assert "8" in message


def test_two_ranks_that_are_shorter_than_one_iteration_together_say_so_once_after_launch(tmp_path: Path) -> None:
    flags = ["--num-envs", 8, "--total-timesteps", 15, "--learning-starts", 0, "--batch-size", 2]
    ended = run_team("fabricrl.algos.sac.sac", *flags, "--log-dir", tmp_path / "logs", folder=tmp_path, code=2)
    assert ended.errors == ["error: --total-timesteps is 15: it must be at least 16"]
    assert not (tmp_path / "logs").exists()


def test_ranks_warn_once_that_learning_starts_after_a_batch_of_each_after_launch(tmp_path: Path) -> None:
    flags = ["--batch-size", 12, "--learning-starts", 20, "--buffer-size", 40, "--hidden-sizes", 8, "--num-threads", 1]
    line = [*flags, "--total-timesteps", 26, "--log-dir", tmp_path / "logs"]
    ended = run_team("fabricrl.algos.sac.sac", *line, folder=tmp_path)
    warnings = [line for line in ended.printed("err").splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "24" in warnings[0]


# --- As a user sees it


def test_a_real_process_ends_with_code_2_and_exactly_one_line_on_standard_error(tmp_path: Path) -> None:
    ended = run(*FORKED, SAC, "--env-id", "CartPole-v1", *DDP, cwd=tmp_path)
    assert ended.code == 2, ended.report()
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("error: action space Discrete(2) is not supported")
    assert not list(tmp_path.iterdir())
