"""The other ranks: which of them live, and for which one this rank waits in vain."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from fabricrl.utils.errors import LostPeerError
from fabricrl.utils.network import find_store

MINUTES = 10.0  # that a rank waits for another, unless it is told otherwise
OFTEN = 5.0  # seconds between two signs of life, at most
ROLL_CALL = 2.0  # seconds in which a rank that waits says so when it is asked
STUCK = 2.0  # seconds after which a thread whose question to the store stays without answer is left behind
TOLD = "fabricrl/told"  # counts those that have asked which rank is missing
STARTED_BY = "FABRICRL_STARTED_BY"  # tells a rank that Fabric starts the process that does so
ENDS, HEARD = "fabricrl/ends", "fabricrl/heard"  # the code that all are to end with; counts those that know it
LAST_RESORT = 30.0  # seconds after the time is up in which the main thread should have noticed


def patience(minutes: float) -> timedelta:
    """`--timeout` as PyTorch takes it; 0: for ever, which is as long as it can count."""
    return timedelta(minutes=minutes) if minutes else timedelta(days=10_000)


def waited(seconds: float) -> str:
    """Time that somebody has waited, in words."""
    long = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
    return f"for {long} (see --timeout)"


def process_state(pid: int) -> str:
    """The letter that Linux has for a process's state: T if it has been stopped, empty if it has ended."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if letter in "ZX" else letter


def outlive_launcher() -> None:
    """Lets a rank that Fabric started end after the first of its node, which has started it; others end at once.

    Fabric's observer kills that process as soon as it sees a child gone with an exit code other than 0, even while it
    is about to end with the very same code.
    """
    deadline = time.monotonic() + 10
    while os.getppid() == int(os.environ.get(STARTED_BY, "0")) and time.monotonic() < deadline:
        time.sleep(0.05)


