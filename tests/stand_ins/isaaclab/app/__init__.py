from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RUNNING: list[Any] = []  # configurations that have been launched, and not closed


@contextmanager
def launch_simulation(cfg: Any, launcher_args: Any = None) -> Iterator[None]:
    RUNNING.append(cfg)
    try:
        yield
    finally:
        RUNNING.remove(cfg)
