"""Building the environments of a rank from the arguments of a script."""

from fabricrl.envs.vector import check_env, make_env, make_envs

__all__ = ["check_env", "make_env", "make_envs"]
