"""Transfer to and from the Hugging Face Hub, by its package, which the extra `hub` brings."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fabricrl.utils.ending import one_line
from fabricrl.utils.errors import CheckpointError, ConfigError, OutputError
from fabricrl.utils.extras import missing

SOURCE = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/\s@]+))?"
    r"(?:/(?P<file>[^\s@]+))?",
    re.ASCII,
)
STEPS = "checkpoints/step_*.ckpt"
MOST_NAMED = 96  # characters of a repository's name


def is_installed() -> bool:
    """True if there is the package that talks to the Hub."""
    return importlib.util.find_spec("huggingface_hub") is not None


def is_on_hub(source: str | Path | None) -> bool:
    """True if a checkpoint is named by where it lies on the Hub: `hf://me/repo`, `hf://me/repo@revision/file`."""
    return isinstance(source, str) and source.startswith("hf://")


def fetch(source: str) -> Path:
    """Downloads a repository's newest checkpoints into the Hub's cache, or one file of it.

    What the cache holds already is not downloaded again, and serves where the Hub cannot be reached.

    Returns the folder that stands for the run's, or the file.

    Raises:
        ConfigError: `source` is not written as it should be, or the package is missing.
        CheckpointError: there is no such repository, revision or file, or the Hub lets this user not read it, or it
            cannot be reached.
    """
    if (match := SOURCE.fullmatch(source)) is None:
        raise ConfigError(f"{source!r} must be hf://user/repository, perhaps with @revision and /file behind it")
    if not is_installed():
        raise missing(source, "hub")
    import huggingface_hub as hub

    repository, revision, file = match.group("repository", "revision", "file")
    try:
        with _quiet():
            if file is not None:
                return Path(hub.hf_hub_download(repository, file, revision=revision))
            folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[STEPS]))
    except Exception as error:  # whatever the package, or what it stands on, raises
        raise CheckpointError(f"{source} cannot be loaded: {_reason(error)}") from error
    if not any(folder.glob(STEPS)):
        raise CheckpointError(f"{source} has no {STEPS}")
    return folder


def create(name: str, owner: str | None) -> str:
    """Makes a repository for a model, unless it exists, and returns its name with that of its owner.

    Args:
        owner: a user or an organisation; None: the owner of the token.

    Raises:
        OutputError: the Hub cannot be reached, or does not let this user.
    """
    import huggingface_hub as hub

    try:
        return hub.HfApi().create_repo(f"{owner}/{name}" if owner else name, exist_ok=True).repo_id
    except Exception as error:  # as above
        raise OutputError(_reason(error)) from error


def send(folder: Path, repository: str) -> str:
    """Uploads a folder in place of what the repository has under `checkpoints`, and returns the address of its page.

    Raises:
        OutputError: the Hub cannot be reached, or does not let this user.
    """
    import huggingface_hub as hub

    try:
        api: Any = hub.HfApi()
        message = "Upload a run of fabricrl"
        with _quiet():
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, delete_patterns="checkpoints/*"
            )
    except Exception as error:  # as above
        raise OutputError(_reason(error)) from error
    return f"{api.endpoint}/{repository}"


def repository_name(*parts: str) -> str:
    """Joins parts to a name that the Hub allows; of one that is too long the beginning and the end stay."""
    name = re.sub(r"[^\w.]+", "-", "-".join(parts), flags=re.ASCII)
    name = re.sub(r"[.-]{2,}", "-", name).strip(".-")
    return name if len(name) <= MOST_NAMED else f"{name[: MOST_NAMED - 20].rstrip('.-')}-{name[-19:].lstrip('.-')}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the package's warnings, and its progress bars where there is no terminal."""
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    hides = not (sys.stderr.isatty() or utils.are_progress_bars_disabled())
    utils.logging.set_verbosity_error()
    if hides:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if hides:
            utils.enable_progress_bars()


def _reason(error: Exception) -> str:
    """The reason of the Hub's package, in one line."""
    from huggingface_hub import utils

    if isinstance(error, utils.GatedRepoError):
        return "its owner has not let you in; ask on its page, and log in by: hf auth login"
    if isinstance(error, utils.RepositoryNotFoundError):
        return "there is no such repository, or it is private; log in by: hf auth login"
    if isinstance(error, utils.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, utils.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and this machine has no copy"
    if isinstance(error, utils.EntryNotFoundError):
        return "the repository has no such file"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub does not let you ({status}); log in by: hf auth login"
    return f"{type(error).__name__}: {one_line(error)}"
