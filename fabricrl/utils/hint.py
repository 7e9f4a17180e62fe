"""A hint for slow runs: the share of time of each part, and the flag that would save some of it."""

import math
from collections.abc import Mapping
from typing import Any

from fabricrl.utils.process import available_cores, idle_cores
from fabricrl.utils.update import has_compiler

PATIENCE = 20.0  # seconds that a run takes before there is anything to say
# Share of the update's time that --compile saves on a CPU, as benchmarks/speed.py measures it. Of recurrent PPO's it is
# a twentieth: not worth a word
SAVED = {"ppo": 0.7, "sac": 0.25, "droq": 0.25}
WIDTH = {"ppo": 128, "sac": 256, "droq": 256}  # of networks that were measured; products take more of wider ones
ROUND_TRIP = 1.2e-4  # seconds that a step of environments in other processes takes besides their own work


def hint(
    args: Any,
    algo: str,
    device: str,
    world_size: int,
    threads: int,
    seconds: Mapping[str, float],
    steps: int,
    has_native: bool = False,
) -> str | None:
    """One line, or None where nothing helps.

    Args:
        threads: of this rank.
        seconds: that acting ("act"), environments ("env") and updates ("train") have taken so far.
        steps: of each environment so far.
        has_native: True if the environments have a native form.
    """
    total = sum(seconds.values())
    if total < PATIENCE:
        return None
    shares = {name: seconds.get(name, 0.0) / total for name in ("env", "act", "train")}
    cores = available_cores() / world_size
    if args.vectorization in ("sync", "async") and has_native and shares["env"] > 0.3:
        return f"env {shares['env']:.2f} of the time: --vectorization native would save a good part of that"
    # On a GPU `train` is how long it takes to ask for updates, and whoever looks first waits for them
    if device == "cpu" and (text := _of_update(args, algo, threads, shares, cores)) is not None:
        return text
    if args.vectorization == "sync" and args.num_envs > 1 and cores >= 2:
        step = seconds.get("env", 0.0) / max(steps, 1)
        left = step * math.ceil(args.num_envs / cores) / args.num_envs + ROUND_TRIP
        if shares["env"] > 0.3 and left < 0.7 * step:
            text = f"env {shares['env']:.2f} of the time: --vectorization async would save"
            return f"{text} about {1 - left / step:.0%} of that"
    playing = shares["env"] + shares["act"]
    alone = world_size == 1 and not hasattr(args, "max_lag") and cores >= 2 * threads
    decouples = alone and device == "cpu" and args.vectorization != "torch"
    if decouples and min(playing, shares["train"]) > 0.3 and idle_cores() > 0.7:
        text = f"env and act {playing:.2f}, train {shares['train']:.2f} of the time"
        twin = algo.replace("_", "-") + "-decoupled"
        return f"{text}: fabricrl {twin} --devices 2 plays and trains at the same time"
    return None


def _of_update(args: Any, algo: str, threads: int, shares: Mapping[str, float], cores: float) -> str | None:
    """A second thread for wide networks, or a compiler: what would make updates on a CPU faster."""
    train, width = shares["train"], max(args.hidden_sizes, default=0)
    if algo in ("sac", "droq") and threads == 1 and cores >= 2 and width >= 256 and train > 0.5 and idle_cores() > 0.7:
        return f"train {train:.2f} of the time: --num-threads 2 would save about a third of that"
    saved = SAVED.get(algo, 0.0)
    small = not getattr(args, "resize", None) and width <= WIDTH.get(algo, 0)
    if not args.compile and small and saved * train > 0.15 and has_compiler():
        share = "two thirds" if saved > 0.6 else "a quarter"
        return f"train {train:.2f} of the time: --compile would save about {share} of that"
    return None
