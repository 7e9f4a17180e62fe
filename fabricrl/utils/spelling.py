"""Suggestions of what an unknown word was meant to be. Imports only the standard library: commands start fast."""

import difflib
from collections.abc import Collection, Iterable

# Arguments of Stable-Baselines3, its zoo and others -> ours
OTHER_NAMES = {
    "batch-size": ["--num-minibatches"],
    "clip-range": ["--clip-coef"],
    "device": ["--accelerator"],
    "gradient-steps": ["--replay-ratio"],
    "learning-rate": ["--policy-lr", "--q-lr"],
    "lr": ["--learning-rate", "--policy-lr", "--q-lr"],
    "n-envs": ["--num-envs"],
    "n-epochs": ["--update-epochs"],
    "n-steps": ["--num-steps"],
    "n-timesteps": ["--total-timesteps"],
    "render": ["--capture-video"],
    "steps": ["--total-timesteps"],
    "train-freq": ["--replay-ratio"],
    "utd": ["--replay-ratio"],
}


def others_call_so(flag: str, flags: Collection[str]) -> list[str]:
    """Those of these flags that Stable-Baselines3 and others call like this one."""
    return [name for name in OTHER_NAMES.get(flag.strip("-"), ()) if name in flags]


def nearest(name: str, names: Iterable[str]) -> str:
    """Asks if the nearest of these names was meant, or lists them all."""
    close = difflib.get_close_matches(name.replace("_", "-"), list(names), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
