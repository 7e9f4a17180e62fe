"""Searches for an algorithm's arguments with Optuna: each trial is a run, judged by its evaluations.

python fabricrl/tune.py ppo --env-id CartPole-v1 --total-timesteps 60000 --trials 20 --jobs 2
python fabricrl/tune.py ppo --env-id my_envs:Reach-v0 --space space.toml --seeds 2 --storage sqlite:///tune.db

What is not listed below goes to the algorithm's script; a flag that is also in the space is where the search starts.
Run again, it continues; run on several machines with one storage, it shares the trials among them.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fabricrl.__main__ import algorithms
from fabricrl.algos.flags import flags_of
from fabricrl.utils.command import Parser, path_of
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import ConfigError, RunError, require, writing
from fabricrl.utils.extras import missing
from fabricrl.utils.logger import read_entries

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str
MEASURE = "eval/return_mean"
POLL = 0.5  # seconds between looks at a run's log
HEARTBEAT = 15  # seconds between signs of life of a trial; one without for four times as long is tried again


class TrialError(RunError):
    """A trial's run has ended with this exit code."""


def read_space(path: Path) -> dict[str, Any]:
    """Flag → choices, or a range `{low, high, log, step}`, of a TOML file.

    Raises:
        ConfigError: the file cannot be read, or holds anything else.
    """
    try:
        space = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--space {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for name, values in space.items():
        allowed = "a list of numbers, strings, true and false, or a range { low = 1e-5, high = 1e-2, log = true }"
        require(_is_range(values) or _is_choice(values), f"space: {name}", values, allowed)
    return {name.replace("_", "-"): values for name, values in space.items()}


def _is_range(values: Any) -> bool:
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        return False
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step", 1)
    numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in (low, high, step))
    if not numbers or not isinstance(log, bool) or not low <= high or step <= 0:
        return False
    return not log or (low > 0 and "step" not in values)


def _is_choice(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, Value) for value in values)


def suggest(trial: "optuna.Trial", space: Mapping[str, Any]) -> dict[str, Value]:
    """Flag → value, of this trial.

    Raises:
        ConfigError: earlier trials of the study chose an argument from another list, or in another way.
    """
    chosen: dict[str, Value] = {}
    for name, values in space.items():
        try:
            if isinstance(values, list):
                chosen[name] = cast(Value, trial.suggest_categorical(name, values))
            elif isinstance(values["low"], int) and isinstance(values["high"], int):
                chosen[name] = trial.suggest_int(name, **values)
            else:
                chosen[name] = trial.suggest_float(name, **values)
        except ValueError as error:
            told = f"{name}: the study's trials so far are of another space; name another --study"
            raise ConfigError(told) from error
    return chosen


def flags(chosen: Mapping[str, Value]) -> list[str]:
    """Arguments as a command line has them; of a switch, `--name` or `--no-name`."""
    words = []
    for name, value in chosen.items():
        switch = f"--{name}" if value else f"--no-{name}"
        words.append(switch if isinstance(value, bool) else f"--{name}={value}")
    return words


def split_start(words: Sequence[str], space: Mapping[str, Any]) -> tuple[list[str], dict[str, Value]]:
    """Parts flags that are in the space, where the search starts, from those that every trial gets.

    Raises:
        ConfigError: a flag of the space has no value, or one that its choices do not have.
    """
    rest: list[str] = []
    start: dict[str, Value] = {}
    remaining = iter(words)
    for word in remaining:
        name, equals, text = word.removeprefix("--").replace("_", "-").partition("=")
        switch = name.removeprefix("no-")
        if not word.startswith("--") or (name not in space and switch not in space):
            rest.append(word)
        elif isinstance(space.get(switch), list) and set(space[switch]) <= {True, False}:
            start[switch] = name == switch
        else:
            start[name] = _value(name, text if equals else next(remaining, ""), space[name])
    return rest, start


def _value(name: str, text: str, values: Any) -> Value:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(values, list):
        require(value in values, name, text, f"one of those that the space has: {', '.join(map(str, values))}")
        return values[values.index(value)]
    inside = isinstance(value, int | float) and values["low"] <= value <= values["high"]
    require(inside, name, text, f"in the range that the space has: {values['low']:g} to {values['high']:g}")
    return value


