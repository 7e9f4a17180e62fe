"""The command lines of what is no algorithm: evaluate, export, compare, sweep, tune."""

import argparse
from typing import NoReturn

from fabricrl.utils.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Reads a command line whose help begins with a module's docstring; a mistake is one line with exit code 2."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError, which `run_script` reports."""
        raise ConfigError(f"{message}; see --help")