class Peers:
    """The ranks as they show themselves in the store where they meet, which is of this attempt alone.

    A thread notes there every few seconds that this rank lives, and when the others have last done so. Gloo gives up
    by itself where a rank does not come; NCCL in a CUDA graph does not, and there the thread ends the process.

    Args:
        address, port: of the store.
        rank, world_size: this rank, of how many.
        minutes: how long to wait for another rank; 0: for ever.
        keeps_store: the store is that of rank 0, and gone with it.

    Raises:
        LostPeerError: nobody answers there in this time.
    """

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, minutes: float, keeps_store: bool = True
    ) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, patience(minutes).total_seconds()
        self._place, self._keeps_store = (address, port), keeps_store
        self._often = min(OFTEN, self.seconds / 8)
        self._signs: dict[int, str] = {}  # of life, by rank: a number that grows, and where the rank is
        self._clock, self._changed = 0.0, dict.fromkeys(range(world_size), 0.0)
        self._looked, self._was_away = time.monotonic(), False
        self._is_ending = False  # as another rank has all end
        try:
            self._store = find_store(*self._place, self.seconds)
        except (OSError, RuntimeError) as error:
            raise LostPeerError(f"rank {rank} has found nobody at {address}:{port} {self.waited}") from error
        self._note(0)
        self._over = threading.Event()
        self._threads = [self._start(self._attend), self._start(self._watch)]
        atexit.register(self.close)

    def _start(self, task: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=task, args=args, name="peers", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Ends the threads and waits for them, at any end of the process.

        Python before 3.14 unwinds a thread that comes back from PyTorch's C++ code while the interpreter ends, and C++
        then aborts the process ("terminate called without an active exception").
        """
        self._over.set()
        deadline = time.monotonic() + STUCK
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))

    def look(self) -> None:
        """Reads who is there: once all have met, before one of them may be lost."""
        with contextlib.suppress(RuntimeError):  # the store is gone already
            self._read_signs(self._store)

    @property
    def waited(self) -> str:
        """Time that a rank waits, in words."""
        return waited(self.seconds)

    def _key(self, what: str, rank: int) -> str:
        return f"fabricrl/{what}/{rank}"

    # --- signs of life, in a thread of their own

    def _note(self, number: int) -> None:
        self._store.set(self._key("lives", self.rank), f"{number} {os.getpid()} {_machine()}")
        self._read_signs(self._store)

    def _read_signs(self, store: TCPStore) -> None:
        for rank in range(self.world_size):
            key = self._key("lives", rank)
            sign = store.get(key).decode() if store.check([key]) else ""
            if sign != self._signs.get(rank, ""):  # "": it has not come
                self._signs[rank], self._changed[rank] = sign, self._clock

    def _attend(self) -> None:
        """Notes that this rank lives, again and again, until another has all end."""
        number = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: then this rank's next message fails, too
            while not self._over.wait(self._often):
                number += 1
                self._note(number)
                if self._store.check([ENDS]):
                    code, self._is_ending = int(self._store.get(ENDS)), True
                    try:
                        self._await_hearers(self._store.add(HEARD, 1))
                        outlive_launcher()
                    finally:
                        os._exit(code)

    def end_all(self, message: str, code: int) -> None:
        """Has the other ranks end within seconds with this exit code, whatever they wait for; the first one tells."""
        self.close()
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is rank 0
            heard = self._store.add(HEARD, 1)
            if heard == 1:
                print(f"error: {message}", file=sys.stderr, flush=True)
                self._store.set(ENDS, str(code))
            self._await_hearers(heard)

    def _await_hearers(self, heard: int) -> None:
        """Waits until all ranks know that they are to end: one that is gone early looks like a fault to the others."""
        deadline = time.monotonic() + 3 * self._often
        while heard < self.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            heard = self._store.add(HEARD, 0)
        if self.rank == 0 and self._keeps_store:
            time.sleep(1.0)  # the others look once more

    def _watch(self) -> None:
        """Ends the process some time after another's time is up, where the main thread does not notice.

        Each pause counts as two at most: a job that was suspended as a whole has not waited.
        """
        while not self._over.wait(self._often):
            self._was_away = self._is_away()
            now = time.monotonic()
            self._clock, self._looked = self._clock + min(now - self._looked, 2 * self._often), now
            came = self._others(lambda rank: rank in self._signs)
            if any(self._quiet(rank) > self.seconds + LAST_RESORT for rank in came):
                who, first = self.roll_call()
                if first:
                    print(f"error: rank {self.rank} has waited {self.waited}; {who}", file=sys.stderr, flush=True)
                os._exit(LostPeerError.exit_code)

    def _is_away(self) -> bool:
        """Tells if this process itself has been stopped, for so long that the others have left."""
        return self._was_away or time.monotonic() - self._looked > 0.75 * self.seconds

    def _quiet(self, rank: int) -> float:
        """Seconds since a rank's last sign of life."""
        return self._clock - self._changed[rank]

    # --- who is missing

    def roll_call(self) -> tuple[str, bool]:
        """Says which ranks are missing, and whether this one is the first to ask, and so the one to tell.

        All that wait, and those whose messages have failed since another left, answer. Ranks of this machine that have
        been stopped are woken, to find out that the others have left, which have told.
        """
        while self._is_ending:  # not for what this rank has met
            time.sleep(1.0)
        missing, first = [0], self._first_of_node() and not self._is_away()
        answer: list[tuple[list[int], str, bool]] = []
        asking = self._start(self._ask, answer)  # a store whose process has been stopped never answers
        self._threads.append(asking)
        asking.join(ROLL_CALL + 3)
        if answer:
            missing, text, first = answer[0]
        elif self._keeps_store:
            text = self._describe(0)
        else:
            return "the launcher does not answer", first
        if self.rank == 0 and self._keeps_store and answer:
            self._await_askers()
        if not first:
            time.sleep(0.5)  # who tells sees them as they were
        for rank in missing:
            if self._state(rank) in ("T", "t"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(self._signs[rank].split()[1]), signal.SIGCONT)
                asking.join(ROLL_CALL)  # where it keeps the store, it finds there that this rank has asked
        return text, first

    def _ask(self, answer: list[tuple[list[int], str, bool]]) -> None:
        """Adds the ranks that are missing, in words, too, and whether nobody has asked before.

        Nothing if the store is gone.
        """
        try:
            store = find_store(*self._place, ROLL_CALL)
            store.set(self._key("waits", self.rank), "")
            self._read_signs(store)  # of ranks that have come since this one looked
            deadline = time.monotonic() + ROLL_CALL
            missing = self._others(lambda rank: not store.check([self._key("waits", rank)]))
            while missing and not any(map(self._is_gone, missing)) and time.monotonic() < deadline:
                time.sleep(0.02)
                missing = self._others(lambda rank: not store.check([self._key("waits", rank)]))
            gone = [rank for rank in missing if self._is_gone(rank)]
            quiet = [rank for rank in missing if self._quiet(rank) > 3 * self._often]
            missing = gone or quiet or missing
            text = "; ".join(map(self._describe, missing))
            time.sleep(1.0 if self._is_away() else 0.0)  # those that were not know more
            answer.append((missing, text, store.add(TOLD, 1) == 1))
        except (OSError, RuntimeError):
            return

    def _await_askers(self) -> None:
        """Keeps the store until all that live have asked, for a moment: they would take its end for the fault."""
        living = self.world_size - len(self._others(lambda rank: not self._signs.get(rank) or self._is_gone(rank)))
        deadline = time.monotonic() + ROLL_CALL
        with contextlib.suppress(RuntimeError):
            while self._store.add(TOLD, 0) < living and time.monotonic() < deadline:
                time.sleep(0.02)

    def _others(self, condition: Callable[[int], bool]) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank and condition(rank)]

    def _state(self, rank: int) -> str | None:
        """The state of a rank's process; None if it is not known here."""
        sign = self._signs.get(rank, "").split(maxsplit=2)
        return process_state(int(sign[1])) if sign and sign[2] == _machine() else None

    def _is_gone(self, rank: int) -> bool:
        return rank in self._signs and self._state(rank) in ("", "T", "t")

    def _describe(self, rank: int) -> str:
        sign, state = self._signs.get(rank, "").split(), self._state(rank)
        if not sign:
            return f"rank {rank} never arrived"
        if state is None:
            what = "does not answer"
        elif state in ("T", "t"):
            what = "has been stopped"
        else:
            what = "is running, but has not reached the point where the others wait" if state else "has ended"
        return f"rank {rank}, process {sign[1]} of {sign[2]}, {what}"

    def _first_of_node(self) -> bool:
        """Tells if this is the first rank of its machine but for rank 0, whose store does not answer."""
        here = [rank for rank, sign in self._signs.items() if sign and sign.split(maxsplit=2)[2] == _machine()]
        return self.rank == min([rank for rank in here if rank > 0], default=self.rank)


def _machine() -> str:
    """This machine's name, and which of its containers this process is in."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
