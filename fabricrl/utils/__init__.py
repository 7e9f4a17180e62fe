"""The parts of these modules that scripts use."""

from fabricrl.utils.model import frozen, polyak_update
from fabricrl.utils.optimizer import Adam, average_gradients
from fabricrl.utils.utils import anneal, explained_variance, gae

__all__ = ["Adam", "anneal", "average_gradients", "explained_variance", "frozen", "gae", "polyak_update"]
