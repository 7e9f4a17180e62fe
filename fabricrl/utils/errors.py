"""Errors that end a run: each kind has its exit code and is reported to the user in one line."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

# Exit code of a run that SIGUSR1 has had save and end, so that a scheduler may start it again: that of sysexits.h for a
# failure that is temporary (EX_TEMPFAIL). It is no error, and nothing of it is reported as one
PREEMPTED = 75


class RunError(Exception):
    """Base of the errors that end a run with `exit_code` and one line on standard error."""

    exit_code = 1
    told_by = 0  # the first rank that has it, where ranks have agreed on that


class ConfigError(RunError):
    """An argument that cannot be used; raised before any environment or process starts."""

    exit_code = 2


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, or made by something else."""

    exit_code = 3


class EnvError(RunError):
    """An environment raised, died, or returned what its spaces do not allow."""

    exit_code = 4


class NonFiniteError(RunError):
    """NaN or infinity in an observation, a reward, a loss or a parameter."""

    exit_code = 5


class OutputError(RunError):
    """A file of the run could not be written."""

    exit_code = 6


class LostPeerError(RunError):
    """Another rank stopped answering."""

    exit_code = 7


def from_here(text: object) -> str:
    """A path, or a text with paths, in which those below the current folder begin there: `logs/ppo`, not `/home/…`."""
    try:
        here = str(Path.cwd())
    except FileNotFoundError:  # it has been removed
        return str(text)
    if here == "/":
        return str(text)
    return re.sub(rf"(?<![\w./-]){re.escape(here)}(/\.)?/(?=[^/\s])", "", str(text))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OutputError if a file or folder cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def require(condition: bool, flag: str, given: object, allowed: str) -> None:
    """Raises ConfigError naming the flag, what was given and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"--{flag.replace('_', '-')} is {given}: it must be {allowed}")
