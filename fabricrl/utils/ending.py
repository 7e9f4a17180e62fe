"""The end of a script: errors that all ranks agree on, told in one line by one of them, with the right exit code."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import TCPStore

from fabricrl.utils.errors import PREEMPTED, ConfigError, LostPeerError, RunError, from_here
from fabricrl.utils.network import LOOPBACK, open_store
from fabricrl.utils.peers import outlive_launcher
from fabricrl.utils.process import PLACE, environ_number, go_on_in_child, own_rank, under_srun
from fabricrl.utils.ranks import all_gather
from fabricrl.utils.signals import Stopped


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, reports a RunError in one line, and ends the process with the exit code that belongs to it."""
    if os.getpid() == 1:
        go_on_in_child()
    try:
        code = main()
        if code == PREEMPTED and own_rank() == 0:
            requeue()  # before any rank ends, for which Slurm may end the others
        _part()
    except RunError as error:
        code = error.exit_code
        report(str(error), code, error.told_by)
    except Stopped as error:
        code = error.exit_code
    except KeyboardInterrupt:  # before StopSignal took over
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        code = LostPeerError.exit_code
        report(f"rank {own_rank()} has lost a peer: {reason(error)}", code)
    if code:
        outlive_launcher()
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """The reason why a message of another rank has failed: one line, without what helps PyTorch's developers alone."""
    line = re.sub(r"^\[[^\]]*\] ", "", one_line(error)).partition(". This is typically")[0]
    if PLACE.peers is not None and re.search("(?i)timed? ?out", line):
        return f"no answer {PLACE.peers.waited}"
    return line


def requeue() -> None:
    """Has Slurm put this job, if it is one, back into its queue; says so, or why not."""
    job = SLURMEnvironment.job_id()
    if job is None:
        return
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    name = f"{array}_{task}" if array and task else str(job)
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        told = str(getattr(error, "stderr", None) or error).strip().splitlines()
        print(f"warning: job {name} is not requeued: {told[0]}", file=sys.stderr, flush=True)
    else:
        print(f"job {name} is requeued", file=sys.stderr, flush=True)


def _part() -> None:
    """All ranks let go of each other at the same time: one that is gone early looks like a fault to the others."""
    if PLACE.peers is not None:
        PLACE.peers.close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def failing_together(fabric: Fabric) -> Iterator[None]:
    """A RunError inside ends all ranks with its exit code, rather than leave the others waiting for this one."""
    fault: RunError | None = None
    try:
        yield
    except RunError as error:
        fault = error
    if fault is None and fabric.world_size == 1:
        return
    codes = all_gather(fabric, torch.tensor(fault.exit_code if fault else 0)).tolist()  # [W]
    if not any(codes):
        return
    teller = next(rank for rank, code in enumerate(codes) if code)
    if fault is None or fabric.global_rank != teller:
        fault = RunError()  # without text: the first rank that failed says why
    fault.exit_code, fault.told_by = codes[teller], teller
    raise fault


def report(message: str, code: int, told_by: int = 0) -> None:
    """One line on standard error; mistakes in arguments, which ranks make alike, are told by the first to make them.

    Before the ranks have met nobody knows whether another node has made it, too. There the first of each node tells;
    under srun, which shows the output of all nodes together, whoever asks first. Of ranks that have lost another, the
    first to ask tells, too, and which one is missing.
    """
    alike, srun = code in (2, 3), PLACE.rank is None and under_srun() and (environ_number("SLURM_NTASKS") or 1) > 1
    if message and code == LostPeerError.exit_code and PLACE.peers is not None:
        missing, speaks = PLACE.peers.roll_call()
        message, alike = f"{message}; {missing}" if missing else message, True
    elif PLACE.rank is None and not srun:
        speaks = environ_number("LOCAL_RANK") in (None, told_by)
    else:
        speaks = _asks_first() if alike and srun else own_rank() == told_by
    if message and (speaks or not alike):
        print(f"error: {from_here(' '.join(message.split()))}", file=sys.stderr, flush=True)
    if alike and srun and code != LostPeerError.exit_code:
        _wait_for_askers()


def _asks_first() -> bool:
    """Tells if no other of srun's ranks has asked this, in the store where they would have met; in doubt none has.

    Rank 0 opens the store if it fails before it would have.
    """
    try:
        ranks = SLURMEnvironment()
        address = LOOPBACK if os.environ.get("SLURM_NNODES") == "1" else ranks.main_address
        port = ranks.main_port
        if own_rank() == 0:
            PLACE.store = PLACE.store or open_store(address, port, "MASTER_PORT")
        else:
            PLACE.store = TCPStore(address, port, None, False, timeout=timedelta(seconds=30))
        return PLACE.store.add("fabricrl/asked", 1) == 1
    except (RunError, RuntimeError, ValueError):  # there is no place to meet, of which the ranks will be told
        return True


def _wait_for_askers() -> None:
    """Has rank 0, whose store it is, stay until all others have asked, or for some seconds: not all may have failed."""
    deadline = time.monotonic() + 5
    if own_rank() == 0 and PLACE.store is not None:
        while PLACE.store.add("fabricrl/asked", 0) < int(os.environ["SLURM_NTASKS"]) and time.monotonic() < deadline:
            time.sleep(0.05)


def end_if_out_of_memory(error: BaseException, args: Any) -> None:
    """Ends the run if it has asked for more memory than there is: all ranks, in one line that says what takes less.

    Raises:
        ConfigError: it has, and this rank is the only one; SystemExit: others have ended, too, or are about to.
    """
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not (of_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return
    amount = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    names = ("num_envs", "num_steps", "batch_size", "buffer_size")
    *flags, last = [f"--{name.replace('_', '-')}" for name in names if hasattr(args, name)]
    advice = f"lower {', '.join(flags)} or {last}"
    advice += ", or raise --num-minibatches" if hasattr(args, "num_minibatches") else ""
    more = f"{amount[1]} more" if amount else "more"
    of_gpu = "GPU " * isinstance(error, torch.OutOfMemoryError)
    message = f"rank {own_rank()} is out of {of_gpu}memory, as it needs {more}: {advice}"
    if PLACE.peers is None:
        raise ConfigError(message) from error
    PLACE.peers.end_all(message, ConfigError.exit_code)
    outlive_launcher()
    sys.exit(ConfigError.exit_code)


def is_communication_error(error: RuntimeError) -> bool:
    """Tells if a collective has failed because another rank is gone or late."""
    return torch.distributed.is_initialized() and is_of_peers(error)


def is_of_peers(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("gloo", "Connection", "NCCL", "Timed out", "peer"))
    )
