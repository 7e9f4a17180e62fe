"""A run's folder: its metrics, checkpoints, progress bar and result line. Only rank 0 writes."""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from tqdm import tqdm

from fabricrl.utils.checkpoint import LACKING, go_without, save_checkpoint, save_shard
from fabricrl.utils.ending import failing_together
from fabricrl.utils.errors import ConfigError, OutputError, from_here
from fabricrl.utils.hub import is_on_hub
from fabricrl.utils.logger import make_logger
from fabricrl.utils.metric import EpisodeStatistics
from fabricrl.utils.process import freeze_gc
from fabricrl.utils.ranks import all_gather

# Where TensorBoard shows itself, with the card of the mean return in front
TELL_EVERY = 60.0  # seconds between lines of progress where there is no terminal
PINNED = json.dumps([{"plugin": "scalars", "tag": "charts/episodic_return"}], separators=(",", ":"))
RETURN_PINNED = f"http://localhost:6006/?pinnedCards={quote(PINNED)}#timeseries"


class RunFolder:
    """`logs/<algo>/<env_id>/<name>_<seed>_<time>/`, or the folder of the run that is resumed.

    Args:
        resumed, step: the checkpoint that the run goes on from, and its steps.
        asked: arguments as they were given, where another number of ranks has changed them.

    Attributes:
        folder: the run's folder, the same on every rank.
        best_return: the best mean return so far, of the last episodes at a checkpoint, or of an evaluation if there
            are some.

    Raises:
        ConfigError: the folder cannot be made, or the logger's package is missing.
    """

    def __init__(
        self,
        fabric: Fabric,
        args: Any,
        algo: str,
        name: str,
        resumed: Path | None = None,
        step: int = 0,
        asked: dict[str, Any] | None = None,
    ) -> None:
        self.fabric, self.args, self.algo, self.name = fabric, args, algo, name
        self.asked = asked or {}
        self.best_return = -math.inf
        self.checkpoint: Path | None = resumed
        self.first_step = self._logged_step = self._saved_step = step
        self._started = self._stopped = self._told = time.perf_counter()
        self._logger: Logger | None = None
        self._lock: int | None = None
        self._bar: tqdm | None = None
        folder = ""
        with failing_together(fabric):
            if fabric.global_rank == 0:
                folder = str(self._make_folder(resumed))
        self.folder = Path(fabric.broadcast(folder)).absolute()
        self._here = str(self.folder).removesuffix(from_here(self.folder))  # environments may go elsewhere

    def start(self) -> None:
        """Opens the logs and starts the clock of steps per second, just before the first reset. All ranks call it.

        Until then nothing of a resumed run has been changed.
        """
        with failing_together(self.fabric):
            if self.fabric.global_rank == 0:
                self._open_logs()
        atexit.register(self.close)
        freeze_gc()
        self._started = self._stopped = self._told = time.perf_counter()

    @property
    def videos(self) -> Path:
        """Folder of recorded episodes; a resumed run counts them anew, in a folder of its own."""
        return self.folder / "videos" / (f"from_step_{self.first_step}" if self.first_step else "")

    def advance(self, step: int, mean_return: float) -> None:
        """Moves the progress bar, in whose place a line a minute is printed without a terminal, and the end of the time
        over which steps per second are counted."""
        self._stopped = time.perf_counter()
        if self._bar is None:
            return
        if not self._bar.disable:
            self._bar.set_description_str(f"return {mean_return:.1f}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._stopped - self._told > TELL_EVERY:
            self._told = self._stopped
            done, speed = f"step {step} of {self.args.total_timesteps}", f"{self.sps(step):.0f} steps/s"
            with contextlib.suppress(OSError):  # nobody may be reading any more
                print(f"{done}, {speed}, return {mean_return:.1f}", file=sys.stderr, flush=True)

    def sps(self, step: int) -> float:
        """Environment steps per second of all ranks, from the first reset to the last update of this process."""
        return (step - self.first_step) / max(self._stopped - self._started, 1e-9)

    @property
    def has_stopped(self) -> bool:
        """True if an evaluation has reached `stop_at_return`, in this run or in the one that is resumed."""
        return self.args.stop_at_return is not None and self.best_return >= self.args.stop_at_return

    def wants_log(self, step: int, last: bool) -> bool:
        """True if `log_every` steps have passed since the last entry; the last iteration is always logged."""
        return last or step - self._logged_step >= self.args.log_every

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._logged_step = step
        if self._logger is None:
            return
        try:
            self._logger.log_metrics(metrics, step)
        except OSError as error:  # training is worth more than its log
            self._stop_logging(error)

    def wants_checkpoint(self, step: int, last: bool) -> bool:
        """True if a multiple of `checkpoint_every` has been passed since the last checkpoint, or the run ends."""
        every = self.args.checkpoint_every
        due = every > 0 and step // every > self._saved_step // every
        return self.args.save_model and (last or due)

    def save(self, step: int, mean_return: float, state: dict[str, Any], shard: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint, also as the best if the mean return has never been higher at one. All ranks call it.

        `mean_return` is NaN if it is not known: such a checkpoint is the best only if there is no other.
        `state` is the same on all ranks; `shard` is what each has of its own, such as a replay buffer.

        Raises:
            OutputError: on every rank, if one could not write.
        """
        best = mean_return > self.best_return or not math.isfinite(self.best_return)
        self.best_return = mean_return if mean_return > self.best_return else self.best_return
        self._saved_step = step
        folder = self.folder / "checkpoints"
        if shard is not None:
            with failing_together(self.fabric):  # before rank 0 writes the file that makes the checkpoint complete
                if self.fabric.global_rank > 0:
                    save_shard(folder, step, self.fabric.global_rank, shard)
        with failing_together(self.fabric):
            if self.fabric.global_rank > 0:
                return
            extra = {"algo": self.algo, "args": dataclasses.asdict(self.args), "best_return": self.best_return}
            extra |= {"global_step": step, "world_size": self.fabric.world_size, "shard": shard, "asked": self.asked}
            self.checkpoint = save_checkpoint(folder, step, extra | state, self.args.keep_checkpoints, best)

    def finish(self, step: int, episodes: EpisodeStatistics, evaluated: float | None, stopped: bool) -> None:
        """Closes the run and prints its result, one line that programs can read, on standard output.

        `evaluated`: mean return of the last evaluation, if there was one; `stopped`: by a signal.
        """
        self.close("success")
        if self.fabric.global_rank == 0:
            if stopped and self.checkpoint is not None:
                print(
                    f"stopped at step {step}; to continue: --resume {from_here(self.folder)}",
                    file=sys.stderr,
                    flush=True,
                )
            if step == self.first_step and not stopped:
                done = f"{step} of {self.args.total_timesteps} steps are done"
                done += ", and --stop-at-return is reached" * self.has_stopped
                how = "--stop-at-return <more>" if self.has_stopped else f"--total-timesteps {2 * step}"
                print(f"nothing to do: {done}; to continue: --resume {from_here(self.folder)} {how}", file=sys.stderr)
            fields = f"steps={step} sps={self.sps(step):.0f} return_mean={episodes.mean_return:.2f}"
            fields += f" episodes={episodes.count}"
            fields += "" if evaluated is None else f" eval_return_mean={evaluated:.2f}"
            try:
                checkpoint = str(self.checkpoint).removeprefix(self._here)
                print(f"result {fields} checkpoint={checkpoint}", flush=True)
            except OSError as error:  # no reason to fail after the work is done
                if not isinstance(error, BrokenPipeError):  # else nobody reads it
                    print(f"warning: the result is not printed: {error.strerror}", file=sys.stderr, flush=True)
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def discard(self) -> None:
        """Removes the folder of a run that has failed before it wrote anything there."""
        if self.fabric.global_rank == 0:
            with contextlib.suppress(OSError):  # it is not empty
                self.folder.rmdir()

    def close(self, status: str = "failed") -> None:
        """Flushes the logs; harmless when called again. `status`: success or failed, for the log."""
        if self._bar is not None:
            self._bar.close()
        if self._logger is not None:
            try:
                self._logger.finalize(status)
            except OSError as error:
                self._stop_logging(error)
            self._logger = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        atexit.unregister(self.close)

    def _stop_logging(self, error: OSError) -> None:
        print(f"warning: no more metrics are written: {error.strerror or error}", file=sys.stderr, flush=True)
        self._logger = None

    def _open_logs(self) -> None:
        arguments = dataclasses.asdict(self.args)
        kind = "wandb" if self.args.track else self.args.logger
        try:
            self._lock = _lock(self.folder)
            told = arguments | ({"asked": self.asked} if self.asked else {})
            (self.folder / "args.json").write_text(json.dumps(told, indent=2) + "\n")
            if self.first_step < self.args.total_timesteps and not self.has_stopped:  # else there is nothing to log
                self._logger = make_logger(kind, self.folder, self.first_step, arguments)
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error
        ranks, threads = self.fabric.world_size, torch.get_num_threads()
        who = "player" if hasattr(self.args, "max_lag") else f"{ranks} rank{'s' * (ranks > 1)}"  # beside its trainers
        where = f"{who} on {self.fabric.device.type}, {threads} thread{'s' * (threads > 1)} each"
        since = f"; from step {self.first_step} of {from_here(self.checkpoint)}" if self.first_step else ""
        writing = f"writing to {from_here(self.folder)}{since}"
        print(f"{self.algo} {self.args.env_id}: {where}; {writing}", file=sys.stderr, flush=True)
        on_terminal = sys.stderr.isatty()
        if on_terminal and kind == "tensorboard":
            logs = shlex.quote(from_here(self.folder.parents[2]))
            print(f"to watch: tensorboard --logdir {logs}, and {RETURN_PINNED}", file=sys.stderr, flush=True)
        self._bar = progress_bar(self.args.total_timesteps, self.first_step, hidden=not on_terminal)

    def _make_folder(self, resumed: Path | None) -> Path:
        """Returns the resumed run's folder, if it or its newest checkpoint was named; else makes a new one."""
        here = resumed is not None and not is_on_hub(self.args.resume)
        if resumed is not None and here and (resumed.parent.parent / "args.json").exists():
            newest = max(resumed.parent.glob("step_*.ckpt"), default=None)
            if newest == resumed or Path(self.args.resume).expanduser().is_dir():
                return resumed.parent.parent
        name = f"{self.name}_{self.args.seed}_{datetime.now():%Y%m%d-%H%M%S}"
        try:
            return _fresh_folder(runs_folder(self.args, self.algo), name)
        except OSError as error:
            raise ConfigError(f"--log-dir {self.args.log_dir} cannot be written: {error.strerror}") from error


def runs_folder(args: Any, algo: str) -> Path:
    """The folder of all runs of an algorithm on an environment."""
    return Path(args.log_dir).expanduser() / algo / re.sub(r"[^\w.-]", "_", args.env_id)


def began(folder: Path) -> tuple[str, int]:
    """The time at which a run began, as its folder's name has it, and its number among those of the same second.

    Empty if the name is none that we give.
    """
    match = re.search(r"_(\d{8}-\d{6})(?:-(\d+))?$", folder.name)
    return (match[1], int(match[2] or 0)) if match else ("", 0)


def progress_bar(total: int, initial: int, hidden: bool) -> tqdm:
    """A bar of steps. The narrower the terminal is, or becomes, the more is cut off at its right; the return stays."""
    return tqdm(
        total=total,
        initial=initial,
        disable=hidden,
        unit=" steps",
        smoothing=0.05,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}] |{bar:20}|",
    )


