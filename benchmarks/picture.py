"""Draws the picture at the top of the README from the results: learning curves, and bars of speed.

python benchmarks/picture.py               after learning.py and speed.py
python benchmarks/picture.py --no-speed    the curves alone
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS, OUT = ROOT / "benchmarks/results", ROOT / "docs/images/learning_and_speed.png"
# Task -> its title, and the published return
LEARNING = {
    "cartpole": ("PPO, CartPole-v1", "CleanRL", 490),
    "walker2d": ("PPO, Walker2d-v4", "CleanRL", 2288),
    "droq-halfcheetah": ("DroQ, HalfCheetah-v4", "SimbaV2's DroQ (greedy)", 4271),
}
SPEED = {
    "ppo-cartpole-1env": "PPO\nCartPole",
    "ppo-recurrent-cartpole": "recurrent PPO\nCartPole",
    "sac-lunarlander": "SAC\nLunarLander",
    "droq-halfcheetah": "DroQ\nHalfCheetah",
}
QUANTITIES = ("steps/s", "updates/s")


def rows(path: Path) -> list[dict[str, str]]:
    """A table of results; its first line may be a comment."""
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def draw_learning(axes: plt.Axes, task: str) -> None:
    """The curve of each seed, and their mean."""
    title, source, published = LEARNING[task]
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows(RESULTS / f"learning_{task}_curves.csv"):
        curves[row["seed"]].append((float(row["step"]) / 1000, float(row["episodic_return"])))
    grid = np.array(sorted({step for curve in curves.values() for step, _ in curve}))
    seeds = [np.interp(grid, *zip(*curve, strict=True)) for curve in curves.values()]
    for seed in seeds:
        axes.plot(grid, seed, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(grid, np.mean(seeds, 0), color="tab:blue", linewidth=2, label=f"fabricrl, {len(seeds)} seeds")
    axes.axhline(published, color="black", linestyle="--", linewidth=1, label=source)
    axes.set(title=title, xlabel="thousand steps", ylabel="return in training")
    axes.legend(loc="lower right", fontsize=8)


def draw_speed(axes: plt.Axes) -> None:
    """Speed as a multiple of each peer's: the median of the pairs."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows(RESULTS / "speed.csv"):
        if row["benchmark"] in SPEED and row["quantity"] in QUANTITIES:
            ratios[row["benchmark"], row["b_is"].split(",")[0]].append(float(row["compared"]))
    names = [f"{SPEED[task]}\n× {peer.replace('Stable-Baselines3', 'SB3')}" for task, peer in ratios]
    bars = axes.bar(names, [statistics.median(values) for values in ratios.values()], color="tab:orange")
    axes.bar_label(bars, fmt="%.1f")
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(title="Speed, times that of the peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-speed", action="store_true", help="draw the curves alone")
    options = parser.parse_args()
    widths = [1.0] * len(LEARNING) + ([] if options.no_speed else [1.6])
    figure, panels = plt.subplots(
        1, len(widths), figsize=(3.4 * sum(widths), 3), width_ratios=widths, layout="constrained"
    )
    for axes, task in zip(panels, LEARNING, strict=False):
        draw_learning(axes, task)
    if not options.no_speed:
        draw_speed(panels[-1])
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
