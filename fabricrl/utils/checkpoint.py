"""Checkpoints: one self-verifying file per save, complete under its final name or absent.

A checkpoint is what `torch.save` writes, a zip archive, with the SHA-256 of the archive as its comment: `torch.load`
reads it as any other file, and one changed or missing byte is noticed here before anything is unpickled.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn

from fabricrl.utils.contents import check_contents, is_shard
from fabricrl.utils.errors import CheckpointError, ConfigError, OutputError, from_here
from fabricrl.utils.hub import fetch, is_on_hub
from fabricrl.utils.text import is_one_line

FORMAT = 1
BEST = "best.ckpt"
_NO_COMMENT = b"\0\0"  # how an archive without a comment ends: the length of the comment, as two bytes
_SEAL = len(_NO_COMMENT) + 64  # what the comment and its length take
# How a file system says that it has no such call; network mounts often lack locks, or fsync of a folder
LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_told: set[str] = set()  # the calls that this process has warned of


class _HashingWriter:
    """Hashes what passes through, so that a large state is neither held in memory nor read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, best: bool = False) -> Path:
    """Writes `state` to `folder/step_<step>.ckpt`, links it to `best.ckpt` if `best`, and keeps the newest `keep`.

    The file is written beside its final place, forced to disk and then renamed, as is the folder's entry: a crash at
    any moment leaves the previous checkpoints as they were. Call it on one rank.

    Raises:
        OutputError: the disk is full or the folder cannot be written; no partial file stays.
    """
    path = folder / f"step_{step:012d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):  # of a run that was killed while it saved
            stale.unlink(missing_ok=True)
        _write(path, state)
        if best:
            for shard in folder.glob(f"step_{step:012d}.shard*"):
                _link(shard, folder / shard.name.replace("step", "best"))
            _link(path, folder / BEST)  # from here on the new one is the best
        _sync_folder(folder)
        saved = sorted(folder.glob("step_*.ckpt"))
        for old in saved[: saved.index(path) + 1][:-keep]:  # one of a later step is damaged: it was not resumed
            old.unlink()
        for shard in folder.glob("*.shard*"):
            is_best, outdated = shard.name.startswith("best"), best and shard.stem != f"best_{step:012d}"
            if outdated if is_best else not shard.with_suffix(".ckpt").exists():
                shard.unlink()
    except OSError as error:
        raise OutputError(f"cannot save {path}: {_cause(error)}; earlier checkpoints are untouched") from error
    return path


