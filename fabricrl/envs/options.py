"""Arguments that say how an environment is built, with their defaults."""

from typing import Any

# Values of arguments that an algorithm, or an older checkpoint, does not have
DEFAULTS: dict[str, Any] = {
    "obs_keys": (),
    "mask_velocities": False,
    "action_repeat": 1,
    "noop_max": 0,
    "life_loss": False,
    "grayscale": False,
    "resize": None,
    "frame_stack": 1,
    "capture_video": False,
}
TIMEOUT = 10.0  # minutes for a call of an environment; 0: no limit


def option(args: Any, name: str) -> Any:
    """Value of an environment argument, or its default if `args` does not have it."""
    return getattr(args, name, TIMEOUT if name == "timeout" else DEFAULTS[name])
