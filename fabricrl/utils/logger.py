"""Where metrics go: TensorBoard, a CSV file, or Weights & Biases. A resumed run goes on in what it has written."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import Logger, TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only


class CsvLogger(Logger):
    """`metrics.csv`: a row an entry, a column a metric, empty where an entry lacks it.

    Lightning's own logger deletes the file of a run that is resumed, and writes only now and then.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.exists():  # entries after the checkpoint that is resumed are about to come again
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
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
        """They are in args.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not row.keys() <= set(self._columns):
            rows = []
            if self._columns:
                with self._path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            self._columns = [*self._columns, *(name for name in row if name not in self._columns)]
            self._rewrite(rows)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)


def make_logger(kind: str, folder: Path, step: int, arguments: Mapping[str, Any]) -> Logger:
    """The logger of a run that begins, or goes on, at `step`; it has the arguments already.

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
    # Entries after the checkpoint that is resumed are hidden: the run is about to write them again
    board = TensorBoardLogger(folder, name="", version="", purge_step=step + 1 if step else None)
    rows = "\n".join(f"|{name}|{value}|" for name, value in arguments.items())
    board.experiment.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step)
    return board
