"""The `lightning` command: `lightning run model ... script.py` is another spelling of `fabric run ... script.py`.

Lightning removed that spelling in 2.5.1; scripts, courses and papers still use it.
"""

import signal
import sys

from lightning.fabric.cli import _main as fabric_cli
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

USAGE = """usage: lightning run model [--accelerator A] [--strategy S] [--devices D] [--num-nodes N] ... SCRIPT [ARGS]

The options before SCRIPT are those of `fabric run` (see `fabric run --help`); the rest go to the script."""


def main() -> None:
    """Hands `run model` and `run` to Fabric's command line; ends with the exit code of the rank that failed first."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["run"]:
        print(USAGE, file=sys.stdout if arguments in (["--help"], ["-h"]) else sys.stderr)
        sys.exit(0 if arguments in (["--help"], ["-h"]) else 2)
    rest = arguments[2:] if arguments[1:2] == ["model"] else arguments[1:]
    try:
        fabric_cli(["run", *rest], prog_name="lightning")
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + (error.sigval or signal.SIGTERM))


if __name__ == "__main__":
    main()
