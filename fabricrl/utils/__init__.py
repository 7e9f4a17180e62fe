"""The parts of these modules that scripts use, imported on first use.

Environment processes import `fabricrl.utils.errors`, and start much faster without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabricrl.utils.model import frozen, polyak_update
    from fabricrl.utils.optimizer import Adam, anneal, average_gradients
    from fabricrl.utils.returns import explained_variance, gae

__all__ = ["Adam", "anneal", "average_gradients", "explained_variance", "frozen", "gae", "polyak_update"]

MODULES = {"Adam": "optimizer", "anneal": "optimizer", "average_gradients": "optimizer"}
MODULES |= {"frozen": "model", "polyak_update": "model", "explained_variance": "returns", "gae": "returns"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