def evaluations(folder: Path) -> list[tuple[int, float]]:
    """Steps and mean returns of the evaluations that a run below this folder has logged by now."""
    entries = []
    for path in folder.rglob("metrics.csv"):
        rows, _ = read_entries(path)
        entries += [(int(row["step"]), float(row[MEASURE])) for row in rows if row.get(MEASURE)]
    return entries


class Search:
    """The trials of this process.

    Attributes:
        command: of a run, without what a trial adds.
        folder: of the runs, one folder per trial.
        exit_code: of the signal, or of the mistake in the command line, that ends the search; or 0.
        error: of the last run that failed.

    Args:
        seeds: of a trial, which run one after the other; its value is the mean of their last evaluations.
    """

    def __init__(self, command: Sequence[str], folder: Path, seeds: int, space: Mapping[str, Any]) -> None:
        self.command, self.folder = command, folder
        self._seeds, self._space = seeds, space
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.exit_code, self.error = 0, ""

    def __call__(self, trial: "optuna.Trial") -> float:
        """Runs a trial to its end, or until the pruner gives it up after its first seed's evaluations."""
        words = flags(suggest(trial, self._space))
        values = [self._run(trial, [*self.command, *words], seed) for seed in range(1, self._seeds + 1)]
        return sum(values) / len(values)

    def _run(self, trial: "optuna.Trial", command: Sequence[str], seed: int) -> float:
        import optuna

        folder = self.folder / f"trial_{trial.number}" / f"seed_{seed}"
        told, reported = folder / "stderr.txt", 0
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock, told.open("w") as errors:
            if self.exit_code:
                raise self._interrupted(trial)
            own = ["--seed", str(seed), "--log-dir", str(folder)]
            process = subprocess.Popen([*command, *own], stdout=subprocess.DEVNULL, stderr=errors)
            self._running.add(process)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if seed > 1:
                    continue
                for step, value in evaluations(folder):
                    if step > reported:  # a log that gets a column is written anew, and for a moment is short
                        trial.report(value, step)
                        reported = step
                if reported and trial.should_prune():
                    process.terminate()
                    raise optuna.TrialPruned
        finally:
            process.wait()
            self._running.discard(process)
        if self.exit_code:
            raise self._interrupted(trial)
        if process.returncode:
            raise self._failed(trial, process.returncode, told)
        return evaluations(folder)[-1][1]

    def _interrupted(self, trial: "optuna.Trial") -> TrialError:
        """The error of a trial that did not come to its end; it is tried again when the search goes on."""
        trial.study.enqueue_trial(trial.params)
        return TrialError("interrupted")

    def _failed(self, trial: "optuna.Trial", code: int, told: Path) -> TrialError:
        """The error of a trial whose run failed. An argument that no trial has chosen is wrong for all: the end."""
        lines = told.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        self.error = lines[-1].removeprefix("error: ")
        if code == ConfigError.exit_code and not names_any(self.error, self._space):
            with self._lock:  # no run starts meanwhile
                self._end(code)
            return self._interrupted(trial)
        trial.set_user_attr("error", self.error)
        return TrialError(self.error)

    def stop(self, number: int, frame: Any) -> None:
        """Handles a signal: the runs save and end, and so does the search."""
        self._end(128 + number)

    def _end(self, code: int) -> None:
        self.exit_code = self.exit_code or code
        for process in list(self._running):
            process.terminate()


def names_any(error: str, names: Iterable[str]) -> bool:
    """Tells if an error is about one of these arguments; a flag that it suggests does not count."""
    words = re.findall(r"[\w-]+", error.partition("did you mean")[0])
    return not {word.removeprefix("--").removeprefix("no-") for word in words}.isdisjoint(names)


def count_done(study: "optuna.Study") -> int:
    """Number of finished trials: complete, pruned, or failed with an error."""
    return len(_done(study))


def _done(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and _counts(trial)]


def _counts(trial: "optuna.trial.FrozenTrial") -> bool:
    from optuna.trial import TrialState

    return trial.state != TrialState.FAIL or "error" in trial.user_attrs


def is_hopeless(study: "optuna.Study", before: set[int]) -> bool:
    """True if three trials have failed, all with one error, and none has done better: a flag is wrong for them all.

    Trials that had ended `before` do not count: their command may not have had the flag.
    """
    errors = [trial.user_attrs.get("error") for trial in _done(study) if trial.number not in before]
    return len(errors) >= 3 and len(set(errors)) == 1 and errors[0] is not None


