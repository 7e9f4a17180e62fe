"""The command `fabricrl`, also `python -m fabricrl`: `fabricrl ppo …` runs fabricrl/algos/ppo/ppo.py as Python would.

Each algorithm's folder brings its commands: its script, and that of its decoupled twin, by the names of their files.
Beside them stand the commands in COMMANDS: a module of fabricrl each, with a docstring whose first line `--help` shows,
and a `main` that `run_script` runs. Another one is a file and its name there.
"""

import ast
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from fabricrl import __version__
from fabricrl.utils.spelling import nearest

COMMANDS = ("evaluate", "export", "compare", "sweep", "tune")
PACKAGE = Path(__file__).parent
USAGE = """usage: fabricrl COMMAND [ARGS]     (or python -m fabricrl COMMAND [ARGS])

{commands}

Each command's --help shows its arguments. Launchers take the command, too, as in
  torchrun --nproc-per-node 2 -m fabricrl ppo --env-id CartPole-v1"""


def algorithms() -> dict[str, Path]:
    """Finds each algorithm's script and that of its twin, algos/<name>/<name>*.py; _ is written as -."""
    found = sorted(PACKAGE.glob("algos/*/*.py"))
    return {path.stem.replace("_", "-"): path for path in found if path.stem.startswith(path.parent.name)}


def scripts() -> dict[str, Path]:
    """Finds the script of each command: the algorithms', then those in COMMANDS."""
    return algorithms() | {name: PACKAGE / f"{name}.py" for name in COMMANDS}


def usage() -> str:
    """The commands, each with the first line of its script."""
    lines = []
    for name, path in scripts().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{max(map(len, scripts()))}s}  {text.partition(chr(10))[0]}")
    return USAGE.format(commands="\n".join(lines))


def main() -> NoReturn:
    """Runs the script of a command in place of this one: it, and what it starts, see the path as if it had been given.

    Ends with exit code 2 and one line if there is no such command.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(f"fabricrl {__version__}")
        sys.exit(0)
    found = scripts()
    if name not in found:
        print(f"error: {name!r} is not a command of fabricrl; {nearest(name, found)}", file=sys.stderr)
        sys.exit(2)
    path = str(found[name])
    sys.argv = [path, *rest]
    runpy.run_path(path, run_name="__main__")
    sys.exit(0)  # a script ends the process itself


if __name__ == "__main__":
    main()
