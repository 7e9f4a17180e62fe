"""Simulators that step thousands of environments at once, as `--vectorization torch` takes them.

An id is the simulator's name and its own id of the task: `playground/CartpoleBalance`, `maniskill/PickCube-v1`,
`isaaclab/Isaac-Cartpole`. Each is a page here; none is imported, nor has to be installed, before a run asks for it.
Environments that are registered with Gymnasium as JAX's, such as `phys2d/CartPole-v1`, keep their ids.
"""

import difflib
import os
from collections.abc import Iterable

import gymnasium as gym

from fabricrl.utils.errors import ConfigError
from fabricrl.utils.extras import pip_install

# The command that installs each
SIMULATORS = {
    "playground": pip_install("playground"),
    "maniskill": pip_install("maniskill"),
    "isaaclab": "pip install 'isaaclab>=3'",  # which names a release of PyTorch, and can be no extra
}

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the GPU's memory


def simulator_of(env_id: str) -> str:
    """Name of the simulator that an id belongs to, or ""."""
    name, slash, task = env_id.partition("/")
    return name if slash and task and name in SIMULATORS else ""


def register(env_id: str) -> None:
    """Registers an id with Gymnasium, if it is a simulator's and not yet there."""
    if (name := simulator_of(env_id)) and env_id not in gym.registry:
        task = env_id.removeprefix(f"{name}/")
        gym.register(env_id, vector_entry_point=f"{__name__}.{name}:make", kwargs={"task": task})


def unknown(env_id: str, tasks: Iterable[str]) -> ConfigError:
    """The error that says that a simulator has no such task, and which of its tasks are called alike."""
    name, _, task = env_id.partition("/")
    close = ", ".join(f"{name}/{one}" for one in difflib.get_close_matches(task, list(tasks), n=3, cutoff=0.6))
    return ConfigError(f"--env-id {env_id} is not known to {name}{f'; did you mean {close}?' if close else ''}")
