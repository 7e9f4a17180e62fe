"""tune.py: a small script stands for the algorithm; its evaluations peak at a learning rate of 0.01."""

import csv
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabricrl import sweep, tune
from fabricrl.utils.errors import ConfigError
from tests.process import PYTHON, call, started, wait_for

optuna = pytest.importorskip("optuna")

SCRIPT = """
import argparse, math, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("--env-id", "--total-timesteps", "--eval-every", "--eval-episodes", "--logger", "--wait"):
    parser.add_argument(name)
parser.add_argument("--learning-rate", type=float, default=1.0)
parser.add_argument("--anneal-lr", action=argparse.BooleanOptionalAction)
parser.add_argument("--seed", type=int)
parser.add_argument("--log-dir", type=pathlib.Path)
a = parser.parse_args()
if a.learning_rate > 0.5:
    print("error: --learning-rate is too much", file=sys.stderr)
    sys.exit(2)
value = -abs(math.log10(a.learning_rate) + 2) + a.seed + bool(a.anneal_lr)
folder = a.log_dir / "algo" / "Env-v0" / "run"
folder.mkdir(parents=True)
(folder / "metrics.csv").write_text(f"step,eval/return_mean\\n100,-99\\n200,{value}\\n300,")
if a.wait and not pathlib.Path(a.wait).exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (a.log_dir / "waiting").touch()
    time.sleep(600)
"""
SPACE = """
learning_rate = { low = 1e-6, high = 1e-1, log = true }
anneal-lr = [true, false]
"""


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.setattr(tune, "flags_of", lambda script: [*re.findall("--[a-z-]+", SCRIPT), "--no-anneal-lr"])
    monkeypatch.setattr(tune, "algorithms", lambda: {"stub": tmp_path / "script.py"})
    monkeypatch.setattr(tune, "POLL", 0.02)
    return ["stub", "--space", tmp_path / "space.toml", "--log-dir", tmp_path / "logs", "--sampler-seed", 1]


def trials(tmp_path: Path) -> list[dict[str, str]]:
    (path,) = tmp_path.glob("logs/tune/*/trials.csv")
    return list(csv.DictReader(path.open()))


def test_every_algorithm_has_a_space_of_its_own_arguments() -> None:
    for name, script in sweep.algorithms().items():
        args = (script.parent / "args.py").read_text() + (script.parents[1] / "args.py").read_text()
        args += (script.parents[1] / "off_policy/args.py").read_text() + (script.parents[1] / "ppo/args.py").read_text()
        for argument in tune.read_space(script.parent / "space.toml"):
            assert f"{argument.replace('-', '_')}:" in args, (name, argument)


def test_the_search_finds_what_the_first_trial_lacked(flags: list[object], tmp_path: Path) -> None:
    done = call(tune.main, *flags, "--learning-rate", "1e-6", "--trials", 20, "--seeds", 2, "--jobs", 2, "--json")
    assert done.code == 0, done
    best = json.loads(done.out)
    assert best["value"] > 1.5  # at best 2.5: of seeds 1 and 2, annealed
    assert f"--learning-rate={best['params']['learning-rate']}" in best["command"]
    rows = trials(tmp_path)
    assert len(rows) == 20
    assert float(rows[0]["learning-rate"]) == 1e-6
    folder = Path(best["folder"])
    assert {path.name for path in folder.glob("*.png")} == {"history.png", "importance.png"}


def test_a_study_goes_on_where_it_was(flags: list[object], tmp_path: Path) -> None:
    for trials_, count in ((2, 2), (4, 4), (4, 4)):
        assert call(tune.main, *flags, "--trials", trials_).code == 0
        assert len(trials(tmp_path)) == count


