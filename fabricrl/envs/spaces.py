"""Checks of observation and action spaces, and conversion of actions for the environment."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, flatdim

from fabricrl.utils.errors import ConfigError, NonFiniteError

SMALLEST_IMAGE = 36  # pixels a side; NatureCNN's three layers need as many
MOST_NUMBERS = 50_000_000  # of an observation or action
LARGEST_GRID = 16  # pixels a side from which an array with channels counts as an image
VECTOR_SPACES = (Box, Discrete, MultiDiscrete, MultiBinary)
SUPPORTED = "supported are Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"


class Spaces(NamedTuple):
    """Spaces of one environment.

    Attributes:
        obs: of the rows that agents take.
        actions: as the environment has them.
        mask_size: S, of masks over actions; 0 if there are none.
        given: of observations as the environment gives them, an Atari game as AtariPreprocessing does.
    """

    obs: Any
    actions: Any
    mask_size: int
    given: Any


def check_observation_space(space: Space, images: bool = True) -> None:
    """Raises ConfigError unless the space is a Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of these.

    `values.Observation` has flattened nested Dicts and Tuples before. `images`: allow images.
    """
    _check_origin("observation", space)
    if not images and (found := image_keys(space)):
        what = f"its part {found[0]!r} is an image" if found[0] else "it is an image"
        raise ConfigError(
            f"observation space {text_of(space)} is not supported: {what}, which this algorithm does not take"
        )
    if isinstance(space, Dict):
        good = [str(key) for key, part in space.spaces.items() if isinstance(part, VECTOR_SPACES)]
        advice = f"--obs-keys {' '.join(good)} leaves it out" if good else SUPPORTED
        for key, part in space.spaces.items():
            if not isinstance(part, VECTOR_SPACES):
                raise ConfigError(f"observation space {space} has an unsupported part {key!r}: {part}; {advice}")
    elif not isinstance(space, VECTOR_SPACES):
        raise ConfigError(f"observation space {space} is not supported; {SUPPORTED}")
    _check_size("observation", space)


def check_action_space(space: Space, supported: tuple[type[Space], ...]) -> None:
    """Raises ConfigError unless the space is one of `supported`, and, if a Box, one of real numbers."""
    _check_origin("action", space)
    if not isinstance(space, supported):
        names = ", ".join(kind.__name__ for kind in supported)
        other = "; ppo takes it" if isinstance(space, Discrete | MultiDiscrete | MultiBinary) else ""
        raise ConfigError(f"action space {space} is not supported: this algorithm takes {names}{other}")
    _check_size("action", space)
    if isinstance(space, Box) and not np.issubdtype(space.dtype, np.floating):
        raise ConfigError(f"action space {space} is not supported: a Box must be of real numbers, not {space.dtype}")


def _check_size(what: str, space: Space) -> None:
    """Raises ConfigError if the space is empty, or a network could have no input or output for each of its numbers."""
    if not (size := flatdim(space)):
        raise ConfigError(f"{what} space {space} is empty")
    if size > MOST_NUMBERS:
        text = text_of(space)
        text = text if len(text) < 200 else f"{text[:200]}..."
        raise ConfigError(f"{what} space {text} has {size} numbers, discrete ones as one-hot: at most {MOST_NUMBERS}")


def _check_origin(what: str, space: Any) -> None:
    """Raises ConfigError unless the space is Gymnasium's; older environments may still use gym's."""
    if not isinstance(space, Space):
        kind = type(space)
        raise ConfigError(
            f"{what} space {text_of(space)} is a {kind.__module__}.{kind.__name__}, none of Gymnasium's: "
            "`import gymnasium as gym` where the environment imports gym"
        )


def check_bounded(space: Space) -> None:
    """Raises ConfigError unless every number of a Box action space has a lower and an upper bound, one below the other.

    The actions of a squashed policy are rescaled to these bounds.
    """
    assert isinstance(space, Box)
    if not (space.is_bounded() and (space.low < space.high).all()):
        raise ConfigError(
            f"action space {space} is not supported: this algorithm needs a Box with finite bounds, low below high"
        )


def is_flat(space: Space) -> bool:
    """Returns True if observations are vectors of numbers already."""
    return isinstance(space, Box) and len(space.shape) == 1


def is_text(space: Space) -> bool:
    """Returns True if observations are text: a Text space, or any space of dtype str, such as minigrid's missions."""
    return isinstance(space, Space) and space.dtype is not None and space.dtype.kind == "U"


