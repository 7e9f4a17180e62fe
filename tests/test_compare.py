"""compare.py: statistics over seeds, and the logs of three projects."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fabricrl import compare
from fabricrl.algos.names import UNNAMED
from fabricrl.utils.errors import ConfigError, OutputError
from fabricrl.utils.logger import make_logger
from fabricrl.utils.statistics import interval, iqm, probability_of_improvement
from tests.process import call


def ours(folder: Path, curve: Sequence[tuple[int, float]], kind: str = "csv", **arguments: object) -> Path:
    """A run of ours with these returns, at 1 000 steps a second."""
    given = {"env_id": "Env-v0", "seed": 1, "exp_name": "", "log_dir": "logs"} | arguments
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(given))
    logger = make_logger(kind, folder, 0, given)
    for step, value in curve:
        logger.log_metrics({"charts/episodic_return": value, "charts/SPS": 1000.0}, step)
    logger.finalize("success")
    return folder


def foreign(folder: Path, tag: str, curve: Sequence[tuple[int, float]]) -> Path:
    """A run of another project, by the writer that CleanRL and Stable-Baselines3 use."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step, value in curve:
        writer.add_scalar(tag, value, step)
    writer.close()
    return folder


def compared(*arguments: object) -> list[dict]:
    done = call(compare.main, *arguments, "--json")
    assert done.code == 0, done
    return json.loads(done.out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


LINE = [(step, step / 10) for step in range(100, 1001, 100)]


# --- statistics


def test_iqm_leaves_out_the_lowest_and_the_highest_quarter() -> None:
    assert iqm(np.array([100.0, 3, 1, 2, 4, 5, 6, -50])) == (2 + 3 + 4 + 5) / 4
    assert iqm(np.array([1.0, 2, 6])) == 3  # a quarter of three is none


@pytest.mark.parametrize(("seeds", "least"), [(5, 0.9), (10, 0.92), (20, 0.92)])
def test_nineteen_of_twenty_intervals_cover_the_truth(seeds: int, least: float) -> None:
    """Of 1 000 experiments, at once: each is a column. Plain percentiles cover 0.86 with five seeds."""
    samples = np.random.default_rng(seeds).normal(3.0, 2.0, (seeds, 1000))
    low, high = interval(samples, resamples=500)
    assert least <= ((low <= 3) & (high >= 3)).mean() <= 0.98


def test_an_interval_needs_two_seeds_and_stays_inside_the_sample() -> None:
    assert np.isnan(interval(np.ones((1, 4)))).all()
    low, high = interval(np.array([1.0, 2, 4]))
    assert 1 <= low < high <= 4


def test_probability_of_improvement_counts_pairs() -> None:
    """Against all pairs counted one by one; ties are half a win."""
    ours_, theirs = np.array([1.0, 3, 5]), np.array([3.0, 4])
    pairs = [(x > y) + (x == y) / 2 for x in ours_ for y in theirs]
    assert probability_of_improvement(ours_, theirs) == np.mean(pairs) == (0.5 + 2) / 6
    assert probability_of_improvement(theirs, ours_) == pytest.approx(1 - np.mean(pairs))


# --- logs


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_runs_that_differ_in_their_seed_are_a_group(tmp_path: Path, kind: str) -> None:
    for seed, rate in ((1, 1e-3), (2, 1e-3), (3, 1e-4)):
        curve = [(step, value * (seed + 1)) for step, value in LINE]
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{seed}", curve, kind, seed=seed, learning_rate=rate)
    high, low = compared(tmp_path)
    assert (high["group"], high["seeds"], high["mean"], high["std"]) == ("ppo learning-rate=0.001", 2, 250, 50)
    assert (low["group"], low["seeds"], low["mean"]) == ("ppo learning-rate=0.0001", 1, 400)
    assert low["better"] is None  # one run, of which a pair tells nothing
    assert high["better"] is None
    if kind == "csv":
        assert high["seconds"] == 1


def test_a_group_is_named_after_what_differs_among_runs_of_its_script_and_environment(tmp_path: Path) -> None:
    for number, (algo, env_id, more) in enumerate(
        (
            ("ppo", "Env-v0", {"gamma": 0.99, "tau": 1}),
            ("ppo", "Env-v0", {"gamma": 0.9, "tau": 1}),
            ("ppo", "Env-v1", {"gamma": 0.5, "tau": 1}),
            ("sac", "Env-v0", {"gamma": 0.5, "tau": 2}),
            ("sac", "Env-v0", {"gamma": 0.5, "tau": 2, "exp_name": "mine"}),
            ("ppo", "Env-v0", {"gamma": 0.9, "tau": 1, "exp_name": "mine"}),
            ("sac", "Env-v1", {"gamma": 0.5, "tau": 2, "exp_name": "other"}),
        )
    ):
        ours(tmp_path / algo / env_id / f"run_{number}", LINE, env_id=env_id, **more)
    found = {(row["env"], row["group"]) for row in compared(tmp_path)}
    assert found == {
        ("Env-v0", "ppo gamma=0.99"), ("Env-v0", "ppo gamma=0.9"), ("Env-v1", "ppo"), ("Env-v0", "sac"),
        ("Env-v0", "sac mine"), ("Env-v0", "ppo mine gamma=0.9"), ("Env-v1", "other"),
    }  # fmt: skip


def test_groups_come_in_the_order_in_which_their_runs_began(tmp_path: Path) -> None:
    """As a grid was given; the first is what the others are held against."""
    for time, rate in ((9, 1e-2), (10, 1e-4), (11, 1e-3)):
        folder = tmp_path / f"ppo_learning-rate={rate}_1_20261126-1800{time:02}"
        ours(folder, LINE, learning_rate=rate)
    rates = [row["group"].partition("=")[2] for row in compared(tmp_path)]
    assert rates == ["0.01", "0.0001", "0.001"]


def test_runs_of_a_decoupled_twin_are_a_group_of_their_own(tmp_path: Path) -> None:
    for index, more in enumerate(({}, {}, {"max_lag": 1})):
        ours(tmp_path / "ppo" / "Env-v0" / f"run_{index}", LINE, seed=index, **more)
    assert [(row["group"], row["seeds"]) for row in compared(tmp_path)] == [("ppo", 2), ("ppo_decoupled", 1)]


def test_logs_of_other_projects_are_read(tmp_path: Path) -> None:
    ours(tmp_path / "logs" / "ppo" / "Env-v0" / "ppo_1", LINE)
    foreign(tmp_path / "cleanrl" / "Env-v0__ppo__1__1700000000", "charts/episodic_return", LINE)
    foreign(tmp_path / "cleanrl" / "Env-v0__ppo__2__1700000001", "charts/episodic_return", LINE)
    foreign(tmp_path / "sb3" / "PPO_1", "rollout/ep_rew_mean", LINE)
    foreign(tmp_path / "sb3" / "PPO_12", "rollout/ep_rew_mean", LINE)
    rows = compared(tmp_path / "logs", tmp_path / "cleanrl", tmp_path / "sb3")
    assert [(row["group"], row["seeds"], row["mean"]) for row in rows] == [
        ("ppo", 1, 100), ("Env-v0 ppo", 2, 100), ("PPO", 2, 100),
    ]  # fmt: skip


def test_a_name_on_the_command_line_makes_a_group(tmp_path: Path) -> None:
    for seed in (1, 2):
        foreign(tmp_path / f"run{seed}", "eval/mean_reward", LINE)
    (row,) = compared(f"sb3={tmp_path}/run*", "--metric", "eval/mean_reward")
    assert (row["group"], row["seeds"]) == ("sb3", 2)


def test_what_a_resumed_run_did_twice_counts_once(tmp_path: Path) -> None:
    folder = ours(tmp_path / "ppo" / "Env-v0" / "ppo_1", LINE, "tensorboard")
    again = make_logger("tensorboard", folder, 500, {})  # from a checkpoint at step 500
    for step, value in LINE[5:]:
        again.log_metrics({"charts/episodic_return": -value}, step)
    again.finalize("success")
    log = compare.read_log(folder)
    assert log.steps.tolist() == [step for step, _ in LINE]
    assert log.returns.tolist() == [value if step <= 500 else -value for step, value in LINE]


# --- curves


def test_a_curve_is_the_mean_of_each_stretch() -> None:
    edges = np.array([0.0, 10, 20, 30, 40, 50])
    curve = compare.resample(np.array([12, 18, 20, 45, 60]), np.array([1.0, 3, 5, 9, 1000]), edges)
    np.testing.assert_allclose(curve, [np.nan, 3, 5, 7, 9])  # between 20 and 40 lies a line


def test_the_final_return_is_that_of_the_last_tenth_up_to_where_the_shortest_run_ends(tmp_path: Path) -> None:
    longer = [*LINE, (1100, 5000.0)]
    for seed, curve in ((1, LINE), (2, longer)):
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{seed}", curve, seed=seed)
    (row,) = compared(tmp_path, "--final", "0.2")
    assert (row["steps"], row["mean"], row["std"]) == (1000, 95, 0)  # (90 + 100) / 2


def test_several_runs_of_a_seed_are_told_of(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{name}", LINE, seed=seed)
    done = call(compare.main, tmp_path)
    (told,) = [line for line in done.err.splitlines() if "seed 1" in line]
    assert told.startswith("note: ppo has 2 runs of seed 1, and each counts")
    assert "seed 2" not in done.err


@pytest.mark.parametrize("step", [50, 1050], ids=["interrupted", "began late"])
def test_a_run_that_shares_no_steps_with_others_is_left_out_with_a_note(tmp_path: Path, step: int) -> None:
    for seed, curve in ((1, [(step, 7.0)]), (2, LINE), (3, LINE)):
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{seed}", curve, seed=seed)
    done = call(compare.main, tmp_path, "--json")
    (row,) = json.loads(done.out)
    assert (row["seeds"], row["steps"], row["mean"]) == (2, 1000, 100)
    assert (
        f"ppo_1 is left out: its entries are of steps {step} to {step}, which others of its group do not share"
        in done.err
    )


def test_a_run_whose_log_does_not_tell_is_left_out_with_a_note(tmp_path: Path) -> None:
    ours(tmp_path / "ppo" / "Env-v0" / "ppo_1", LINE)
    ours(tmp_path / "ppo" / "Env-v0" / "ppo_2", [(100, float("nan"))], seed=2)  # no episode has ended
    (ours(tmp_path / "ppo" / "Env-v0" / "ppo_3", LINE, seed=3) / "args.json").write_text("{")
    done = call(compare.main, tmp_path, "--json")
    (row,) = json.loads(done.out)
    assert row["seeds"] == 1
    silent, broken, *_ = done.err.splitlines()
    assert silent.startswith("note: left out: ")
    assert "ppo_2 has no entries of charts/episodic_return" in silent
    assert broken.startswith("note: left out: ")
    assert "ppo_3: its log cannot be read" in broken


def test_steps_to_a_threshold(tmp_path: Path) -> None:
    for seed, times in ((1, 1.0), (2, 2.0), (3, 0.1)):
        curve = [(step, times * value) for step, value in LINE]
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{seed}", curve, seed=seed)
    (row,) = compared(tmp_path, "--threshold", 60)
    assert row["steps_to_threshold"] == 600  # the median of 300, 600 and never
    (row,) = compared(tmp_path, "--threshold", 150)
    assert row["steps_to_threshold"] is None


def test_picture_and_tables_are_written_beside_each_other(tmp_path: Path) -> None:
    for seed in (1, 2):
        ours(tmp_path / "ppo" / "Env-v0" / f"ppo_{seed}", [(step, value + seed) for step, value in LINE], seed=seed)
    done = call(compare.main, tmp_path, "--out", tmp_path / "curves.png")
    assert done.code == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.md").read_text().strip() == done.out.strip()
    (row,) = csv.DictReader((tmp_path / "curves.csv").open())
    assert row["seeds"] == "2"
    assert "fewer than five seeds" in done.err


# --- mistakes


def test_mistakes_are_told(tmp_path: Path) -> None:
    good = ours(tmp_path / "good", LINE)
    for name, arguments in (("broken", "{"), ("listed", "[1]"), ("deep", "[" * 100_000)):
        (ours(tmp_path / name, LINE) / "args.json").write_text(arguments)
    (tmp_path / "empty").mkdir()
    mistakes: dict[str, list[object]] = {
        "there is no such file or folder": [tmp_path / "nothing*"],
        "no run there": [tmp_path / "empty"],
        "--metrics is not an argument; did you mean --metric?": [good, "--metrics"],
        "has no entries of loss; it has charts/SPS, charts/episodic_return": [good, "--metric", "loss"],
        "broken: its log cannot be read": [tmp_path / "broken"],
        "listed: its log cannot be read": [tmp_path / "listed"],
        "deep: its log cannot be read": [tmp_path / "deep"],
        "final is 0.0": [good, "--final", 0],
        "ends in one of .png, .svg, .pdf": [good, "--out", tmp_path / "good" / "x.nothing"],
        "threshold is nan": [good, "--threshold", "nan"],
        "in a folder that exists": [good, "--out", tmp_path / "nothing" / "x.png"],
    }
    for message, arguments in mistakes.items():
        with pytest.raises(ConfigError, match=message) as error:
            call(compare.main, *arguments)
        assert "\n" not in str(error.value)


def test_a_table_that_cannot_be_written_is_told_of_behind_the_comparison(tmp_path: Path) -> None:
    good = ours(tmp_path / "good", LINE)
    (tmp_path / "taken.md").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*taken\.md: Is a directory"):
        call(compare.main, good, "--out", tmp_path / "taken.png")


@pytest.mark.parametrize("torn", [b"1100,9", b"hello\n", b"1100,1,2,3,4,5\n", b"\x00\xff\n", b"1100,a lot,9\n"])
def test_lines_of_a_log_that_are_no_entries_are_left_out(torn: bytes, tmp_path: Path) -> None:
    """As of a run that is still writing one, or that was killed as it did."""
    log = ours(tmp_path / "run", LINE) / "metrics.csv"
    before = compared(tmp_path)
    log.write_bytes(log.read_bytes() + torn)
    assert compared(tmp_path) == before
    log.write_bytes(torn)
    with pytest.raises(ConfigError, match="it has nothing"):
        call(compare.main, tmp_path)


def test_arguments_that_name_no_run_make_no_group_either() -> None:
    assert UNNAMED - {"env_id"} <= compare.INCIDENTAL
