"""Flag that a compiler is recording an update, for the few operations that must be written differently then."""

import contextlib
from collections.abc import Iterator

_recording = False


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Sets the flag inside the block."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def is_recording() -> bool:
    """True inside `recording`."""
    return _recording
