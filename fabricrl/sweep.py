"""Trains over several seeds, and every combination of a grid of arguments, side by side; then compares the runs.

python fabricrl/sweep.py ppo --env-id CartPole-v1 --grid learning-rate=1e-4,1e-3 num-envs=1,4 --seeds 3 --jobs 2
python fabricrl/sweep.py sac --env-id Pendulum-v1 --seeds 5 --jobs 2 --out logs/pendulum.png

What is not listed below goes to the algorithm's script.
"""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fabricrl.__main__ import algorithms
from fabricrl.algos.flags import flags_of
from fabricrl.compare import (
    as_json,
    check_picture,
    first_groups,
    group_logs,
    markdown,
    plot,
    read_logs,
    summarise,
    warn_of_few_seeds,
)
from fabricrl.utils.command import Parser, path_of
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import ConfigError, RunError, require

FOLDER = re.compile(r"; writing to (.*?)(?:; from step \d+ of .*)?$", re.MULTILINE)  # a run says so as it starts
GRACE = 30.0  # seconds for a run to save when the sweep is interrupted


@dataclass(frozen=True)
class Outcome:
    """End of a run.

    Attributes:
        folder: the run's folder; None if it did not come so far.
        error: the last line of its standard error, if the code is not 0.
    """

    command: Sequence[str]
    code: int
    folder: Path | None
    error: str


