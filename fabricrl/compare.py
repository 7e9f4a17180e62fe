"""Compares runs: learning curves, final returns, sample efficiency and time, with intervals over seeds.

python fabricrl/compare.py logs/ppo/CartPole-v1 --out compare.png
python fabricrl/compare.py ours='logs/ppo/CartPole-v1/*' sb3='runs/PPO_*' --metric eval/return_mean
python fabricrl/compare.py logs/sac --threshold -200 --json

Runs that differ in nothing but their seed form a group. Logs may be ours (TensorBoard or CSV), CleanRL's or
Stable-Baselines3's.
"""

import csv
import glob
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fabricrl.utils.command import Parser, path_of
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import ConfigError, require, writing
from fabricrl.utils.logger import read_entries
from fabricrl.utils.run import began
from fabricrl.utils.statistics import interval, iqm, probability_of_improvement

TAGS = ("charts/episodic_return", "rollout/ep_rew_mean")  # ours and CleanRL's; Stable-Baselines3's
POINTS = 100  # of a curve
PICTURES = (".png", ".svg", ".pdf")
# Arguments that do not make a run a different experiment
INCIDENTAL = {
    "seed", "seeds", "jobs", "log_dir", "logger", "log_every", "track", "wandb_project_name", "wandb_entity",
    "save_model", "checkpoint_every", "keep_checkpoints", "checkpoint_buffer", "upload_model", "hf_entity", "resume",
    "capture_video", "video_every", "eval_every", "eval_episodes", "stop_at_return", "vectorization", "check_spaces",
    "node_rank", "main_address", "main_port", "timeout",
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """A run's log.

    Attributes:
        name: how the run is called where its arguments are not known.
        arguments: what args.json holds; of other projects' runs nothing.
        steps, returns: [K] each, the entries of the metric.
        seconds: from the first entry to the last; NaN if the log does not tell.
    """

    folder: Path
    name: str
    arguments: dict[str, Any]
    steps: np.ndarray
    returns: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Group:
    """Runs of one experiment.

    Attributes:
        grid: environment steps [G] at which the curves are compared, up to where the shortest run ends.
        curves: returns [S, G] of each seed there; NaN before its first episode has ended.
        finals: mean return [S] over the last part of each run.
        seconds: [S], of each run.
    """

    env_id: str
    name: str
    grid: np.ndarray
    curves: np.ndarray
    finals: np.ndarray
    seconds: np.ndarray


def find_logs(where: str) -> list[Path]:
    """Folders of runs that a path or a pattern names, or that lie below it; those of one folder as they began.

    Raises:
        ConfigError: there is none, or no such path can be.
    """
    places = sorted(map(Path, glob.glob(str(path_of("a run", where)))))
    kinds = "metrics.csv", "events.out.tfevents.*"
    found = {file.parent for place in places for kind in kinds for file in place.rglob(kind)}
    folders = sorted(found, key=lambda folder: (folder.parent, began(folder), folder))
    if not folders:
        fault = "no run there" if places else "there is no such file or folder"
        raise ConfigError(f"{where}: {fault}; a run is a folder with TensorBoard events or metrics.csv")
    return folders


def read_log(folder: Path, metric: str = "") -> Log:
    """Reads one metric of a run; without a name, that of the training episodes' returns.

    Raises:
        ConfigError: the log cannot be read, or does not have the metric.
    """
    tags = (metric,) if metric else TAGS
    read = _read_csv if (folder / "metrics.csv").exists() else _read_events
    try:
        columns, seconds = read(folder)
        arguments = json.loads(path.read_text()) if (path := folder / "args.json").exists() else {}
        if not isinstance(arguments, dict):
            raise ValueError("args.json is no JSON object")
        arguments |= arguments.pop("asked", {})  # before another number of ranks took their shares
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ConfigError(f"{folder}: its log cannot be read: {error}") from error
    for tag in tags:
        steps, returns = columns.get(tag, (np.array([]), np.array([])))
        if len(steps):
            return Log(folder, _name_of(folder), arguments, steps, returns, seconds)
    known = ", ".join(sorted(tag for tag, (steps, _) in columns.items() if len(steps))) or "nothing"
    raise ConfigError(f"{folder} has no entries of {' or '.join(tags)}; it has {known}")


def read_logs(named: Iterable[tuple[str, Path]], metric: str = "") -> list[tuple[str, Log]]:
    """Reads the logs of runs, each with the name that the command line gives. One that cannot be read is left out.

    A note tells which and why: among many runs some were interrupted before an episode had ended.

    Raises:
        ConfigError: none is left.
    """
    logs, faults = [], []
    for name, folder in named:
        try:
            logs.append((name, read_log(folder, metric)))
        except ConfigError as error:
            faults.append(error)
    if not logs:
        raise faults[0]
    for fault in faults:
        print(f"note: left out: {str(fault).partition('; it has ')[0]}", file=sys.stderr)
    return logs


def _read_csv(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Tag → steps and values, and the seconds, which follow from the last speed."""
    entries: dict[str, list[tuple[int, float]]] = {}
    rows, _ = read_entries(folder / "metrics.csv")
    for row in rows:
        for tag, value in row.items():
            if value and tag != "step":
                entries.setdefault(tag, []).append((int(row["step"]), float(value)))
    columns = {tag: _columns(pairs) for tag, pairs in entries.items()}
    steps, speeds = columns.get("charts/SPS", (np.array([np.nan]), np.array([1.0])))
    return columns, float(steps[-1] / max(speeds[-1], 1e-9))


def _read_events(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Tag → steps and values, and the seconds between first and last entry. What a resumed run redid counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    times, columns = [], {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        times += [scalars[0].wall_time, scalars[-1].wall_time]
        columns[tag] = _columns([(scalar.step, scalar.value) for scalar in scalars])
    return columns, max(times) - min(times) if times else float("nan")


def _columns(pairs: Iterable[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values [K] each, in order of the steps, without those that are not finite."""
    finite = sorted((step, value) for step, value in pairs if np.isfinite(value))
    steps, values = zip(*finite, strict=True) if finite else ((), ())
    return np.array(steps), np.array(values)


def _name_of(folder: Path) -> str:
    """A run's name without seed and time: `PPO` of `PPO_3`, `Ant-v4 ppo` of `Ant-v4__ppo__1__1700000000`."""
    parts = folder.name.split("__")
    return " ".join(parts[:2]) if len(parts) == 4 else re.sub(r"(_\d[\d-]*)+$", "", folder.name)


def group_logs(named: Sequence[tuple[str, Log]], final: float = 0.1) -> list[Group]:
    """Groups logs whose arguments differ in the seed alone; `name=…` on the command line makes a group as well.

    Args:
        named: name that the command line gives, or "", and log.
        final: share of a run, its last, over which its final return is the mean.
    """
    told: dict[tuple[str, str], list[dict[str, Any]]] = {}  # (environment, script) → arguments of each run
    for _, log in named:
        told.setdefault((log.arguments.get("env_id", ""), _script(log)), []).append(log.arguments)
    telling = {key: _differences(arguments) for key, arguments in told.items()}
    scripts: dict[tuple[str, str], set[str]] = {}  # (environment, experiment) → scripts with runs of that name
    for _, log in named:
        experiment = log.arguments.get("env_id", ""), log.arguments.get("exp_name") or ""
        scripts.setdefault(experiment, set()).add(_script(log))
    groups: dict[tuple[str, str], list[Log]] = {}
    for given, log in named:
        a, env_id, script = log.arguments, log.arguments.get("env_id", ""), _script(log)
        names = [name for name in telling[env_id, script] if a[name] is not None]
        changed = [f"{name.replace('_', '-')}={a[name]}" for name in names]
        title = a.get("exp_name") or script
        if title != script and len(scripts[env_id, title]) > 1:
            title = f"{script} {title}"
        groups.setdefault((env_id, given or " ".join([title, *changed])), []).append(log)
    for (_, name), logs in groups.items():
        note_repeats(name, logs)
    return [make_group(env_id, name, logs, final) for (env_id, name), logs in groups.items()]


def note_repeats(name: str, logs: Sequence[Log]) -> None:
    """Tells on standard error of seeds that a group has several runs of: equal runs say no more than one."""
    runs = Counter(log.arguments["seed"] for log in logs if "seed" in log.arguments)
    for seed, count in runs.items():
        if count > 1:
            text = (
                f"{name} has {count} runs of seed {seed}, and each counts: if they are equal, intervals are too narrow"
            )
            print(f"note: {text}", file=sys.stderr)


def _script(log: Log) -> str:
    """The script of a run of ours, or the name of another project's."""
    return log.folder.parent.parent.name + "_decoupled" * ("max_lag" in log.arguments) if log.arguments else log.name


def _differences(arguments: Sequence[dict[str, Any]]) -> list[str]:
    """Names of arguments of environment and algorithm that runs do not have in common."""
    shared = set.intersection(*map(set, arguments)) - INCIDENTAL - {"env_id", "exp_name"}
    return sorted(name for name in shared if len({str(each[name]) for each in arguments}) > 1)


def make_group(env_id: str, name: str, logs: Sequence[Log], final: float = 0.1) -> Group:
    """Puts logs of one experiment beside each other, up to where the shortest ends.

    One that ended before another has its first entry shares no steps with it: whichever are fewer, those that ended
    early or those that began late, are left out, with a note.
    """
    while (start := max(log.steps[0] for log in logs)) > (end := min(log.steps[-1] for log in logs)):
        early, late = [log.steps[-1] < start for log in logs], [log.steps[0] > end for log in logs]
        out = min(early, late, key=sum)
        for log in itertools.compress(logs, out):
            span = f"its entries are of steps {log.steps[0]} to {log.steps[-1]}"
            print(f"note: {log.folder} is left out: {span}, which others of its group do not share", file=sys.stderr)
        logs = [log for log, is_out in zip(logs, out, strict=True) if not is_out]
    edges = np.linspace(0, end, POINTS + 1)
    curves = np.stack([resample(log.steps, log.returns, edges) for log in logs])  # [S, G]
    finals = [log.returns[(log.steps > end * (1 - final)) & (log.steps <= end)] for log in logs]
    ends = [log.returns[log.steps <= end][-1:] for log in logs]  # of a run with few entries
    means = [(last if len(last) else one).mean() for last, one in zip(finals, ends, strict=True)]
    return Group(env_id, name, edges[1:], curves, np.array(means), np.array([log.seconds for log in logs]))


def resample(steps: np.ndarray, returns: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of the returns [K] between each two of the edges [G + 1]: [G].

    A stretch without entries lies on the line between its neighbours, and is NaN before the first entry.
    """
    place = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, len(edges) - 2)
    inside = steps <= edges[-1]
    counts = np.bincount(place[inside], minlength=len(edges) - 1)
    sums = np.bincount(place[inside], returns[inside], minlength=len(edges) - 1)
    have = np.flatnonzero(counts)
    return np.interp(np.arange(len(counts)), have, sums[have] / counts[have], left=np.nan)


def steps_to(group: Group, threshold: float) -> np.ndarray:
    """Environment steps [S] at which each seed's curve first reaches the threshold; infinite if it never does."""
    reached = group.curves >= threshold  # [S, G]; NaN is below
    return np.where(reached.any(1), group.grid[reached.argmax(1)], np.inf)


def summarise(groups: Sequence[Group], threshold: float | None = None) -> list[dict[str, Any]]:
    """Returns one row per group: final return, sample efficiency and time, beside the first of its environment.

    Args:
        threshold: return that counts as solved; None: nine tenths of the way from the lowest start of a curve to the
            highest final return, in each environment.
    """
    rows = []
    for group in groups:
        peers = [other for other in groups if other.env_id == group.env_id]
        goal = _goal(peers) if threshold is None else threshold
        low, high = interval(group.finals)
        row: dict[str, Any] = {"env": group.env_id, "group": group.name, "seeds": len(group.finals)}
        row |= {"iqm": float(iqm(group.finals)), "iqm_low": float(low), "iqm_high": float(high)}
        row |= {
            "mean": float(group.finals.mean()),
            "std": float(group.finals.std()) if len(group.finals) > 1 else np.nan,
        }
        row |= {"steps": int(group.grid[-1]), "seconds": float(group.seconds.mean())}
        row |= {"threshold": float(goal), "steps_to_threshold": float(np.median(steps_to(group, goal)))}
        better = better_low = better_high = np.array(np.nan)  # than itself
        if group is not peers[0] and min(len(group.finals), len(peers[0].finals)) > 1:  # a pair of runs tells nothing
            samples = group.finals, peers[0].finals
            better = probability_of_improvement(*samples)
            better_low, better_high = interval(*samples, statistic=probability_of_improvement)
        row |= {"better": float(better), "better_low": float(better_low), "better_high": float(better_high)}
        rows.append(row)
    return rows


def first_groups(groups: Sequence[Group]) -> dict[str, str]:
    """Environment → name of its first group, against which `summarise` holds the others."""
    return {group.env_id: group.name for group in reversed(groups)}


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in one line; JSON has no NaN and no infinity, so what is unknown or never reached is null."""

    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps([{key: known(value) for key, value in row.items()} for row in rows])


def warn_of_few_seeds(rows: Sequence[dict[str, Any]]) -> None:
    """Tells on standard error that intervals over fewer than five seeds are too narrow."""
    if any(1 < row["seeds"] < 5 for row in rows):
        print("note: over fewer than five seeds, an interval is narrower than it should be", file=sys.stderr)


def _goal(groups: Sequence[Group]) -> float:
    start = min(float(curve[np.isfinite(curve)][0]) for group in groups for curve in group.curves)
    return start + 0.9 * (max(float(iqm(group.finals)) for group in groups) - start)


def markdown(rows: Sequence[dict[str, Any]], first: dict[str, str]) -> str:
    """The rows as a table; `first` names the group of each environment that the others are held against."""
    head = ("environment", "runs", "seeds", "final return, IQM [95 %]", "mean ± std", "steps", "steps to", "seconds")
    lines = [[*head, "better than the first"]]
    for row in rows:
        reached = f"{row['steps_to_threshold']:.0f}" if np.isfinite(row["steps_to_threshold"]) else "never"
        cells = [row["env"], row["group"], str(row["seeds"]), _between(row["iqm"], row["iqm_low"], row["iqm_high"], 1)]
        spread = f" ± {row['std']:.1f}" if row["seeds"] > 1 else ""
        cells += [f"{row['mean']:.1f}{spread}", str(row["steps"]), f"{reached} ({row['threshold']:.4g})"]
        cells += [f"{row['seconds']:.0f}" if np.isfinite(row["seconds"]) else "", ""]
        if row["group"] != first[row["env"]] and np.isfinite(row["better"]):
            cells[-1] = _between(row["better"], row["better_low"], row["better_high"], 2)
        lines.append([cell.replace("|", r"\|") for cell in cells])
    lines.insert(1, ["-"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _between(value: float, low: float, high: float, digits: int) -> str:
    known = np.isfinite(low)  # one seed has no interval
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if known else "")


def check_picture(path: Path | None) -> None:
    """Checks, before the work, that a picture can be written there.

    Raises:
        ConfigError: it has another ending than PICTURES, or its folder is missing.
    """
    if path is not None:
        require(path.suffix in PICTURES, "out", path, f"a file that ends in one of {', '.join(PICTURES)}")
        require(path.parent.is_dir(), "out", path, "in a folder that exists")


def plot(groups: Sequence[Group], path: Path, metric: str) -> None:
    """Draws one panel per environment: interquartile means over seeds, and their 95 % intervals as bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    env_ids = list(dict.fromkeys(group.env_id for group in groups))
    size = 6 * len(env_ids), 4
    figure, panels = plt.subplots(1, len(env_ids), figsize=size, squeeze=False)
    for env_id, axes in zip(env_ids, panels[0], strict=True):
        for group in groups:
            if group.env_id == env_id:
                draw_curve(axes, group)
        axes.set(title=env_id, xlabel="environment steps", ylabel=metric or "return of training episodes")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
    with writing(path):
        figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_curve(axes: Any, group: Group) -> None:
    """Draws one group's interquartile mean, its interval as a band, and its seeds as thin lines."""
    shown = np.isfinite(group.curves).all(0)
    grid, curves = group.grid[shown], group.curves[:, shown]
    (line,) = axes.plot(grid, iqm(curves), label=f"{group.name} ({len(curves)} seed{'s' * (len(curves) > 1)})")
    if len(curves) > 1 and shown.any():
        axes.fill_between(grid, *interval(curves), color=line.get_color(), alpha=0.2, linewidth=0)
    for curve in curves if len(curves) > 1 else ():
        axes.plot(grid, curve, color=line.get_color(), alpha=0.25, linewidth=0.6)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUNS", help="run folders, folders of them, or patterns")
    picture = partial(path_of, "--out")
    parser.add_argument("--out", type=picture, help="picture to draw: png, svg or pdf; tables go beside it (.md, .csv)")
    parser.add_argument("--metric", default="", help="tag to compare (default: the returns of training episodes)")
    parser.add_argument("--final", type=float, default=0.1, help="last share of a run for its final return (0.1)")
    parser.add_argument("--threshold", type=float, help="return to reach, in how many steps (default: 0.9 of the way)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options = parser.parse_args()
    require(0 < options.final <= 1, "final", options.final, "above 0, at most 1")
    require(options.threshold is None or math.isfinite(options.threshold), "threshold", options.threshold, "a number")
    check_picture(options.out)

    named = []
    for operand in options.runs:
        name, equals, where = operand.partition("=")
        name, where = (name, where) if equals and "/" not in name else ("", operand)
        named += [(name, folder) for folder in find_logs(where)]
    bar = tqdm(named, desc="logs", disable=None, leave=False)  # none without a terminal
    groups = group_logs(read_logs(bar, options.metric), options.final)
    rows = summarise(groups, options.threshold)
    table = markdown(rows, first_groups(groups))
    print(as_json(rows) if options.json else table, flush=True)
    warn_of_few_seeds(rows)
    if options.out is not None:
        plot(groups, options.out, options.metric)
        with writing(path := options.out.with_suffix(".md")):
            path.write_text(table + "\n")
        with writing(path := options.out.with_suffix(".csv")), path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    run_script(main)
