"""fabricrl: reinforcement learning on PyTorch and Lightning Fabric, one readable script per algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fabricrl.policy import Policy

__version__ = "0.1.0"
__all__ = ["load"]


def load(source: str | Path, deterministic: bool = True, seed: int = 10_000) -> Policy:
    """Loads the policy of a checkpoint, or of a run's newest.

    Args:
        source: a checkpoint, or a run's folder; or where one lies on the Hugging Face Hub: `hf://user/repository`,
            perhaps with `@revision` and a file's name behind it, `hf://me/repo@v1/checkpoints/best.ckpt`.
        deterministic: take the most likely actions; False: draw them.
        seed: of what is drawn; `evaluate.py --seed` draws alike.

    Raises:
        CheckpointError: there is none, or it is damaged, or made by an algorithm that is not here.
        ConfigError: `hf://…` is not written as it should be, or needs the extra `hub`.
        ConfigError, EnvError: it is of an earlier version, which asks for the environment, and that cannot be had.
    """
    from fabricrl import policy  # here, as it brings torch, which takes seconds

    return policy.load(source, deterministic, seed)
