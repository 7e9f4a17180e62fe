"""The command lines of what is no algorithm: evaluate, export, compare, sweep, tune."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fabricrl.utils.errors import ConfigError
from fabricrl.utils.spelling import nearest, others_call_so
from fabricrl.utils.text import is_one_line


class Parser(argparse.ArgumentParser):
    """Reads a command line whose help begins with a module's docstring; a mistake is one line with exit code 2."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, which `run_script` reports."""
        raise ConfigError(f"{message}; see --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Reads its own flags, also `--log_dir` for `--log-dir`: what they say, and the words that are left."""
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            own = flag.replace("_", "-")
            words.append(f"{own}{equals}{value}" if own in self._own_flags() else word)
        return super().parse_known_args(words, namespace)

    def _own_flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Reads a command line that has to end here: of a word that is not known, says which was meant.

        Raises:
            ConfigError: there is such a word, or another mistake.
        """
        options, rest = self.parse_known_args(args, namespace)
        self.check_flags(rest, ())
        if rest:
            raise ConfigError(f"{rest[0]} is neither an argument nor the value of one; see --help")
        return options

    def check_flags(self, words: Iterable[str], others: Iterable[str]) -> None:
        """Raises ConfigError for the first flag that is not among the `others`, which this parser does not read."""
        known = list(others)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if (like := flag.replace("_", "-")) not in known:
                if like == "--help-all":
                    raise ConfigError("--help-all is for the algorithms, as in fabricrl ppo --help-all")
                flags = [*self._own_flags(), *known]
                meant = others_call_so(like, flags) or difflib.get_close_matches(like, flags, n=1)
                hint = f"did you mean {' or '.join(meant)}?" if meant else "see --help"
                raise ConfigError(f"{flag} is not an argument; {hint}")

    def add_algorithm(self, names: Iterable[str], help: str) -> None:
        """Adds the argument `algo`, one of these names."""

        def known(given: str) -> str:
            if given not in names:
                raise ConfigError(f"{given!r} is not an algorithm; {nearest(given, names)}")
            return given

        self.add_argument("algo", type=known, metavar=f"{{{','.join(names)}}}", help=help)


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
