"""Episodes under way in environments that are tensors."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fabricrl.data import DeviceRolloutBuffer
from fabricrl.envs.tensors import TensorEnvs
from fabricrl.utils.device import to_host
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.metric import DeviceEpisodes
from fabricrl.utils.ranks import all_gather


class Underway:
    """Episodes under way in this rank's environments: counted on their device, and part of a checkpoint.

    Args:
        envs: environments, of which some tell their state.

    Attributes:
        envs: the same.
    """

    def __init__(self, fabric: Fabric, envs: TensorEnvs, num_envs: int) -> None:
        self._fabric, self.envs = fabric, envs
        self._episodes = DeviceEpisodes(num_envs, fabric.device)

    def summary(self, rb: DeviceRolloutBuffer) -> Tensor:
        """The episodes that have ended in a rollout, as `DeviceEpisodes.summary` tells of them, on the CPU.

        Raises:
            NonFiniteError: an environment has brought NaN or infinity.
        """
        summary = self._episodes.summary(rb.rewards, rb.ends, rb.skipped, rb.episode_infos)
        summary, finite = to_host(summary, rb.is_finite())
        if not finite:
            raise NonFiniteError(str(rb.find_nonfinite()))
        return summary

    def state_dict(self, obs: Tensor, normalizer: Any, rng: torch.Generator | None) -> dict[str, Any]:
        """The state of environments on all ranks, and of what counts along with them; {} if they tell none.

        Args:
            obs: their last observations, [N, D].
            normalizer: of rewards, if the agent has one; rng: the generator on their device, if there is one.

        Returns:
            each tensor [W, ...], and the kind of their device.
        """
        state = self.envs.state_dict()
        if state is None:
            return {}
        state |= {"obs": obs, "returns": self._episodes.returns, "lengths": self._episodes.lengths}
        if normalizer is not None:
            state["discounted"] = normalizer.discounted
        if rng is not None:
            state["device_rng"] = rng.get_state()
        gathered = {name: all_gather(self._fabric, values.cpu()) for name, values in state.items()}
        return gathered | {"device": self._fabric.device.type}

    def load_state_dict(
        self, state: dict[str, Any], obs: Tensor, normalizer: Any, rng: torch.Generator | None
    ) -> Tensor:
        """Goes on where another run has saved its environments; returns their observations [N, D].

        New episodes begin, with `obs`, where those were others, or on another kind of device.
        """
        rank = self._fabric.global_rank
        fits = state["device"] == obs.device.type and rank < len(state["obs"]) and state["obs"][rank].shape == obs.shape
        if not fits:
            return obs
        # Clones, since a generator reads its state from the beginning of the storage
        own = {name: value[rank].clone() for name, value in state.items() if name != "device"}
        self.envs.load_state_dict(own)
        self._episodes.returns.copy_(own["returns"])
        self._episodes.lengths.copy_(own["lengths"])
        if normalizer is not None:
            normalizer.discounted = own["discounted"].to(obs.device)
        if rng is not None:
            rng.set_state(own["device_rng"])
        return own["obs"].to(obs.device)
