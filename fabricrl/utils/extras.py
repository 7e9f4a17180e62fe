"""Optional packages, which extras bring, and the command that installs one."""

import importlib.util
from pathlib import Path

from fabricrl.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]  # of a checkout, or the folder that installed packages are in


def pip_install(extra: str) -> str:
    """Returns the command that installs an extra, of this checkout or of the installed package."""
    source = f"-e '.[{extra}]'" if (ROOT / "pyproject.toml").exists() else f"'fabricrl[{extra}]'"
    return f"pip install {source}"


def missing(what: str, extra: str) -> ConfigError:
    """Returns the error that says which command installs what `what` needs."""
    return ConfigError(f"{what} needs a package that is not installed: {pip_install(extra)}")


def require_opencv(what: str, extra: str = "images") -> None:
    """Raises ConfigError, with the command, unless OpenCV is installed."""
    if importlib.util.find_spec("cv2") is None:
        raise missing(what, extra)
