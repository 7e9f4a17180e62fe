"""Names that policy.py and export.py look for, of DroQ."""

from fabricrl.algos.droq.agent import ACTION_SPACES, make_agent
from fabricrl.algos.sac.utils import env_actions, make_policy

__all__ = ["ACTION_SPACES", "env_actions", "make_agent", "make_policy"]
