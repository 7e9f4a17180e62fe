"""sweep.py: grids and seeds side by side; a small script stands for the algorithm where training is not the point."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from fabricrl import sweep
from fabricrl.algos.flags import flags_of
from fabricrl.utils.errors import ConfigError
from tests.process import PPO, PYTHON, call, run, started, wait_for

# Writes a run whose return is 100 · learning rate + seed; fails as it is told
SCRIPT = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--learning-rate", type=float, default=1.0)
parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
parser.add_argument("--env-id", default="Env-v0")
parser.add_argument("--code", type=int, default=0)
parser.add_argument("--wait", action="store_true")
parser.add_argument("--seed", type=int)
parser.add_argument("--log-dir", type=pathlib.Path)
a = parser.parse_args()
if a.code:
    print("error: told to fail", file=sys.stderr)
    sys.exit(a.code)
folder = a.log_dir / "algo" / a.env_id / f"run_{a.learning_rate}_{a.compile}_{a.seed}"
(folder / "checkpoints").mkdir(parents=True)
if a.wait:
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(143)))
    (folder / "waiting").touch()
    time.sleep(600)
arguments = {"env_id": a.env_id, "learning_rate": a.learning_rate, "compile": a.compile, "seed": a.seed}
(folder / "args.json").write_text(json.dumps(arguments))
(folder / "metrics.csv").write_text(f"step,charts/episodic_return\\n100,{100 * a.learning_rate + a.seed}\\n")
sys.stderr.buffer.write(b"\\xff..")  # what an environment prints
print(f"algo {a.env_id}: 1 rank; writing to {folder}; from step 8 of logs/x.ckpt", file=sys.stderr)
print(f"result steps=100 checkpoint=None")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(sweep, "flags_of", lambda script: [*re.findall("--[a-z-]+", SCRIPT), "--no-compile"])
    monkeypatch.setattr(sweep, "algorithms", lambda: {"stub": path})
    return path


def test_scripts_are_found_by_their_folders() -> None:
    found = sweep.algorithms()
    assert {"ppo", "ppo-recurrent", "ppo-decoupled", "sac", "sac-decoupled", "droq"} <= found.keys()
    assert all(path.read_text().count("run_script(main)") == 1 for path in found.values())


def test_a_grid_is_every_combination() -> None:
    assert sweep.grid([]) == [[]]
    assert sweep.grid(["learning_rate=1,2", "--compile=true,false"]) == [
        ["--learning-rate=1", "--compile"], ["--learning-rate=1", "--no-compile"],
        ["--learning-rate=2", "--compile"], ["--learning-rate=2", "--no-compile"],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "x", "=1", "x=", "x=1,,2"])
def test_a_grid_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="name=value,value"):
        sweep.grid([text])
    with pytest.raises(ConfigError, match="once"):
        sweep.grid(["x_y=1", "x-y=2"])


def test_every_combination_is_run_with_every_seed(script: Path, tmp_path: Path) -> None:
    flags = ["--grid", "learning-rate=1,2", "compile=true,false", "--seeds", 3, "--seed", 5, "--jobs", 2]
    done = call(sweep.main, "stub", *flags, "--log-dir", tmp_path / "logs", "--json", "--out", tmp_path / "x.png")
    assert done.code == 0, done
    rows = json.loads(done.out)
    assert [(row["seeds"], row["mean"]) for row in rows] == [(3, 206), (3, 206), (3, 106), (3, 106)]
    assert all("learning-rate=" in row["group"] and "compile=" in row["group"] for row in rows)
    assert (tmp_path / "x.png").exists()
    assert len(list((tmp_path / "logs").glob("sweep_*/algo/Env-v0/run_*"))) == 12
    (sweep_folder,) = (tmp_path / "logs").iterdir()
    assert f"runs in {sweep_folder}" in done.err
    assert "fewer than five seeds" in done.err
    told = [line for line in done.err.splitlines() if "runs ended" in line]
    assert [line.split()[0] for line in told] == [str(count) for count in range(1, 13)]
    assert sum("of 12 runs ended: --learning-rate=2 --no-compile --seed 7" in line for line in told) == 1


def test_environments_are_a_table_with_a_first_group_each(script: Path, tmp_path: Path) -> None:
    flags = ["--grid", "env-id=One-v0,Two-v0", "learning-rate=1,2", "--seeds", 2, "--log-dir", tmp_path / "logs"]
    done = call(sweep.main, "stub", *flags)
    assert done.code == 0, done
    better = {tuple(row.split(" | ")[:2]): row.split(" | ")[-1].strip(" |") for row in done.out.splitlines()[2:]}
    assert better == {
        (f"| {env}", f"algo learning-rate={rate}"): "" if rate == "1.0" else "1.00 [1.00, 1.00]"
        for env in ("One-v0", "Two-v0")
        for rate in ("1.0", "2.0")
    }


def test_the_first_group_is_the_first_of_the_grid(script: Path, tmp_path: Path) -> None:
    flags = ["--grid", "learning-rate=10,2,1", "--seeds", 2, "--log-dir", tmp_path / "logs"]
    done = call(sweep.main, "stub", *flags, "--json")
    found = {row["group"]: row["better"] for row in json.loads(done.out)}
    assert found == {"algo learning-rate=10.0": None, "algo learning-rate=2.0": 0, "algo learning-rate=1.0": 0}


def test_mistakes_are_told_before_the_first_run(script: Path, tmp_path: Path) -> None:
    for flags, message in (
        (["--out", tmp_path / "x.jpeg"], "out is .*ends in one of .png, .svg, .pdf"),
        (["--out", tmp_path / "nothing" / "x.png"], "in a folder that exists"),
        (["--seeds", 0], "seeds is 0"),
        (["--seeds", "two"], "invalid int value: 'two'; see --help"),
        (["--seds", 3], r"^--seds is not an argument; did you mean --seeds\?$"),
        (["--gird", "code=1,2"], r"^--gird is not an argument; did you mean --grid\?$"),
        (["--lr", 1], r"^--lr is not an argument; did you mean --learning-rate\?$"),
        (["--grid", "lerning-rate=1,2"], r"^--lerning-rate is not an argument; did you mean --learning-rate\?$"),
        (["--grid", "code=1,", "2"], "name=value,value,... without spaces$"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(sweep.main, "stub", *flags, "--log-dir", tmp_path / "logs")
    for algo, hint in (("stab", r"did you mean stub\?"), ("xyz", "there are stub")):
        with pytest.raises(ConfigError, match=f"^'{algo}' is not an algorithm; {hint}$"):
            call(sweep.main, algo)
    assert not (tmp_path / "logs").exists()


def test_a_run_that_fails_leaves_the_others_to_be_compared(script: Path, tmp_path: Path) -> None:
    done = call(sweep.main, "stub", "--grid", "code=0,4", "--log-dir", tmp_path / "logs", "--json")
    assert done.code == 4
    assert len(json.loads(done.out)) == 1
    assert "told to fail" in done.err


def test_a_run_that_cannot_be_found_is_told_of_also_beside_others(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lost = sweep.Outcome(["python", "ppo.py"], 0, None, "")
    train = sweep.train
    monkeypatch.setattr(sweep, "train", lambda *given: [lost, *train(*given)])
    done = call(sweep.main, "stub", "--seeds", 2, "--log-dir", tmp_path / "logs", "--json")
    assert done.code == 1
    assert json.loads(done.out)[0]["seeds"] == 2
    assert sweep.report([lost], None, False) == 1
    assert capsys.readouterr().err == "failed: ppo.py: ended with exit code 0, and named no folder\n"


def test_arguments_that_do_not_fit_end_the_sweep(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match="told to fail"):
        sweep.train([*PYTHON, str(script), "--code", "2"], [[]], range(3), 1)
    assert capsys.readouterr().err == ""  # no run is told to have ended


def test_the_flags_of_a_script_are_those_that_it_parses() -> None:
    scripts = sweep.algorithms()
    ppo, twin = flags_of(scripts["ppo"]), flags_of(scripts["ppo-decoupled"])
    assert {"--num-steps", "--norm-obs", "--no-norm-obs", "--seed"} <= set(ppo)
    assert set(twin) - set(ppo) >= {"--max-lag"}
    assert "--replay-ratio" not in ppo
    assert all("--env-id" in flags_of(script) for script in scripts.values())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_stopped_lets_its_runs_save(script: Path, tmp_path: Path, number: int, code: int) -> None:
    starter = tmp_path / "starter.py"
    starter.write_text(
        f"import pathlib\nfrom fabricrl import sweep\nfrom fabricrl.utils.ending import run_script\n"
        f"sweep.algorithms = lambda: {{'stub': pathlib.Path({str(script)!r})}}\n"
        "sweep.flags_of = lambda script: ['--wait']\nrun_script(sweep.main)\n"
    )
    flags = ["--wait", "--seeds", 4, "--jobs", 2, "--log-dir", tmp_path / "logs"]
    with started(*PYTHON, starter, "stub", *flags) as running:
        wait_for(lambda: len(list(tmp_path.glob("logs/*/algo/Env-v0/*/waiting"))) == 2, running)
        os.kill(running.process.pid, number)
        running.finish()
    assert running.code == code, running.report()
    assert len(list(tmp_path.glob("logs/*/algo/Env-v0/*/saved"))) == 2
    assert len(list(tmp_path.glob("logs/*/algo/Env-v0/*"))) == 2  # no other was started


def test_a_script_runs_itself_once_a_seed(tmp_path: Path) -> None:
    flags = ["--num-envs", 2, "--num-steps", 32, "--num-minibatches", 1, "--update-epochs", 1]
    flags += ["--total-timesteps", 640, "--vectorization", "sync", "--log-every", 64, "--log-dir", tmp_path]
    done = run(*PYTHON, PPO, *flags, "--seeds=2", "--jobs", 2, "--seed", 7)
    assert done.code == 0, done.report()
    assert "| CartPole-v1 | ppo | 2 |" in done.out
    runs = sorted(json.loads(path.read_text())["seed"] for path in tmp_path.glob("sweep_*/ppo/*/*/args.json"))
    assert runs == [7, 8]


@pytest.mark.parametrize(("more", "variables"), [(["--resume", "x"], {}), ([], {"LOCAL_RANK": "0"})])
def test_seeds_are_for_new_runs_without_a_launcher(
    more: list[str], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "script.py", *more, "--seeds", "2"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="seeds is 2"):
        sweep.run_seeds(1, 2, 1, "logs")