def save_shard(folder: Path, step: int, rank: int, shard: dict[str, Any]) -> None:
    """Writes what one rank alone has, beside the checkpoint that rank 0 writes after all have done so.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    path = folder / f"step_{step:012d}.shard{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, {"global_step": step, "shard": shard})
        _sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot save {path}: {_cause(error)}; earlier checkpoints are untouched") from error


def load_shard(state: Mapping[str, Any], path: Path, rank: int) -> dict[str, Any]:
    """Reads what this rank stored with the checkpoint `state`, read from `path`; rank 0's is in the checkpoint itself.

    Raises:
        CheckpointError: there is none, or it belongs to another checkpoint.
    """
    if rank == 0 and state.get("shard") is not None:
        return state["shard"]
    file = _shard_file(state, path, rank)
    if file is None:
        raise CheckpointError(f"{path} comes without the replay buffer of rank {rank}")
    stored = _read(file)
    if stored.get("global_step") != state["global_step"]:
        raise CheckpointError(f"{file} is of step {stored.get('global_step')}, {path} of {state['global_step']}")
    if not is_shard(stored.get("shard")):
        raise CheckpointError(f"{file} has no valid 'shard'")
    return stored["shard"]


def _shard_file(state: Mapping[str, Any], path: Path, rank: int) -> Path | None:
    names = [f"{kind}_{state['global_step']:012d}.shard{rank}" for kind in ("step", "best")]
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), None)


def shard_ranks(state: Mapping[str, Any]) -> range:
    """The ranks that have stored a part of their own with the checkpoint `state`.

    That of rank 0 is in the checkpoint itself, unless a decoupled script has made it: its player has none.
    """
    return range(state["shards"] if state.get("shards") else state["world_size"] if state.get("shard") else 0)


def copy_without_buffer(source: Path, target: Path) -> dict[str, Any]:
    """Writes a checkpoint again for others to use: without the replay buffer, and without its wish to be uploaded.

    Returns its state.

    Raises:
        CheckpointError: it cannot be read.
        OutputError: the copy cannot be written.
    """
    state, _ = load_checkpoint(source)
    private = {"upload_model": False, "hf_entity": None}
    args = state["args"] | {name: value for name, value in private.items() if name in state["args"]}
    parts = {"shard": None, "shards": 0}
    state |= {"args": args} | {name: nothing for name, nothing in parts.items() if name in state}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, state)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {_cause(error)}") from error
    return state


def load_checkpoint(path: str | Path, algo: str | None = None) -> tuple[dict[str, Any], Path]:
    """Reads a checkpoint, or the newest good one of a run folder, also of one on the Hub: `hf://user/repository`.

    Never runs code from the file. Returns the state and the file that it came from.

    Raises:
        CheckpointError: missing, truncated, altered, of another format or another algorithm than `algo`.
        ConfigError: a place on the Hub that is not written as it should be, or the package for it is missing.
    """
    if is_on_hub(path):
        path = fetch(str(path))  # a link into the cache: what it leads to has no name that tells anything
        is_folder = path.is_dir()
    else:
        path, is_folder = _locate(path)
    state, found = _newest_good(_candidates(path)) if is_folder else (_read(path), path)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{found} has checkpoint format {state.get('format')}; this version reads format {FORMAT}"
        )
    if algo is not None and state.get("algo") != algo:
        raise CheckpointError(f"{found} was made by {state.get('algo')}, not by {algo}")
    if algo is not None:
        check_contents(state, found)
    return state, found


def _locate(given: str | Path) -> tuple[Path, bool]:
    """The path that is meant, and whether it is a folder.

    Raises:
        CheckpointError: no path, or one that the system or a line of text cannot hold.
    """
    if not str(given):
        raise CheckpointError("the path of a checkpoint or run folder is empty")
    if not is_one_line(given):
        raise CheckpointError(f"cannot read checkpoint {str(given)!r}: its name is not one line of text")
    try:
        path = Path(given).expanduser().resolve()
        is_folder = path.is_dir()
    except RuntimeError as error:  # a user that is not there, or links that lead to each other
        raise CheckpointError(f"cannot read checkpoint {given}: {str(error).rstrip('.')}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {given}: {_cause(error)}") from error
    if not is_one_line(path):
        raise CheckpointError(f"cannot read checkpoint {str(path)!r}: its name is not one line of text")
    return path, is_folder


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first; it may also be named by its folder `checkpoints`.

    Raises:
        CheckpointError: there are none; names the runs that are below.
    """
    own = folder if folder.name == "checkpoints" else folder / "checkpoints"
    candidates = sorted(own.glob("step_*.ckpt"), reverse=True)
    if not candidates:
        raise CheckpointError(f"{folder} is a folder without checkpoints/step_*.ckpt{_runs_below(folder)}")
    return candidates


def _runs_below(folder: Path) -> str:
    """The runs of a folder of runs in words, the newest first; nothing if there are none."""
    for pattern in ("*", "*/*", "*/*/*"):  # an environment's, an algorithm's, all
        runs = {file.parent.parent for file in folder.glob(f"{pattern}/checkpoints/step_*.ckpt")}
        if runs:
            ordered = sorted(runs, key=lambda run: (-run.stat().st_mtime, run))
            names = ", ".join(str(run.relative_to(folder)) for run in ordered[:5] if is_one_line(run))
            return f"; runs in it are {names}{f' and {len(runs) - 5} more' if len(runs) > 5 else ''}"
    return ""


def check_batch(state: Mapping[str, Any], args: Any, world_size: int) -> None:
    """Holds the steps per iteration against those of the run that is resumed: another number of ranks must keep them.

    Raises:
        CheckpointError: another number of ranks, and another number of steps per iteration.
    """
    stored = state["args"]["num_envs"] * state["args"].get("num_steps", 1) * state["world_size"]
    own = args.num_envs * getattr(args, "num_steps", 1) * world_size
    if stored == own:
        return
    change = (
        f"an iteration of the checkpoint has {stored} steps ({state['world_size']} ranks), here {own} ({world_size})"
    )
    if state["world_size"] != world_size:
        raise CheckpointError(
            f"{change}; keep them by --num-envs{' or --num-steps' if hasattr(args, 'num_steps') else ''}"
        )
    print(f"warning: {change}", file=sys.stderr)