def test_trials_that_fail_are_told_and_count(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("learning-rate = [0.9, 0.01]\n")
    done = call(tune.main, *flags, "--trials", 6)
    assert done.code == 0
    assert "--learning-rate is too much" in done.err
    assert {row["state"] for row in trials(tmp_path)} == {"complete", "fail"}
    (tmp_path / "space.toml").write_text("learning-rate = [0.9]\n")
    with pytest.raises(ConfigError, match="--learning-rate is too much"):
        call(tune.main, *flags, "--trials", 9, "--study", "hopeless")
    study = optuna.load_study(study_name="hopeless", storage=f"sqlite:///{tmp_path}/logs/tune/hopeless/tune.db")
    assert len(study.trials) == 3  # one error for all of them


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_argument_that_no_trial_has_chosen_ends_the_search_and_is_no_trial(
    flags: list[object], tmp_path: Path, jobs: int
) -> None:
    start = ["--learning-rate", 0.01, "--anneal-lr", "--jobs", jobs]
    for _ in range(2):
        with pytest.raises(ConfigError, match="unrecognized arguments: surplus") as caught:
            call(tune.main, *flags, *start, "--trials", 3, "surplus")
        assert caught.value.exit_code == 2
    study = optuna.load_study(
        study_name="stub-CartPole-v1", storage=f"sqlite:///{tmp_path}/logs/tune/stub-CartPole-v1/tune.db"
    )
    assert tune.count_done(study) == 0
    assert sum(trial.state.is_finished() for trial in study.trials) <= 2 * jobs
    assert call(tune.main, *flags, *start, "--trials", 3).code == 0
    rows = [row for row in trials(tmp_path) if row["state"] == "complete"]
    assert len(rows) == 3
    assert 2 in [float(row["value"]) for row in rows]  # that of where the search was to start


@pytest.mark.parametrize(("error", "about"), [
    ("--num-minibatches is 3: it must divide num-envs × num-steps = 8", True),
    ("--total-timesteps is 9: at least num-envs × num-steps = 8", True),
    ("--no-anneal-lr cannot be", True),
    ("--num-step is not an argument; did you mean --num-steps?", False),
    ("--num-steps-ahead is not an argument", False),
])  # fmt: skip
def test_an_error_is_about_the_arguments_that_it_names(error: str, about: bool) -> None:
    assert tune.names_any(error, {"num-steps": [], "anneal-lr": []}) == about


def test_a_target_ends_the_search(flags: list[object], tmp_path: Path) -> None:
    for _ in range(2):  # called again, it has nothing to do
        done = call(tune.main, *flags, "--trials", 50, "--learning-rate", 0.01, "--anneal-lr", "--target", 1.9)
        assert done.out.splitlines()[1].startswith("fabricrl stub --env-id CartPole-v1 ")
        assert len(trials(tmp_path)) == 1


def test_a_waiting_trial_is_taken_once(tmp_path: Path) -> None:
    """Over SQLite, Optuna alone gives one to several threads."""
    study = tune.open_study("study", f"sqlite:///{tmp_path}/tune.db", 1, 1)
    for rate in range(24):
        study.enqueue_trial({"learning-rate": rate})
    with ThreadPoolExecutor(4) as threads:
        numbers = list(threads.map(lambda _: study.ask().number, range(24)))
    assert sorted(numbers) == list(range(24))


def test_a_study_keeps_its_space(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("learning-rate = [0.01]\n")
    assert call(tune.main, *flags, "--trials", 1).code == 0
    (tmp_path / "space.toml").write_text("learning-rate = [0.01, 0.02]\n")
    with pytest.raises(ConfigError, match=r"learning-rate: .* another --study"):
        call(tune.main, *flags, "--trials", 2)


def test_a_study_keeps_the_flags_of_all_its_trials(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "over").touch()
    wait, steps = ["--wait", tmp_path / "over"], ["--total-timesteps", 2048]
    assert call(tune.main, *flags, *steps, *wait, "--trials", 1).code == 0
    assert call(tune.main, *flags, f"--wait={tmp_path / 'over'}", *steps, "--trials", 2, "--jobs", 2).code == 0
    for more, told in (
        ([*wait, "--total-timesteps", 4096], "with --total-timesteps 2048 --eval-every 204"),
        (steps, f"with --wait {tmp_path / 'over'}"),
        ([*wait, *steps, "--eval-episodes=3"], "with --eval-episodes 20"),
    ):
        with pytest.raises(ConfigError, match=f"^the study's trials ran {told}; name another --study$") as caught:
            call(tune.main, *flags, *more, "--trials", 3)
        assert caught.value.exit_code == 2
    assert len(trials(tmp_path)) == 2
    assert call(tune.main, *flags, *steps, "--trials", 1, "--study", "other").code == 0
    with pytest.raises(ConfigError, match=f"^the study's trials ran without --wait {tmp_path / 'over'}; name another"):
        call(tune.main, *flags, *steps, *wait, "--trials", 2, "--study", "other")


def test_flags_are_the_same_in_any_order_and_spelling() -> None:
    one = tune._by_flag(["--gamma", "1", "--hidden-sizes", "64", "64", "--norm-obs", "--gamma=0.9"])
    assert one == tune._by_flag(["--norm_obs", "--gamma", "0.9", "--hidden_sizes", "64", "64"])
    assert one != tune._by_flag(["--norm_obs", "--gamma", "0.9", "--hidden_sizes", "64"])


def test_without_optuna_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^fabricrl tune needs .* not installed: pip install .*\[tune\]'"):
        call(tune.main, "ppo")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_search_that_ends_early_tries_its_trial_again(
    flags: list[object], tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starter = tmp_path / "starter.py"
    starter.write_text(
        f"import pathlib\nfrom fabricrl import tune\nfrom fabricrl.utils.ending import run_script\n"
        f"tune.HEARTBEAT = 1\ntune.flags_of = lambda script: ['--wait', '--learning-rate', '--anneal-lr']\n"
        f"tune.algorithms = lambda: {{'stub': pathlib.Path({str(tmp_path / 'script.py')!r})}}\nrun_script(tune.main)\n"
    )
    wait = ["--wait", tmp_path / "over", "--trials", 2]
    with started(*PYTHON, starter, *flags, *wait) as running:
        wait_for(lambda: list(tmp_path.glob("logs/tune/*/*/*/waiting")), running)
        os.kill(running.process.pid, number)
        running.process.wait()
        assert running.process.returncode == code
    (tmp_path / "over").touch()
    monkeypatch.setattr(tune, "HEARTBEAT", 1)
    if number == signal.SIGKILL:
        import time

        time.sleep(5)  # as long as a trial may be silent
    assert call(tune.main, *flags, *wait).code == 0
    rows = trials(tmp_path)
    assert [row["state"] for row in rows] == ["fail", "complete", "complete"]
    assert rows[1]["learning-rate"] == rows[0]["learning-rate"]


def test_mistakes(flags: list[object], tmp_path: Path) -> None:
    for text in (
        "x = 3",
        "x = []",
        "x = { low = 2, high = 1 }",
        "x = { low = 0, high = 1, log = true }",
        "x = =",
        "x = [[1]]",
        "x = { low = 1, high = 2, log = true, step = 1 }",
        "x = { low = 1, high = 2, step = 0 }",
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match="space"):
            tune.read_space(tmp_path / "bad.toml")
    for more, message in (
        (["--learning-rate", "1"], "1e-06 to 0.1"),
        (["--trials", 0], "trials"),
        (["--trails", 3], r"^--trails is not an argument; did you mean --trials\?$"),
        (["--waid=3"], r"^--waid is not an argument; did you mean --wait\?$"),
        (["--total-timesteps", 1.5], "whole"),
        (["--total-timesteps", "inf"], "whole"),
        (["--eval-every", 0], "eval-every is 0"),
        (["--space", tmp_path / "nothing.toml"], "--space .* cannot be read: No such file"),
        (["--storage", "nonsense"], "--storage nonsense"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(tune.main, *flags, *more)
    (tmp_path / "space.toml").write_text("lerning-rate = [1]\n")
    with pytest.raises(ConfigError, match=r"^--lerning-rate is not an argument; did you mean --learning-rate\?$"):
        call(tune.main, *flags)
    with pytest.raises(ConfigError, match=r"^'stab' is not an algorithm; did you mean stub\?$"):
        call(tune.main, "stab")
    assert not list(tmp_path.glob("logs/tune/stub-CartPole-v1/trial_*"))
