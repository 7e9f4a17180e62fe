"""SIGINT and SIGTERM."""

import os
import signal
import time

from lightning.fabric import Fabric

from fabricrl.utils.ranks import all_max


class StopSignal:
    """SIGINT and SIGTERM ask for a stop at the end of the iteration; another, a second later or more, stops at once.

    Not sooner: on Ctrl-C a rank hears from the terminal and, a moment later, from the launcher that heard it too.
    """

    def __init__(self) -> None:
        self.received, self._when = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.received and time.monotonic() - self._when >= 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self._when = number, time.monotonic()

    @property
    def code(self) -> int:
        """130 or 143 if this rank was asked to stop, else 0."""
        return 128 + self.received if self.received else 0

    def exit_code(self, fabric: Fabric) -> int:
        """The largest `code` of all ranks, which call it together."""
        return all_max(fabric, self.code)
