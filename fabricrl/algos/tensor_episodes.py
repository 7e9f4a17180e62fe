"""Running episodes of tensor environments."""

import sys
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.data import DeviceRolloutBuffer, TensorReplayBuffer
from fabricrl.envs.tensors import TensorEnvs
from fabricrl.utils.device import to_host
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.metric import DeviceEpisodes
from fabricrl.utils.ranks import all_gather

MAX_STEPS = 128  # steps whose episodes are counted in one go, at most
Storage = DeviceRolloutBuffer | TensorReplayBuffer


class TensorEpisodes:
    """Running episodes of this rank's tensor environments: counted on their device, and saved in checkpoints.

    Args:
        envs: environments, of which some tell their state.
        num_keys: numbers that they tell at the ends of episodes.

    Attributes:
        envs: the same.
        episodes: where a rollout is a single step, keeps each.
    """

    def __init__(self, fabric: Fabric, envs: TensorEnvs, num_envs: int, num_keys: int) -> None:
        self._fabric, self.envs = fabric, envs
        self.episodes = DeviceEpisodes(num_envs, fabric.device, num_keys, MAX_STEPS)
        self._kept = 0  # steps

    def tensors(self) -> list[Tensor]:
        """All that a step changes, besides what it stores."""
        return [*self.envs.tensors(), *self.episodes.tensors()]

    def count_step(self) -> bool:
        """Counts a step that `episodes` has kept; True if no other can be kept before `take_summary` is called."""
        self._kept += 1
        return self._kept == MAX_STEPS

    def take_summary(self, rb: TensorReplayBuffer) -> Tensor:
        """The episodes that have ended since the last call, as `DeviceEpisodes.summary` tells of them, on the CPU.

        Raises:
            NonFiniteError: an environment has brought NaN or infinity.
        """
        steps, self._kept = self._kept, 0
        return self._finite(self.episodes.take_summary(steps), rb)

    def summary(self, rb: DeviceRolloutBuffer) -> Tensor:
        """The episodes that have ended in a rollout, as `DeviceEpisodes.summary` tells of them, on the CPU.

        Raises:
            NonFiniteError: an environment has brought NaN or infinity.
        """
        return self._finite(self.episodes.summary(rb.rewards, rb.ends, rb.skipped, rb.episode_infos), rb)

    def _finite(self, summary: Tensor, rb: Storage) -> Tensor:
        summary, finite = to_host(summary, rb.is_finite())
        if not finite:
            raise NonFiniteError(str(rb.find_nonfinite()))
        return summary

    def state_dict(self, rb: Storage, normalizer: Any, rng: torch.Generator | None) -> dict[str, Any]:
        """The state of environments on all ranks, and of what counts along with them; {} if they tell none.

        Args:
            rb: where they store what they return, and end with their last observations.
            normalizer: of rewards, if the agent has one; rng: the generator on their device, if there is one.

        Returns:
            each tensor [W, ...], and the kind of their device.
        """
        state = self.envs.state_dict()
        if state is None:
            return {}
        state |= rb.running() | {"returns": self.episodes.returns, "lengths": self.episodes.lengths}
        if normalizer is not None:
            state["discounted"] = normalizer.discounted
        if rng is not None:
            state["device_rng"] = rng.get_state()
        gathered = {name: all_gather(self._fabric, values.cpu()) for name, values in state.items()}
        return gathered | {"device": self._fabric.device.type}

    def load_state_dict(self, state: dict[str, Any], rb: Storage, normalizer: Any, rng: torch.Generator | None) -> bool:
        """Goes on where another run has saved its environments, and ended `rb`; whether it does.

        New episodes begin on ranks that were not there, and where environments of a rank were others, or on another
        kind of device. Rank 0 says so.
        """
        rank, ranks, obs = self._fabric.global_rank, self._fabric.world_size, rb.running()["obs"]
        fits = state["device"] == obs.device.type and state["obs"].shape[1:] == obs.shape
        going_on = min(len(state["obs"]), ranks) if fits else 0
        if rank == 0 and going_on < ranks:
            text = f"they continue on {going_on} of {ranks} ranks; the others start new ones"
            print(f"episodes: {text if going_on else 'all start anew'}", file=sys.stderr, flush=True)
        if rank >= going_on:
            return False
        # Clones, since a generator reads its state from the beginning of the storage
        own = {name: value[rank].clone() for name, value in state.items() if name != "device"}
        self.envs.load_state_dict(own)
        rb.go_on(own)
        self.episodes.returns.copy_(own["returns"])
        self.episodes.lengths.copy_(own["lengths"])
        if normalizer is not None:
            normalizer.discounted = own["discounted"].to(obs.device)
        if rng is not None:
            rng.set_state(own["device_rng"])
        return True