class Pool:
    """Runs commands side by side, `jobs` at a time, and ends those that run when it is left early."""

    def __init__(self, jobs: int) -> None:
        self._threads = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self, base: Sequence[str], ends: Sequence[Sequence[str]]) -> list[Outcome]:
        """Runs a command with each of these ends. One that exits with code 2 has arguments that do not fit, and ends
        the rest.

        Interrupted, it asks those that run to stop, and waits until they have saved.

        Raises:
            ConfigError: a command has ended in code 2.
        """
        jobs = [self._threads.submit(self._run, [*base, *end]) for end in ends]
        bar = tqdm(total=len(jobs), desc="runs", disable=None)  # none without a terminal
        try:
            for count, job in enumerate(as_completed(jobs), 1):
                if job.result().code == ConfigError.exit_code:
                    raise ConfigError(job.result().error)
                bar.update()
                if bar.disable:
                    end = shlex.join(job.result().command[len(base) :])
                    print(f"{count} of {len(jobs)} runs ended: {end}", file=sys.stderr, flush=True)
        except BaseException:
            self._stop()
            raise
        finally:
            bar.close()
            self._threads.shutdown(cancel_futures=True)
        return [job.result() for job in jobs]

    def _run(self, command: Sequence[str]) -> Outcome:
        if self._stopping:
            return Outcome(command, 128 + signal.SIGTERM, None, "")
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")
        self._running.add(process)
        _, err = process.communicate()
        self._running.discard(process)
        found, lines = FOLDER.search(err), err.strip().splitlines()
        folder = Path(found[1]) if found else None
        error = lines[-1].removeprefix("error: ") if lines and process.returncode else ""
        return Outcome(command, process.returncode, folder, error)

    def _stop(self) -> None:
        self._stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)
        for process in list(self._running):
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def grid(texts: Sequence[str]) -> list[list[str]]:
    """Flags of every combination of `name=value,value,…`.

    Raises:
        ConfigError: a text has no values, or names an argument twice.
    """
    axes: dict[str, list[list[str]]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        flag = "--" + name.removeprefix("--").replace("_", "-")
        whole = bool(equals and name and all(values.split(",")))
        require(whole, "grid", repr(text), "name=value,value,... without spaces")
        require(flag not in axes, "grid", repr(text), "given once for each argument")
        axes[flag] = [_flags(flag, value) for value in values.split(",")]
    return [list(itertools.chain(*flags)) for flags in itertools.product(*axes.values())]


def _flags(flag: str, value: str) -> list[str]:
    """A flag with its value; of switches `--compile` and `--no-compile`."""
    if value.lower() in ("true", "false"):
        return [flag if value.lower() == "true" else flag.replace("--", "--no-", 1)]
    return [f"{flag}={value}"]


def train(base: Sequence[str], combinations: Sequence[Sequence[str]], seeds: Sequence[int], jobs: int) -> list[Outcome]:
    """Runs a command once for each combination of flags and each seed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # after the runs have been stopped
    return Pool(jobs).run(base, [[*flags, "--seed", str(seed)] for flags in combinations for seed in seeds])


def run_seeds(seed: int, seeds: int, jobs: int, log_dir: str) -> int:
    """Runs the command of this process once per seed, without `--seeds`, and compares the runs. Returns the exit code.

    Raises:
        ConfigError: a launcher has started this process, or it resumes a run, which has one seed.
    """
    launched = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    require(not launched, "seeds", seeds, "1 under a launcher: use --devices, or start a command a seed")
    words = _without(sys.orig_argv[1:], "seeds", "jobs", "seed", "log-dir")
    require(not any(re.match("--resume(=|$)", word) for word in words), "seeds", seeds, "1 beside --resume")
    return report(
        train([sys.executable, *words, *_folder(log_dir)], [[]], range(seed, seed + seeds), jobs), None, False
    )


def _without(words: Sequence[str], *names: str) -> list[str]:
    """A command line without some flags and their values."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.removeprefix("--").replace("_", "-").partition("=")
        if skip:
            skip = False
        elif word.startswith("--") and name in names:
            skip = not equals
        else:
            kept.append(word)
    return kept


def _folder(log_dir: str | Path) -> list[str]:
    """The flag that gives a sweep's runs a folder of their own."""
    return ["--log-dir", str(Path(log_dir) / f"sweep_{datetime.now():%Y%m%d-%H%M%S}")]


def report(outcomes: Sequence[Outcome], out: Path | None, in_json: bool) -> int:
    """Prints the comparison of the runs that came to their end, and what became of the others: the exit code."""
    for outcome in outcomes:
        if outcome.code or outcome.folder is None:
            error = outcome.error or f"ended with exit code {outcome.code}, and named no folder"
            print(f"failed: {shlex.join(outcome.command[1:])}: {error}", file=sys.stderr)
    folders = [outcome.folder for outcome in outcomes if outcome.folder is not None and not outcome.code]
    codes = [outcome.code or RunError.exit_code for outcome in outcomes if outcome.code or outcome.folder is None]
    code = codes[0] if codes else 0
    if not folders:
        return code
    groups = group_logs(read_logs([("", folder) for folder in folders]))
    rows = summarise(groups)
    rows.sort(key=lambda row: -row["iqm"])
    print(as_json(rows) if in_json else markdown(rows, first_groups(groups)), flush=True)
    warn_of_few_seeds(rows)
    print(f"runs in {folders[0].parents[2]}", file=sys.stderr)
    if out is not None:
        plot(groups, out, "")
    return code


def main() -> int:
    parser = Parser(__doc__)
    parser.add_algorithm(algorithms(), "the algorithm to train with")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=V,V", help="an argument, and values to try")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each combination (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed, S (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    folder, picture = partial(path_of, "--log-dir"), partial(path_of, "--out")
    parser.add_argument("--log-dir", type=folder, default="logs", help="a folder for this sweep's runs is made in it")
    parser.add_argument("--out", type=picture, help="picture of the learning curves: png, svg or pdf")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options, rest = parser.parse_known_args()
    require(options.seeds >= 1, "seeds", options.seeds, "at least 1")
    require(options.jobs >= 1, "jobs", options.jobs, "at least 1")
    check_picture(options.out)
    script, combinations = algorithms()[options.algo], grid(options.grid)
    parser.check_flags([*rest, *itertools.chain(*combinations)], flags_of(script))
    base = [sys.executable, str(script), *rest, *_folder(options.log_dir)]
    seeds = range(options.seed, options.seed + options.seeds)
    return report(train(base, combinations, seeds, options.jobs), options.out, options.json)


if __name__ == "__main__":
    run_script(main)