@contextmanager
def reading(path: str | Path | None) -> Iterator[None]:
    """Turns errors in using a checkpoint's contents into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(f"{path}"):  # somebody has read within
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, ConfigError) as error:
        reason = " ".join(str(error).split("\n")[0].split())  # torch appends where it was in C++
        raise CheckpointError(f"{path} cannot be used: {type(error).__name__}: {reason}") from error


def restore(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Loads a state_dict into a module of exactly the same shape.

    Raises:
        CheckpointError: names the first parameter that is missing, unknown, of another shape, or not finite.
    """
    own = module.state_dict()
    for key in sorted(own.keys() | stored.keys()):
        ours, theirs = (tuple(d[key].shape) if key in d else "absent" for d in (own, stored))
        if ours != theirs:
            raise CheckpointError(
                f"does not fit this agent: {key} is {theirs} in the checkpoint and {ours} now; was it saved by a "
                "changed copy of the script, or before agent.py was changed?"
            )
        if own[key].is_floating_point() != stored[key].is_floating_point():
            raise CheckpointError(f"does not fit this agent: {key} is {stored[key].dtype} in it, {own[key].dtype} now")
        if not stored[key].isfinite().all():
            raise CheckpointError(f"{key} is not finite")
    module.load_state_dict(stored)


def _verify_shards(state: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError if what other ranks have stored with a checkpoint is not there or damaged."""
    with reading(path):
        for rank in shard_ranks(state):
            if rank == 0 and state.get("shard") is not None:
                continue
            file = _shard_file(state, path, rank)
            if file is None:
                raise CheckpointError(f"{path} comes without the replay buffer of rank {rank}")
            _verify(file)


def _write(path: Path, state: dict[str, Any]) -> None:
    """The sealed archive of `state`, complete under its name or absent. Raises OSError; no partial file stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # whoever the umask lets read it may
            writer = _HashingWriter(file)
            torch.save({"format": FORMAT, **state}, cast(BinaryIO, writer))
            file.seek(-len(_NO_COMMENT), os.SEEK_END)
            file.write((64).to_bytes(2, "little") + writer.digest.hexdigest().encode())
            file.flush()
            _sync(file.fileno(), path)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        with contextlib.suppress(OSError):  # a disk that has become read-only keeps it
            temporary.unlink(missing_ok=True)
        raise OSError(_cause(error)) from error


def _newest_good(candidates: list[Path]) -> tuple[dict[str, Any], Path]:
    problems, without_shards = [], []
    for candidate in candidates:
        try:
            state = _read(candidate)
            if state.get("format") == FORMAT and "args" in state:
                check_contents(state, candidate)
            without_shards.append((state, candidate))
            _verify_shards(state, candidate)
            return state, candidate
        except CheckpointError as error:
            problems.append(str(error))
            print(f"warning: {from_here(error)}; trying the one before it", file=sys.stderr)
    if without_shards:
        return without_shards[0]  # whether it can be used is for those who need them to say
    raise CheckpointError(f"no checkpoint can be read in {candidates[0].parent}: {problems[0]}")


def _read(path: Path) -> dict[str, Any]:
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # a buffer may be large
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler objects to: its text names the forbidden global
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} holds something other than tensors and plain values: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint of fabricrl")
    return state


def _verify(path: Path) -> None:
    """Compares the archive with the digest in its comment, in pieces of 1 MiB."""
    size = path.stat().st_size
    if size <= _SEAL:
        raise CheckpointError(f"{path} is {'empty' if not size else 'truncated'}: {size} bytes")
    digest, left = hashlib.sha256(), size - _SEAL
    with path.open("rb") as file:
        while left:
            piece = file.read(min(left, 1 << 20))
            digest.update(piece)
            left -= len(piece)
        seal = file.read()
    if seal[:2] != (64).to_bytes(2, "little"):
        raise CheckpointError(f"{path} is truncated, or was not written by fabricrl: it does not end in its checksum")
    digest.update(_NO_COMMENT)
    if digest.hexdigest().encode() != seal[2:]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the one stored with it")


def _link(path: Path, link: Path) -> None:
    """A second name for the same file, replaced atomically; a copy where the file system has no hard links."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
        with temporary.open("rb+") as file:
            _sync(file.fileno(), path)
    os.replace(temporary, link)


def _sync(descriptor: int, path: Path) -> None:
    """Forces a file to disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        go_without("fsync", path, "a crash of this machine may take the newest checkpoint")


def _sync_folder(folder: Path) -> None:
    """Forces the entries of a folder to disk, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in LACKING | {errno.EACCES}:  # a folder that may be written but not read cannot be opened
            raise
        go_without("fsync of a folder", folder, "a crash of this machine may take the newest checkpoint")


def go_without(call: str, path: Path, loss: str) -> None:
    """Warns once per run and call that the file system lacks it, and of the loss."""
    first = not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )
    if call not in _told and first:
        print(f"warning: the file system of {from_here(path)} has no {call}: {loss}", file=sys.stderr, flush=True)
    _told.add(call)


def _cause(error: BaseException) -> str:
    """The operating system's reason, also where torch has wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]
