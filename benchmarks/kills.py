"""Kills each rank of each twin with SIGKILL, at random moments and under three launchers; looks what is left.

    python benchmarks/kills.py                          → benchmarks/results/kills.csv and kills.md, hours
    python benchmarks/kills.py --quick --out look       one kill of each rank
    python benchmarks/kills.py --twins ppo --launchers torchrun --ranks 1 --kills 5

Every attempt goes on, by `--resume auto`, with the run of the one before. Once that has written a checkpoint of its
own, a moment of the next seconds is drawn at which one rank is killed. Then:

- all processes are to be gone within 30 seconds;
- the exit code is to be 7, or that of the launcher: 1 of torchrun, which has one of its own, and -9 where the rank that
  was killed is the one that started the others;
- whoever is left says why in one line that begins with `error:`, but where the launcher has ended it first;
- the newest checkpoint is to load, and the next attempt to go on from it; after the last one the coupled script does.

Exit code 1: something else has happened. A table that is there is added to, and `--fresh` starts over.
"""

import argparse
import csv
import importlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fabricrl.utils.checkpoint import load_checkpoint  # noqa: E402
from tests import process  # noqa: E402
from tests.process import PYTHON, Running, call, command, started, wait_for  # noqa: E402

ON_POLICY = "--num-steps 8 --num-minibatches 1 --update-epochs 1 --checkpoint-every 640"
OFF_POLICY = "--learning-starts 32 --buffer-size 48 --batch-size 8 --checkpoint-every 80"
TWINS = {  # and their flags, with which a checkpoint is written every 40 iterations
    "ppo": f"--env-id CartPole-v1 {ON_POLICY}",
    "ppo_recurrent": f"--env-id CartPole-v1 {ON_POLICY} --rnn-hidden-size 8",
    "sac": f"--env-id Pendulum-v1 {OFF_POLICY}",
    "droq": f"--env-id Pendulum-v1 {OFF_POLICY} --replay-ratio 2",
}
SHARED = "--num-envs 2 --hidden-sizes 16 --num-threads 1 --keep-checkpoints 3 --total-timesteps 1000000000"
LAUNCHERS = ("python", "torchrun", "lightning")
LIMIT = 30.0  # seconds until everything has to be gone
process.LIMIT = 600  # and until there is a checkpoint, beside other work
COLUMNS = ("twin", "launcher", "rank", "moment", "gone", "code", "lines", "told", "step", "resumed", "fault")


def line_of(twin: str, launcher: str, ranks: int, log_dir: Path) -> list[str]:
    """The command that starts or continues a run."""
    script = str(ROOT / f"fabricrl/algos/{twin}/{twin}_decoupled.py")
    flags = [*TWINS[twin].split(), *SHARED.split(), "--resume", "auto", "--log-dir", str(log_dir)]
    return {
        "python": [*PYTHON, script, "--devices", str(ranks), *flags],
        "torchrun": [command("torchrun"), "--standalone", "--nproc-per-node", str(ranks), script, *flags],
        "lightning": [
            *(command("lightning"), "run", "model", "--accelerator=cpu", "--strategy=ddp", f"--devices={ranks}"),
            *(script, *flags),
        ],
    }[launcher]


def newest(log_dir: Path) -> int:
    """The step of the newest checkpoint; -1 if there is none."""
    return max((int(path.stem[5:]) for path in log_dir.glob("*/*/*/checkpoints/step_*.ckpt")), default=-1)


def rank_pid(running: Running, rank: int, launcher: str) -> int:
    """The process of a rank: with Fabric's own launcher the first is the one that has started the others."""
    if launcher == "python" and rank == 0:
        return running.process.pid
    pids = [pid for pid, variables in running.processes().items() if variables.get("LOCAL_RANK") == str(rank)]
    assert len(pids) == 1, f"{len(pids)} processes of rank {rank}\n{running.report()}"
    return pids[0]


def expected_codes(launcher: str, rank: int) -> tuple[int, ...]:
    """Exit codes that are right: 7, or those of the launcher, which may itself be what was killed."""
    if launcher == "python":
        return (-signal.SIGKILL,) if rank == 0 else (7,)
    return (1,) if launcher == "torchrun" else (7, 128 + signal.SIGKILL)


