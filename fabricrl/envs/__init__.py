"""Building the environments of a rank from the arguments of a script."""

import fabricrl.envs.torch  # noqa: F401  (which registers our own)
from fabricrl.envs.spaces import env_actions, rescale_actions
from fabricrl.envs.vector import check_env, make_env, make_envs

__all__ = ["check_env", "env_actions", "make_env", "make_envs", "rescale_actions"]
