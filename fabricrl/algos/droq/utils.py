"""Names that evaluate.py looks for, of DroQ."""

from fabricrl.algos.droq.agent import ACTION_SPACES, make_agent
from fabricrl.algos.sac.utils import make_policy

__all__ = ["ACTION_SPACES", "make_agent", "make_policy"]  # what evaluate.py looks for