def kill_once(twin: str, launcher: str, ranks: int, rank: int, log_dir: Path, moment: float) -> dict[str, Any]:
    """One attempt: its row of the table, without what only the next one can tell."""
    before = newest(log_dir)
    with started(*line_of(twin, launcher, ranks, log_dir)) as running:
        wait_for(lambda: newest(log_dir) > before, running)
        time.sleep(moment)
        os.kill(rank_pid(running, rank, launcher), signal.SIGKILL)
        killed = time.monotonic()
        while running.processes() and time.monotonic() - killed < 2 * LIMIT:
            time.sleep(0.05)
        gone, left = time.monotonic() - killed, len(running.processes())
        running.kill()
        running.out, running.err = running.process.communicate()
        code = running.process.returncode
    folder = next(log_dir.glob("*/*/*"))
    state, _ = load_checkpoint(folder)
    errors = [line for line in running.err.splitlines() if line.startswith("error:")]
    told = "; ".join(re.sub(r"\d{3,}|\S+:\S+", "…", line.rpartition("; ")[2]) for line in errors)
    since = re.search(r"; from step (\d+) of ", running.err)
    fault = f"{left} processes left" if left else "" if gone <= LIMIT else f"gone after {gone:.0f} s"
    if code not in expected_codes(launcher, rank):
        fault = fault or f"code {code}"
    if len(errors) > 1 or not (errors or launcher == "torchrun" or (launcher == "python" and rank == 0)):
        fault = fault or f"{len(errors)} lines"
    if before >= 0 and (since is None or int(since[1]) != before):
        fault = fault or f"has not gone on from step {before}"
    if fault:
        print(running.report(), file=sys.stderr, flush=True)
    row = {"twin": twin, "launcher": launcher, "rank": rank, "moment": f"{moment:.2f}", "gone": f"{gone:.2f}"}
    row |= {"code": code, "lines": len(errors), "told": told, "step": state["global_step"], "fault": fault}
    return row | {"resumed": int(before >= 0 and since is not None and int(since[1]) == before)}


def resumes(twin: str, log_dir: Path) -> str:
    """Says what keeps the coupled script from going on with the newest checkpoint; empty if nothing does."""
    state, path = load_checkpoint(next(log_dir.glob("*/*/*")))
    main = importlib.import_module(f"fabricrl.algos.{twin}.{twin}").main
    last = state["global_step"] + 64
    ended = call(main, "--resume", path, "--total-timesteps", last, "--log-dir", log_dir / "coupled")
    return "" if ended.code == 0 and int(ended.result["steps"]) > state["global_step"] else ended.err


def summary(rows: list[dict[str, str]]) -> list[str]:
    """A line for each twin, launcher and rank."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["twin"], row["launcher"], row["rank"]), []).append(row)
    lines = ["| twin | launcher | rank | kills | gone after, s, longest | exit code | lines | resumed | faults |"]
    lines += ["|-|-|-|-|-|-|-|-|-|"]
    for (twin, launcher, rank), group in groups.items():
        codes, told = (", ".join(sorted({str(row[name]) for row in group})) for name in ("code", "lines"))
        faults = "; ".join(sorted({row["fault"] for row in group} - {""})) or "none"
        resumed, longest = sum(int(row["resumed"]) for row in group), max(float(row["gone"]) for row in group)
        cells = f"{len(group)} | {longest:.1f} | {codes} | {told} | {resumed} | {faults}"
        lines.append(f"| {twin} | {launcher} | {rank} | {cells} |")
    return lines


def store(rows: list[dict[str, str]], out: Path) -> None:
    """Writes the table of all kills, and the one of their summary."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "kills.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    count = f"{len(rows)} kills; every one is in [kills.csv](kills.csv)."
    (out / "kills.md").write_text("\n".join(["# Killed ranks", "", count, "", *summary(rows), ""]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twins", nargs="+", choices=TWINS, default=list(TWINS))
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--devices", type=int, default=3, help="ranks, the first of which plays (default: 3)")
    parser.add_argument("--ranks", nargs="+", type=int, help="those to kill (default: each)")
    parser.add_argument("--kills", type=int, default=20, help="of each rank (default: 20)")
    parser.add_argument("--within", type=float, default=5.0, help="seconds in which the moment lies (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one kill of each rank, of two ranks")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="begin a new table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the tables")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no run behind
    if options.quick:
        options.devices, options.kills = 2, 1
    draw, rows = random.Random(options.seed), []
    if (options.out / "kills.csv").exists() and not options.fresh:
        with (options.out / "kills.csv").open() as file:
            rows = list(csv.DictReader(file))
    for twin in options.twins:
        for launcher in options.launchers:
            for rank in options.ranks or range(options.devices):
                with tempfile.TemporaryDirectory() as folder:
                    made = []
                    for _ in range(options.kills):
                        moment = draw.uniform(0, options.within)
                        made.append(kill_once(twin, launcher, options.devices, rank, Path(folder), moment))
                        print(made[-1], flush=True)
                    last = resumes(twin, Path(folder))
                    for row, following in itertools.pairwise(made):  # who goes on is the next one
                        row["resumed"] = following["resumed"]
                    made[-1]["resumed"] = int(not last)
                    made[-1]["fault"] = made[-1]["fault"] or last
                rows += [{name: str(row[name]) for name in COLUMNS} for row in made]
                store(rows, options.out)
    print("\n".join(summary(rows)))
    return int(any(row["fault"] or row["resumed"] != "1" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
