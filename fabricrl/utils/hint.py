"""A hint for slow runs: the share of time of each part, and the flag that would save some of it."""

import math
import shutil
from collections.abc import Mapping
from typing import Any

from fabricrl.utils.process import available_cores

PATIENCE = 20.0  # seconds that a run takes before there is anything to say
# Share of the update's time that --compile saves on a CPU, as benchmarks/speed.py measures it
SAVED = {"ppo": 0.7, "ppo_recurrent": 0.25, "sac": 0.25}
ROUND_TRIP = 1.2e-4  # seconds that a step of environments in other processes takes besides their own work


def hint(args: Any, algo: str, device: str, world_size: int, seconds: Mapping[str, float], steps: int) -> str | None:
    """One line, or None where nothing helps.

    Args:
        seconds: that acting ("act"), environments ("env") and updates ("train") have taken so far.
        steps: of each environment so far.
    """
    total = sum(seconds.values())
    if total < PATIENCE:
        return None
    shares = {name: seconds.get(name, 0.0) / total for name in ("env", "act", "train")}
    cores = available_cores() / world_size
    small = not getattr(args, "resize", None) and max(args.hidden_sizes, default=0) <= 128
    saved = SAVED.get(algo, 0.0) * shares["train"]
    if device == "cpu" and not args.compile and saved > 0.15 and (small or algo == "sac") and shutil.which("g++"):
        share = "two thirds" if SAVED[algo] > 0.6 else "a quarter"
        return f"train {shares['train']:.2f} of the time: --compile would save about {share} of that"
    if args.vectorization == "sync" and args.num_envs > 1 and cores >= 2:
        step = seconds.get("env", 0.0) / max(steps, 1)
        left = step * math.ceil(args.num_envs / cores) / args.num_envs + ROUND_TRIP
        if shares["env"] > 0.3 and left < 0.7 * step:
            text = f"env {shares['env']:.2f} of the time: --vectorization async would save"
            return f"{text} about {1 - left / step:.0%} of that"
    playing, threads = shares["env"] + shares["act"], args.num_threads or 1
    alone = world_size == 1 and not hasattr(args, "max_lag") and cores >= 2 * threads
    if alone and min(playing, shares["train"]) > 0.3:
        text = f"env and act {playing:.2f}, train {shares['train']:.2f} of the time"
        twin = algo.replace("_", "-") + "-decoupled"
        return f"{text}: fabricrl {twin} --devices 2 plays and trains at the same time"
    return None
