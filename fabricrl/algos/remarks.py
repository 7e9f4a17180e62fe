"""Remarks that a run makes beside its log, each once: what would make it faster, and what seems wrong."""

import contextlib
import sys
from typing import Any

import torch

from fabricrl.envs.backends import has_native_form
from fabricrl.utils.hint import hint

WORTH_A_HINT = 60.0  # seconds that are left of a run: what starts anew for less does not pay
LONG_EPISODE = 20_000  # steps: longer than that of any task in use


class Remarks:
    """The remarks that a run has yet to make."""

    def __init__(self) -> None:
        self._left = [faster, missing_infos, endless_episodes]

    def make(self, run: Any) -> None:
        """Prints on rank 0 what there is to say by now."""
        for remark in list(self._left) if run.team.global_rank == 0 else ():
            text = remark(run)
            if text is not None:
                self._left.remove(remark)
                with contextlib.suppress(OSError):  # nobody may be reading any more
                    print(text, file=sys.stderr, flush=True)


def faster(run: Any) -> str | None:
    """A hint at what would make this run faster, after its first seconds, while enough of it is left."""
    left = (run.args.total_timesteps - run.global_step) / max(run.global_step - run.first_step, 1)
    seconds = run.clock.totals
    if left * sum(seconds.values()) <= WORTH_A_HINT and not run.is_last:
        return None
    ranks = run.fabric.device.type, run.fabric.world_size, torch.get_num_threads()
    has_native = run.mask_size == 0 and has_native_form(run.args)
    text = hint(run.args, run.algo, *ranks, seconds, steps_played(run), has_native)
    return None if text is None else f"hint: {text}"


def missing_infos(run: Any) -> str | None:
    """The `info_keys` that no episode so far has had, once there are episodes."""
    episodes = run.episodes
    missing = [key for key in run.args.info_keys if key not in episodes.told]
    if not missing or not episodes.ended:
        return None
    count = f"{episodes.ended} episode{'s' * (episodes.ended > 1)}"
    return f"warning: --info-keys {' '.join(missing)}: no such number was in the infos at the end of {count}"


def endless_episodes(run: Any) -> str | None:
    """A question, after many steps without an episode's end: an environment may lack a limit."""
    steps = steps_played(run)
    if run.episodes.count or steps < LONG_EPISODE:
        return None
    return (
        f"warning: no episode has ended in {steps} steps: does the environment need max_episode_steps in gym.register?"
    )


def steps_played(run: Any) -> int:
    """Steps of each environment in this process's run."""
    return (run.global_step - run.first_step) // (run.args.num_envs * run.fabric.world_size)
