"""Flag for an update being recorded for a compiler, for the few places that have to be written another way then."""

import contextlib
from collections.abc import Iterator

_recording = False


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Marks what runs inside as recorded for a compiler."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def is_recording() -> bool:
    """True inside `recording`."""
    return _recording
