"""Draws the episodic return of one run over its steps, for runs too long to be repeated.

    python benchmarks/curve.py logs/ppo/ALE_Pong-v5/ppo_1_... --out benchmarks/results/pong

The run has to have been made with `--logger csv`. Writes <out>.csv and <out>.png.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TAG = "charts/episodic_return"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="what is written, without suffix")
    options = parser.parse_args()
    with (options.run / "metrics.csv").open() as file:
        points = [(int(row["step"]), float(row[TAG])) for row in csv.DictReader(file) if row[TAG]]
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "episodic_return"))
        writer.writerows((step, f"{value:.2f}") for step, value in points)
    steps, returns = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot(steps, returns)
    axes.set(title=json.loads((options.run / "args.json").read_text())["env_id"])
    axes.set(xlabel="environment steps", ylabel="mean return of the episodes that ended")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
