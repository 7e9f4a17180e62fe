"""Draws the episodic return of single runs over their steps, for runs too long to be repeated.

    python benchmarks/curve.py native=logs/ppo/ALE_Pong-v5/ppo_1_... --out benchmarks/results/pong

Writes <out>.csv and <out>.png. Curves of other names that <out>.csv has stay there.
"""

import argparse
import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fabricrl.compare import read_log

HEAD = ("run", "step", "episodic_return")


def curve(folder: Path, every: int) -> list[tuple[int, float]]:
    """Mean returns of a run's entries in each stretch of `every` steps, with the steps at its end."""
    log = read_log(folder)
    ends = (log.steps // every + 1) * every
    return [(int(end), float(np.mean(log.returns[ends == end]))) for end in np.unique(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="runs' folders, and what to call them")
    parser.add_argument("--every", type=int, default=20480, help="steps between points (default: 20480)")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, required=True, help="what is written, without suffix")
    options = parser.parse_args()
    table, curves = options.out.with_suffix(".csv"), dict[str, list[tuple[int, float]]]()
    if table.exists():
        with table.open() as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["run"], []).append((int(row["step"]), float(row["episodic_return"])))
    for given in options.runs:
        name, _, folder = given.partition("=")
        curves[name] = curve(Path(folder), options.every)
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerows((name, step, f"{value:.2f}") for name, points in curves.items() for step, value in points)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(title=options.title, xlabel="environment steps", ylabel="mean return of the episodes that ended")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