def open_study(name: str, storage: str, warmup: int, seed: int | None) -> "optuna.Study":
    """Opens a study, or makes it; trials whose process was killed are tried again.

    Raises:
        ConfigError: the storage cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # of trials that fail, `_search` tells in one line
    try:
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            database = optuna.storages.RDBStorage(
                storage, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )  # fmt: skip
        _change_in_turn(database)
        return optuna.create_study(
            study_name=name, storage=database, direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup),
        )  # fmt: skip
    except Exception as error:  # whatever SQLAlchemy or a database's driver raises
        raise ConfigError(f"--storage {storage} cannot be opened: {str(error).splitlines()[0]}") from error


def check_fixed(study: "optuna.Study", words: Sequence[str]) -> None:
    """Notes the flags that all trials of a study get: their values would not compare, and the best be a mixture.

    Raises:
        ConfigError: the trials that have run, or are running, got others. The order of flags does not matter.
    """
    from optuna.trial import TrialState

    ran = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
    now = _by_flag(words)
    before = study.user_attrs.get("fixed", now) if ran else now
    if before != now:
        others = [text for flag, text in before.items() if now.get(flag) != text]
        more = [text for flag, text in now.items() if flag not in before]
        told = [f"{word} {' '.join(texts)}" for word, texts in (("with", others), ("without", more)) if texts]
        raise ConfigError(f"the study's trials ran {' and '.join(told)}; name another --study")
    study.set_user_attr("fixed", now)


def _by_flag(words: Sequence[str]) -> dict[str, str]:
    """Flag → the flag with its values, as last given."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            values = found[flag] = [flag, value] if equals else [flag]
        else:
            values.append(word)
    return {flag: shlex.join(given) for flag, given in found.items()}


def _change_in_turn(database: "optuna.storages.RDBStorage") -> None:
    """Lets one thread at a time change a trial's state: SQLite locks no rows, and two would take one waiting trial."""
    lock, change = threading.Lock(), database.set_trial_state_values

    def in_turn(*args: Any, **kwargs: Any) -> bool:
        with lock:
            return change(*args, **kwargs)

    database.set_trial_state_values = in_turn  # type: ignore[method-assign]


def write_report(study: "optuna.Study", folder: Path) -> None:
    """Draws history and importance of the arguments, and writes a table of the trials."""
    import matplotlib
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trials = study.get_trials(states=(TrialState.COMPLETE,))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers, values = [trial.number for trial in trials], [trial.values[0] for trial in trials]
    axes.plot(numbers, values, "o", label="trials")
    axes.step(numbers, list(itertools.accumulate(values, max)), where="post", label="best so far")
    axes.set(title=study.study_name, xlabel="trial", ylabel="mean return of the last evaluation")
    axes.legend()
    figure.savefig(folder / "history.png", dpi=110)
    plt.close(figure)
    varied = {name for name in trials[0].params if len({str(trial.params.get(name)) for trial in trials}) > 1}
    if len(trials) > 1 and varied:
        importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=sorted(varied))
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.barh(list(importances)[::-1], list(importances.values())[::-1])
        axes.set(title=study.study_name, xlabel="importance (PED-ANOVA)")
        figure.savefig(folder / "importance.png", dpi=110)
        plt.close(figure)
    names = sorted({name for trial in study.get_trials() for name in trial.params})
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "value", *names])
        for trial in study.get_trials():
            row = [trial.number, trial.state.name.lower(), trial.value]
            writer.writerow([*row, *(trial.params.get(name) for name in names)])


