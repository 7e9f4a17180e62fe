"""Arguments of recurrent PPO: those of PPO, and the memory's."""

from dataclasses import dataclass
from typing import Literal

from fabricrl.algos.args import arg
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.models.recurrent import CORES
from fabricrl.utils.utils import require

__all__ = ["PRESETS", "RecurrentPPOArgs"]


@dataclass(frozen=True)
class RecurrentPPOArgs(PPOArgs):
    """PPO's names; the presets are PPO's, too."""

    num_envs: int = arg(8, "environments per rank")
    hidden_sizes: tuple[int, ...] = arg(
        (64,), "widths of the layers after the core, of actor and critic; none: linear", "networks"
    )
    rnn_type: Literal["lstm", "gru"] = arg("lstm", "kind of the recurrent core", "memory")
    rnn_hidden_size: int = arg(64, "width of the core")
    rnn_layers: int = arg(1, "layers of the core")
    shared_core: bool = arg(False, "one core for actor and critic, in place of one each")
    encoder_sizes: tuple[int, ...] = arg((), "widths of the layers before the core; none: it takes the observation")
    prev_action: bool = arg(False, "tell the core the action before, discrete ones as one-hot")
    prev_reward: bool = arg(False, "tell the core the reward before, as the environment gave it")
    sequence_length: int = arg(128, "longest sequence of steps that gradients flow through")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rnn_hidden_size", "rnn_layers", "sequence_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        require(
            all(size >= 1 for size in self.encoder_sizes), "encoder_sizes", self.encoder_sizes, "integers of at least 1"
        )
        require(self.rnn_type in CORES, "rnn_type", self.rnn_type, f"one of {', '.join(CORES)}")