def rank_generators(fabric: Fabric, *generators: torch.Generator) -> torch.Tensor:
    """The states of these generators and of torch's default one on every rank: [W, G + 1, bytes]."""
    states = torch.stack([*(generator.get_state() for generator in generators), torch.get_rng_state()])
    return all_gather(fabric, states)


def restore_generators(states: torch.Tensor, rank: int, *generators: torch.Generator) -> None:
    """Sets the generators to what `rank_generators` returned for this rank; a rank that is new keeps its own."""
    if rank < len(states):
        *own, default = (state.clone() for state in states[rank])  # set_state reads from the start of the storage
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
        torch.set_rng_state(default)


def _lock(folder: Path) -> int | None:
    """Holds a run's folder until this process ends, however it does; None where the system has no such locks.

    Raises:
        ConfigError: another process writes there.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder / "args.json", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise ConfigError(f"--resume: another process is running in {folder}") from error
        if error.errno not in LACKING:
            raise
        go_without("flock", folder, "two processes that resume this run would not notice each other")
        return None
    os.set_inheritable(descriptor, False)
    return descriptor


def _fresh_folder(parent: Path, name: str) -> Path:
    """Makes a new folder, also when two runs start in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1000):
        folder = parent / (name if attempt == 0 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OutputError(f"no free name for a run folder beside {folder}")
