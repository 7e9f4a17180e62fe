"""SIGINT and SIGTERM, which end a run, and SIGUSR1, by which a scheduler has it save and make room."""

import os
import signal
import sys
import threading
import time
from types import FrameType

from lightning.fabric import Fabric

from fabricrl.utils.errors import PREEMPTED
from fabricrl.utils.process import own_rank
from fabricrl.utils.ranks import all_max

PREEMPT = signal.SIGUSR1
NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # seconds that what can be stopped at any time may take for it


class Stopped(KeyboardInterrupt):
    """Raised by a signal where the main thread is."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.exit_code = code


def exit_code_of(number: int) -> int:
    """The exit code of a run that a signal has ended; 0 if there was none."""
    return PREEMPTED if number == PREEMPT else 128 + number if number else 0


class StopSignal:
    """SIGINT and SIGTERM ask for a stop at the end of the iteration; another, a second later or more, stops at once.

    Not sooner: on Ctrl-C a rank hears from the terminal and, a moment later, from the launcher that heard it too.
    SIGUSR1 asks for the same, as often as it comes: schedulers send it ahead of the time limit, and SIGTERM then.

    A thread hears them as well: Python calls handlers in the main thread alone, when it returns from what it calls,
    which a message of a rank that has been stopped, or a simulator, may keep it from for ever.

    Args:
        raises: there is nothing to save: `Stopped` is raised where the main thread is. If it has not ended some seconds
            later, the process does. SIGUSR1 is left alone.

    Attributes:
        received: the number of the first signal, or 0.
        can_save: before the ranks have met there is nothing to save, and the first signal ends this process.
    """

    newest: "StopSignal"
    _pipe = -1  # into which Python writes the signals that come, for all of this process

    def __init__(self, raises: bool = False) -> None:
        self.received, self._heard_at, self._preempted = 0, 0.0, False
        self.raises, self.can_save = raises, raises
        StopSignal.newest = self
        if StopSignal._pipe < 0:
            reading, StopSignal._pipe = os.pipe()
            os.set_blocking(StopSignal._pipe, False)
        else:
            reading = -1
        for number in NUMBERS if raises else (*NUMBERS, PREEMPT):
            signal.signal(number, self._handle)
        if not raises:  # so that all processes that this thread starts ignore what is sent to the whole job
            signal.pthread_sigmask(signal.SIG_BLOCK, {PREEMPT})
        signal.set_wakeup_fd(StopSignal._pipe, warn_on_full_buffer=False)
        if reading >= 0:  # only now: it lets through what has come while a launcher had it blocked
            threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.received
        self.received = self.received or number
        if signal.set_wakeup_fd(StopSignal._pipe, warn_on_full_buffer=False) != StopSignal._pipe:
            self.hear(number)  # an environment, as with asyncio, has had Python write elsewhere
        if self.raises and first:
            raise Stopped(128 + number)

    def hear(self, number: int) -> None:
        """Answers at once; the second time, or where there is nothing to save, by ending the process."""
        if signal.getsignal(number) != self._handle:
            return  # somebody else has taken over, as torchrun does when its workers run
        if not self.can_save or (self._heard_at and number != PREEMPT and time.monotonic() - self._heard_at >= 1):
            os._exit(exit_code_of(number))
        if number == PREEMPT:
            self._make_room()
            return
        if self._heard_at:
            return
        self.received, self._heard_at = self.received or number, time.monotonic()
        if own_rank() == 0:
            when = "" if self.raises else " after this iteration"
            print(f"stopping{when}; again to stop now", file=sys.stderr, flush=True)
        if self.raises:
            ending = threading.Timer(GRACE, os._exit, (128 + number,))
            ending.daemon = True
            ending.start()

    def _make_room(self) -> None:
        """Answers SIGUSR1, once."""
        self.received = self.received or PREEMPT
        if own_rank() == 0 and not self._preempted:
            print("saving after this iteration, to make room", file=sys.stderr, flush=True)
        self._preempted = True

    @property
    def code(self) -> int:
        """130, 143 or `PREEMPTED` if this rank was asked to stop, else 0."""
        return exit_code_of(self.received)

    def exit_code(self, fabric: Fabric) -> int:
        """The largest `code` of all ranks, which call it together."""
        return all_max(fabric, self.code)


def _listen(reading: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {PREEMPT})  # a launcher may have blocked it
    while written := os.read(reading, 1):
        if written[0] in (*NUMBERS, PREEMPT):  # there are others, of environments that take too long
            StopSignal.newest.hear(written[0])


def _forked() -> None:
    """A process that an environment forks must not write into its parent's pipe."""
    if StopSignal._pipe >= 0:
        StopSignal._pipe = -1
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
