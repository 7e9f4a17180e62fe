"""The `lightning` command: `lightning run model ... script.py` is another spelling of `fabric run ... script.py`.

Lightning removed that spelling in 2.5.1; scripts, courses and papers still use it. The name `lightning` belongs to
lightning-sdk, which gets every other command where it is installed. (The command `fabricrl` is __main__.py.)
"""

import contextlib
import itertools
import signal
import sys
from datetime import timedelta
from functools import partial
from importlib import metadata
from typing import Any

from lightning.fabric.cli import _main as fabric_cli
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from fabricrl.utils.ending import one_line, report
from fabricrl.utils.errors import LostPeerError, RunError
from fabricrl.utils.network import check_address, find_store, open_store
from fabricrl.utils.peers import MINUTES, patience, waited
from fabricrl.utils.signals import StopSignal

USAGE = """usage: lightning run model [--accelerator A] [--strategy S] [--devices D] [--num-nodes N] ... SCRIPT [ARGS]

The options before SCRIPT are those of `fabric run` (see `fabric run --help`); the rest go to the script."""
OWNER = "lightning-sdk"


def main() -> None:
    """Hands `run model` and `run` to Fabric's command line; ends with the exit code of the rank that failed first."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["run"]:
        if (owner := _owner()) is not None:
            sys.exit(owner.load()())
        print(USAGE, file=sys.stdout if arguments in (["--help"], ["-h"]) else sys.stderr)
        sys.exit(0 if arguments in (["--help"], ["-h"]) else 2)
    rest = arguments[2:] if arguments[1:2] == ["model"] else arguments[1:]
    minutes = _minutes(rest)
    # The launcher's own store would listen on all addresses of the machine
    static_tcp_rendezvous.TCPStore = partial(_store, patience(minutes))  # type: ignore[assignment, misc]
    StopSignal()  # until torchrun's handlers take over: it hears nothing while it waits for other nodes
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is for the ranks
    try:
        fabric_cli(["run", *rest], prog_name="lightning")
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + (error.sigval or signal.SIGTERM))
    except KeyboardInterrupt:  # before the launcher has taken over
        sys.exit(128 + signal.SIGINT)
    except DistError:
        report(f"the nodes have not met {waited(60 * minutes)}", LostPeerError.exit_code)
        sys.exit(LostPeerError.exit_code)
    except RunError as error:
        report(str(error), error.exit_code)
        sys.exit(error.exit_code)


def _owner() -> Any:
    """The entry point of lightning-sdk's own `lightning` command; None where that package is not installed."""
    try:
        points = metadata.distribution(OWNER).entry_points
    except metadata.PackageNotFoundError:
        return None
    return next((point for point in points if (point.group, point.name) == ("console_scripts", "lightning")), None)


def _minutes(words: list[str]) -> float:
    """The script's `--timeout`, which holds for its launcher, too; of what makes no sense the script will tell."""
    given = [after for word, after in itertools.pairwise(words) if word == "--timeout"]
    given += [word.partition("=")[2] for word in words if word.startswith("--timeout=")]
    with contextlib.suppress(ValueError, IndexError):
        if 0 <= (minutes := float(given[-1])) <= 100_000:
            return minutes
    return MINUTES


def _store(
    limit: timedelta, address: str, port: int, world_size: int, is_master: bool, _: timedelta, *, multi_tenant: bool
) -> TCPStore:
    """The store in which the nodes' launchers and all ranks meet; that of the first node listens for the others.

    Raises:
        ConfigError: the address is not known here, or the port is in use.
        LostPeerError: the first node has not come.
    """
    if world_size > 1:  # nodes
        check_address(address, "--main-address")
    if is_master:
        store = open_store(address, port, "--main-port")
        store.set_timeout(limit)
        return store
    try:
        return find_store(address, port, limit.total_seconds())
    except (OSError, RuntimeError) as error:
        raise LostPeerError(f"nobody answers at {address}:{port}: {one_line(error)}") from error


if __name__ == "__main__":
    main()