def main() -> int:
    parser = Parser(__doc__)
    parser.add_algorithm(algorithms(), "the algorithm to tune")
    parser.add_argument("--env-id", default="CartPole-v1", help="Gymnasium id, or module:Id-v0 (default: CartPole-v1)")
    parser.add_argument("--total-timesteps", type=float, default=1e5, help="steps of each run (default: 100000)")
    space_file, log_dir = (partial(path_of, flag) for flag in ("--space", "--log-dir"))
    parser.add_argument("--space", type=space_file, help="TOML file of what to try (default: the algorithm's own)")
    parser.add_argument(
        "--trials", type=int, default=50, help="trials of the study, all workers together (default: 50)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of a trial, one after the other (default: 1)")
    parser.add_argument("--target", type=float, default=math.inf, help="stop once a trial's mean return reaches this")
    parser.add_argument("--storage", help="database URL (default: tune.db in the log folder, by SQLite)")
    parser.add_argument("--study", help="name in the storage (default: algorithm and environment)")
    parser.add_argument("--log-dir", type=log_dir, default="logs", help="the runs, pictures and table go below it")
    parser.add_argument("--eval-every", type=int, help="steps between evaluations (default: a tenth of the run)")
    parser.add_argument("--eval-episodes", type=int, default=20, help="episodes of each (default: 20)")
    parser.add_argument("--sampler-seed", type=int, help="seed of the search (default: another one each time)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of text")
    options, words = parser.parse_known_args()
    if importlib.util.find_spec("optuna") is None:
        raise missing("fabricrl tune", "tune")
    for name in ("trials", "jobs", "seeds", "eval_episodes", "eval_every"):
        given = getattr(options, name)
        require(given is None or given >= 1, name, given, "at least 1")
    steps = options.total_timesteps
    require(steps >= 1 and steps.is_integer(), "total_timesteps", steps, "a whole number of at least 1")

    script = algorithms()[options.algo]
    space = read_space(options.space or script.parent / "space.toml")
    parser.check_flags([*words, *(f"--{name}" for name in space)], flags_of(script))
    rest, start = split_start(words, space)
    every = options.eval_every or max(int(steps) // 10, 1)
    common = ["--env-id", options.env_id, "--total-timesteps", str(int(steps)), *rest]
    judged = ["--eval-every", str(every), "--eval-episodes", str(options.eval_episodes), "--logger", "csv"]
    name = options.study or f"{options.algo}-{options.env_id}".replace("/", "-").replace(":", "-")
    folder = options.log_dir / "tune" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {options.log_dir} cannot be written: {error.strerror}") from error
    study = open_study(
        name, options.storage or f"sqlite:///{folder / 'tune.db'}", int(steps) // 3, options.sampler_seed
    )
    check_fixed(study, [*common, *judged])
    if start and not study.get_trials(deepcopy=False):
        study.enqueue_trial(start)
    return _search(
        study, Search([sys.executable, str(script), *common, *judged], folder, options.seeds, space), options
    )


def _search(study: "optuna.Study", search: Search, options: argparse.Namespace) -> int:
    """Runs the trials that are missing, and prints the best as a command line. Returns the exit code."""
    from optuna.trial import TrialState

    def enough(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        reached = trial.value is not None and trial.state == TrialState.COMPLETE and trial.value >= options.target
        if trial.state == TrialState.COMPLETE:
            print(f"trial {trial.number}: {trial.value:.2f} (best {study.best_value:.2f})", file=sys.stderr, flush=True)
        elif "error" in trial.user_attrs:
            print(f"trial {trial.number}: {trial.user_attrs['error']}", file=sys.stderr, flush=True)
        if reached or search.exit_code or is_hopeless(study, before) or count_done(study) >= options.trials:
            study.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, search.stop)
    values = [trial.values[0] for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    before, left = {trial.number for trial in _done(study)}, options.trials - count_done(study)
    if left > 0 and max(values, default=-math.inf) < options.target:
        study.optimize(search, n_trials=left, n_jobs=options.jobs, callbacks=[enough], catch=(TrialError,))
    if search.exit_code == ConfigError.exit_code:
        raise ConfigError(search.error)
    if is_hopeless(study, before) or not study.get_trials(states=(TrialState.COMPLETE,)):
        if search.exit_code:
            return search.exit_code
        what = "no trial has come to its end" if not values else "no further trial has come to its end"
        raise ConfigError(f"{what}: {search.error or 'all were given up or failed'}")
    folder = search.folder
    command = shlex.join(["fabricrl", options.algo, *search.command[2:], *flags(study.best_params)])
    best = {"value": study.best_value, "trial": study.best_trial.number, "command": command, "folder": str(folder)}
    text = f"best: {study.best_value:.2f}, trial {study.best_trial.number}; pictures and table in {folder}\n{command}"
    print(json.dumps(best | {"params": study.best_params}) if options.json else text, flush=True)
    with writing(folder):
        write_report(study, folder)
    return search.exit_code


if __name__ == "__main__":
    run_script(main)
