"""The `lightning` command: `lightning run model ... script.py` is another spelling of `fabric run ... script.py`.

Lightning removed that spelling in 2.5.1; scripts, courses and papers still use it.
"""

import signal
import sys
from datetime import timedelta

from lightning.fabric.cli import _main as fabric_cli
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from fabricrl.utils.ending import one_line, report
from fabricrl.utils.errors import LostPeerError, RunError
from fabricrl.utils.network import check_address, open_store

USAGE = """usage: lightning run model [--accelerator A] [--strategy S] [--devices D] [--num-nodes N] ... SCRIPT [ARGS]

The options before SCRIPT are those of `fabric run` (see `fabric run --help`); the rest go to the script."""


def main() -> None:
    """Hands `run model` and `run` to Fabric's command line; ends with the exit code of the rank that failed first."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["run"]:
        print(USAGE, file=sys.stdout if arguments in (["--help"], ["-h"]) else sys.stderr)
        sys.exit(0 if arguments in (["--help"], ["-h"]) else 2)
    rest = arguments[2:] if arguments[1:2] == ["model"] else arguments[1:]
    static_tcp_rendezvous.TCPStore = _store  # type: ignore[assignment, misc]  # the launcher's own would listen on all addresses of the machine
    try:
        fabric_cli(["run", *rest], prog_name="lightning")
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + (error.sigval or signal.SIGTERM))
    except KeyboardInterrupt:  # before the launcher has taken over
        sys.exit(128 + signal.SIGINT)
    except RunError as error:
        report(str(error), error.exit_code)
        sys.exit(error.exit_code)


def _store(
    address: str, port: int, world_size: int, is_master: bool, timeout: timedelta, *, multi_tenant: bool
) -> TCPStore:
    """The store in which the nodes' launchers and all ranks meet; that of the first node listens for the others.

    Raises:
        ConfigError: the address is not known here, or the port is in use.
        LostPeerError: the first node has not come.
    """
    if world_size > 1:  # nodes
        check_address(address, "--main-address")
    if is_master:
        return open_store(address, port, "--main-port")
    try:
        return TCPStore(address, port, world_size, False, timeout, multi_tenant=multi_tenant)
    except RuntimeError as error:
        raise LostPeerError(f"nobody answers at {address}:{port}: {one_line(error)}") from error


if __name__ == "__main__":
    main()
