"""Arguments of DroQ."""

from dataclasses import dataclass

from fabricrl.algos.args import arg, require_between
from fabricrl.algos.sac.args import OffPolicyArgs


@dataclass(frozen=True)
class DroQArgs(OffPolicyArgs):
    """SAC's arguments with many critic updates per step, and what regularises the critics."""

    replay_ratio: float = arg(20.0, "critic updates per environment step, over all environments and ranks")
    dropout: float = arg(0.01, "share of the critics' hidden units that each update drops", "networks")
    layer_norm: bool = arg(True, "normalise the critics' hidden layers")
    q_lr: float = arg(3e-4, "Adam's learning rate for the critics")
    # As Smith et al. 2022 (arXiv:2208.07860). The authors' code starts from 1, from where one update a step takes
    # thousands of steps to come down: HalfCheetah-v4 was at -32 after 8 000 steps with 1, at 1 167 with 0.1
    alpha: float = arg(0.1, "entropy temperature: the first one if --autotune, else the only one")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, 0, 0.99, "dropout")