def is_image(space: Space) -> bool:
    """Returns True if observations are images: uint8, two sides of 36 or more, or of 16 or more with a channel axis.

    Images below 36 must be enlarged. Arrays below 16 are the grids of games, and treated as vectors.
    """
    if not (isinstance(space, Box) and space.dtype == np.uint8):
        return False
    if len(space.shape) == 3:
        return sorted(space.shape)[1] >= LARGEST_GRID
    return len(space.shape) == 2 and min(space.shape) >= SMALLEST_IMAGE


def image_keys(space: Space) -> list[str]:
    """Keys of the images in a flat Dict; [""] if the space itself is an image."""
    if isinstance(space, Dict):
        return [key for key, part in space.spaces.items() if is_image(part)]
    return [""] if is_image(space) else []


def odd_images(space: Space) -> list[str]:
    """Warnings about observations that look like images but are treated as vectors."""
    parts = space.spaces if isinstance(space, Dict) else {"": space}
    return [
        f"observation {key!r} {part.dtype} {part.shape}".replace(" ''", "")
        + " is taken as a vector: images are uint8, with two sides and channels"
        for key, part in parts.items()
        if isinstance(part, Box)
        and len(part.shape) > 2
        and sorted(part.shape)[-2] >= SMALLEST_IMAGE
        and not is_image(part)
    ]


def left_out_texts(names: list[Any], space: Space) -> list[str]:
    """Notices about text that `space` leaves out."""
    if not names:
        return []
    keys = " ".join(map(str, space.spaces)) if isinstance(space, Dict) else ""
    which = ", ".join(repr(name) for name in names)
    return [f"notice: text in observations is left out ({which}); --obs-keys {keys} silences this"]


def mask_choices(space: Space) -> list[int]:
    """The parts of a mask over a single action space: how many entries there are for each variable.

    A mask has one entry for each choice, True where it is allowed, as sb3-contrib has them: all choices of a variable,
    then those of the next; of a bit first 0, then 1. Spaces that cannot be masked have none.
    """
    if isinstance(space, Discrete):
        return [int(space.n)]
    if isinstance(space, MultiDiscrete):
        return [int(n) for n in space.nvec.reshape(-1)]
    return [2] * int(np.prod(space.shape)) if isinstance(space, MultiBinary) else []


def env_actions(space: Space, actions: np.ndarray) -> np.ndarray:
    """Converts actions [N, A] of a policy to those that `envs.step` takes; `space` is a single environment's.

    Discrete and MultiDiscrete policies count from zero, whatever the space's start. Box actions are clipped to the
    bounds here and nowhere else: buffers and losses keep what was drawn. Tensor environments do the same for
    themselves (`envs/tensors.py`).
    """
    if not isinstance(actions, np.ndarray):
        return actions
    if isinstance(space, Discrete):
        return actions[:, 0] + space.start
    if isinstance(space, MultiDiscrete):
        return actions.reshape(-1, *space.shape) + space.start
    if isinstance(space, MultiBinary):
        return actions.reshape(-1, *space.shape).astype(space.dtype)
    if isinstance(space, Box):
        _check_finite(actions)
        return actions.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype, copy=False)
    raise TypeError(f"no actions for {space}")


def _check_finite(actions: np.ndarray) -> None:
    if np.count_nonzero(np.isfinite(actions)) != actions.size:  # .all() takes twice as long
        raise NonFiniteError("the policy's actions are not finite")


def rescale_actions(space: Box, actions: np.ndarray) -> np.ndarray:
    """Rescales actions [N, A] from [−1, 1] to the bounds of the space, as `envs.step` takes them.

    Tensor environments do that for themselves, as with `env_actions`.
    """
    if not isinstance(actions, np.ndarray):
        return actions
    _check_finite(actions)
    share = (actions.astype(np.float64).reshape(-1, *space.shape) + 1) / 2
    return np.clip((1 - share) * space.low + share * space.high, space.low, space.high).astype(space.dtype)


def text_of(space: Any) -> str:
    """A space in one line."""
    return " ".join(str(space).split())
