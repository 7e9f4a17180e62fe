"""Numbers that environments tell at the ends of episodes, such as `is_success`."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def info_keys(args: Any) -> tuple[str, ...]:
    """Names of the numbers that are read from an environment's infos at the end of an episode."""
    return tuple(dict.fromkeys(("is_success", *getattr(args, "info_keys", ()))))


def episode_infos(infos: dict[str, Any]) -> np.ndarray | None:
    """The numbers that environments have told at the ends of episodes in this step, [N, K], NaN where there is none.

    Returns None if no environment has told any.
    """
    final = infos.get("final_info")
    if final is None or "episode_info" not in final:
        return None
    return np.where(final["_episode_info"][:, None], final["episode_info"], np.nan)


def batched_infos(keys: Sequence[str], given: dict[str, Any], ended: np.ndarray) -> dict[str, Any]:
    """Converts infos that are arrays [N], as vector environments return them, for `episode_infos`.

    Args:
        ended: [N], which episodes ended with this step.
    """
    rows = np.full((len(ended), len(keys)), np.nan)
    for column, key in enumerate(keys):
        values = np.asarray(given.get(key, np.nan))
        if values.shape == ended.shape and values.dtype.kind in "biuf":
            rows[:, column] = np.where(ended & given.get(f"_{key}", True), values, np.nan)
    there = ~np.isnan(rows).all(1)
    return {"final_info": {"episode_info": rows, "_episode_info": there}} if there.any() else {}
