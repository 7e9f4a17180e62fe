"""Resuming: finds the run for `--resume auto`, makes ranks agree on its checkpoint, adapts it to their number."""

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from fabricrl.algos.args import DecoupledArgs, StandardArgs
from fabricrl.algos.command_line import is_given
from fabricrl.algos.names import identity
from fabricrl.utils.checkpoint import load_checkpoint, reading
from fabricrl.utils.ending import failing_together
from fabricrl.utils.errors import CheckpointError
from fabricrl.utils.run import began, runs_folder

# What a rank has of its own, so that another number of ranks changes it; a run keeps what they have together
PER_RANK = ("num_envs", "batch_size", "buffer_size")


def newest_run(args: StandardArgs, algo: str) -> Path | None:
    """The folder of the run that began last among those of the same arguments that have a checkpoint.

    Raises:
        CheckpointError: a run that lacks its args.json has no checkpoint that can be read either.
    """
    wanted = identity(type(args), dataclasses.asdict(args))
    runs = {folder: time for folder in runs_folder(args, algo).glob("*") if (time := began(folder))[0]}
    for folder in sorted(runs, key=runs.__getitem__, reverse=True):
        if any(folder.glob("checkpoints/step_*.ckpt")) and identity(type(args), _arguments(folder)) == wanted:
            return folder.resolve()
    return None


def _arguments(folder: Path) -> dict[str, Any]:
    """The arguments that a run was given."""
    try:
        stored = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):  # it was killed while it wrote them
        state, _ = load_checkpoint(folder)
        stored = state["args"] | {"asked": state.get("asked", {})}
    return stored | stored.get("asked", {})


def agreed(fabric: Fabric, state: dict[str, Any], path: Path | None, algo: str) -> tuple[dict[str, Any], Path | None]:
    """The checkpoint that rank 0 has found, on all ranks: they may have looked before the newest could be seen there.

    Raises:
        CheckpointError: on all ranks, if one cannot read it.
    """
    if fabric.world_size == 1:
        return state, path
    first = fabric.broadcast(str(path or ""))
    with failing_together(fabric):
        if Path(first).parts[-3:] != Path(path or "").parts[-3:]:  # folders above may have other names on other nodes
            try:
                state, path = load_checkpoint(first, algo) if first else ({}, None)
            except CheckpointError as error:
                raise CheckpointError(
                    f"rank {fabric.global_rank} cannot read the checkpoint that rank 0 resumes from: {error}"
                ) from error
    return state, path


def resume_together(
    fabric: Fabric, args: Any, state: dict[str, Any], path: Path | None, algo: str, auto: bool
) -> tuple[Any, dict[str, Any], dict[str, Any], Path | None]:
    """Makes all ranks resume from the same checkpoint, if there is one, each with its share of the run.

    Args:
        state, path: the checkpoint that this rank has found; {} and None: it has found none.
        auto: with `--resume auto`, the arguments are those of the command line.

    Returns:
        the arguments of this rank; those among them that were asked for but are others now; the checkpoint.

    Raises:
        CheckpointError: on all ranks, if one cannot read it, or these ranks cannot share the run equally.
    """
    state, path = agreed(fabric, state, path, algo)
    if not state:  # a rank other than 0 may have found one
        return replace(args, resume=None) if args.resume else args, {}, {}, None
    if not args.resume:  # rank 0 has found one
        args = replace(args, resume=str(path))
    ranks = 1 if isinstance(args, DecoupledArgs) else fabric.world_size
    with reading(path):
        state |= state.pop("learner", {})  # where SAC and DroQ had their optimizers before
        kept = [] if auto else list(filter(is_given, PER_RANK))
        fitted = for_ranks(args, state, ranks, kept)
        asked = {} if auto else state.get("asked", {})
    asked = {name: asked.get(name, getattr(args, name)) for name in fitted}
    asked = {name: value for name, value in asked.items() if value != fitted[name]}
    changed = {name: value for name, value in fitted.items() if value != getattr(args, name)}
    if changed and fabric.global_rank == 0:
        text = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        before = state["world_size"]
        print(f"ranks: {ranks}, {before} in the checkpoint: each now has {text}", file=sys.stderr, flush=True)
    return replace(args, **changed), asked, state, path


def for_ranks(args: Any, state: Mapping[str, Any], ranks: int, kept: Collection[str]) -> dict[str, int]:
    """The arguments of each of so many ranks which together do what the ranks of a checkpoint have done.

    Args:
        kept: names of the arguments that stay as they are.

    Raises:
        CheckpointError: these ranks cannot share equally what those had.
    """
    stored, before, fitted = state["args"], state["world_size"], {}
    for name, what in (("num_envs", "environments"), ("batch_size", "transitions in a batch")):
        if name in stored and hasattr(args, name) and name not in kept:
            fitted[name], left = divmod(stored[name] * before, ranks)
            if left:
                raise CheckpointError(
                    f"the run has {stored[name] * before} {what} in all, which {ranks} ranks cannot share equally: "
                    f"resume it with another number of ranks, or with another --{name.replace('_', '-')}"
                )
    shared = "num_envs" in fitted or ranks != before
    if shared and "buffer_size" in stored and hasattr(args, "buffer_size") and "buffer_size" not in kept:
        num_envs = fitted.get("num_envs", args.num_envs)
        rows, left = divmod(stored["buffer_size"], stored["num_envs"])  # of each environment
        fitted["buffer_size"] = rows * num_envs + (left if num_envs == stored["num_envs"] else 0)
    return fitted
