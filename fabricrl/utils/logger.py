"""Loggers: TensorBoard, a CSV file, or Weights & Biases. A resumed run appends to its own log."""

import contextlib
import csv
import errno
import io
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lightning.fabric.loggers import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from fabricrl.utils.errors import from_here


class CsvLogger(Logger):
    """`metrics.csv`: a row an entry, a column a metric, empty where an entry lacks it.

    Lightning's own logger deletes the file of a run that is resumed, and writes only now and then.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.exists():  # entries after the checkpoint that is resumed are about to come again
            rows = [row for row in self._read() if int(row["step"]) <= step]
            self._columns = list(rows[0]) if rows else []
            self._rewrite(rows)

    @property
    def name(self) -> str:
        return self._path.parent.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the arguments are in args.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not row.keys() <= set(self._columns):
            rows = self._read() if self._columns else []
            self._columns = [*self._columns, *(name for name in row if name not in self._columns)]
            self._rewrite(rows)
        with self._path.open("r+", newline="") as file:  # a file that somebody has removed is not begun without a head
            file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> list[dict[str, Any]]:
        """Reads the entries. A file with lines that are none is kept beside the new one, with a warning."""
        rows, others = read_entries(self._path)
        if others:
            aside = next(path for path in _numbered(self._path.with_name("metrics.damaged")) if not path.exists())
            os.replace(self._path, aside)
            print(
                f"warning: {others} lines of {from_here(self._path)} are no entries; it is kept as {aside.name}",
                file=sys.stderr,
            )
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):  # a disk that has become read-only keeps it
                temporary.unlink(missing_ok=True)
            raise


class EventLogger(Logger):
    """TensorBoard's event file, in which each entry is written before training goes on.

    TensorBoard's own writer is a thread: where the disk is full it prints a traceback, and what it holds back is lost.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # takes a fifth of a second

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._file = _create(folder / name)
        self._records = RecordWriter(self._file)
        self._end: Any = None  # of the run, for HParams
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:  # entries after the checkpoint that is resumed are hidden: the run is about to write them again
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    @property
    def name(self) -> str:
        return self._path.parent.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Writes the arguments as a table, shown under Text, and for the HParams tab, beside the last metrics of a run.

        What TensorBoard calls an experiment, a list of columns, is left out: it then takes those of all runs together.
        """
        from torch.utils.tensorboard.summary import hparams, text

        plain = {name: value if type(value) in (int, float) else str(value) for name, value in params.items()}
        _, start, self._end = hparams(plain, {})
        rows = "\n".join(f"|{name}|{value}|" for name, value in params.items())
        summary = text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        for part in (summary, start):
            self._write(Event(wall_time=time.time(), step=kwargs.get("step", 0), summary=part))
        self._flush()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in metrics.items():
            self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success" and self._end is not None:
            self._write(Event(wall_time=time.time(), summary=self._end))
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def _flush(self) -> None:
        """Raises OSError if the entries did not reach the file, or somebody has removed it."""
        self._file.flush()
        if not self._path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))


def read_entries(path: Path) -> tuple[list[dict[str, str]], int]:
    """Entries of a log in CSV, and the number of lines that are none.

    The last line does not count if it is unfinished: a run writes it now, or has been killed as it did.
    """
    text, _, _ = path.read_bytes().decode(errors="replace").rpartition("\n")
    if not text.strip():
        return [], 0
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""))
    except csv.Error:  # not a table
        return [], text.count("\n") + 1
    if header[:1] != ["step"] or len(set(header)) < len(header):
        return [], 1 + len(lines)
    good = [line for line in lines if len(line) == len(header) and _is_entry(*line)]
    return [dict(zip(header, line, strict=True)) for line in good], len(lines) - len(good)


def _is_entry(step: str, *values: str) -> bool:
    try:
        [float(value) for value in values if value]
    except ValueError:
        return False
    return step.isascii() and step.isdecimal()


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """Creates a new file, also when two runs start in the same second."""
    for free in _numbered(path):
        with contextlib.suppress(FileExistsError):
            return free, free.open("xb")
    raise AssertionError("numbers do not end")


def _numbered(path: Path) -> Iterator[Path]:
    """The path with numbers, from 0."""
    return (path.with_name(f"{path.name}.{number}") for number in itertools.count())


def make_logger(kind: str, folder: Path, step: int, arguments: Mapping[str, Any]) -> Logger:
    """Makes the logger of a run that starts, or resumes, at `step`, and logs the arguments.

    Args:
        kind: tensorboard, csv or wandb.
    """
    if kind == "csv":
        return CsvLogger(folder / "metrics.csv", step)
    if kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        wandb = WandbLogger(
            name=folder.name,
            save_dir=folder,
            project=arguments["wandb_project_name"],
            entity=arguments["wandb_entity"],
            id="-".join(folder.parts[-3:]),
            resume="allow",
        )
        wandb.log_hyperparams(dict(arguments))
        return wandb
    board = EventLogger(folder, step)
    board.log_hyperparams(arguments, step=step)
    return board
