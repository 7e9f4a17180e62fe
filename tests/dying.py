"""A script of which a rank kills itself, as SIGKILL from outside would, at a moment that is drawn beforehand.

DYING is a list of `rank:moment`, of which an attempt takes the one with its number: ATTEMPT, or torchrun's count of
restarts. A moment counts calls and returns, of Python's functions and of those in C, from the first iteration on: it
may lie in an environment's step, in an update, in the log, or in the middle of writing a checkpoint. A rank that waits
for others looks for them as often as it can, which does not count. Arguments begin with the script's name:
`tests/dying.py fabricrl.algos.ppo.ppo --num-envs 4`.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

from fabricrl.algos.decoupled import Player
from fabricrl.algos.run import Run
from fabricrl.utils.ending import run_script
from fabricrl.utils.ranks import finish


class Moments:
    """Counts moments from the first iteration on; kills the process at one of them, if it is to."""

    def __init__(self, last: int | None = None) -> None:
        self.passed, self.last = 0, last

    def _pass(self, frame: FrameType, event: str, argument: Any) -> None:
        self.passed += frame.f_code is not finish.__code__
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> "Moments":
        def counted(loop: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            def begin(*args: Any) -> Iterator[Any]:
                sys.setprofile(self._pass)
                return loop(*args)

            return begin

        loops = ((Run, "iterations"), (Player, "orders"))  # of coupled scripts and players, and of trainers
        self._patches = [mock.patch.object(owner, name, counted(getattr(owner, name))) for owner, name in loops]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        for patch in self._patches:
            patch.stop()


def main() -> int:
    script = importlib.import_module(sys.argv.pop(1))
    deaths = [tuple(map(int, death.split(":"))) for death in os.environ["DYING"].split(",") if death]
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("ATTEMPT", "0")))
    if attempt >= len(deaths) or deaths[attempt][0] != int(os.environ.get("RANK", "0")):
        return script.main()
    with Moments(deaths[attempt][1]):
        return script.main()


if __name__ == "__main__":
    run_script(main)
