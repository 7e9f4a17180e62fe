"""The command lines of what is no algorithm: evaluate, export, compare, sweep, tune."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import NoReturn

from fabricrl.utils.checkpoint import is_one_line
from fabricrl.utils.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reads a command line whose help begins with a module's docstring; a mistake is one line with exit code 2."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, which `run_script` reports."""
        raise ConfigError(f"{message}; see --help")


def path_of(what: str, given: str) -> Path:
    """The path that an argument names, with `~` expanded; there need not be anything.

    Raises:
        ConfigError: it is empty, no line of text, or none that the system can look for. Names the argument: `what`.
    """
    if not given:
        raise ConfigError(f"{what} is empty: it must be a path")
    if not is_one_line(given):
        raise ConfigError(f"{what} is {given!r}: it must be one line of text")
    try:
        path = Path(given).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (OSError, RuntimeError) as error:  # too long, links that lead to each other; a user that is not there
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise ConfigError(f"{what} is {given}: it must be a path; {reason}") from error
    return path
