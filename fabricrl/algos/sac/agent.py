"""Actor, critics, target critics and temperature of SAC: a plain module that knows neither Fabric nor environments."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from fabricrl.models.augmentation import shift_images
from fabricrl.models.distributions import TanhNormalHead
from fabricrl.models.models import MLP, EnsembleMLP, RecordEncoder, make_encoder, make_normalizer, normalized
from fabricrl.utils.batch import Batch
from fabricrl.utils.records import Records

ACTION_SPACES = (Box,)


class EncodedCritics(nn.Module):
    """An ensemble of critics over an encoder of images, which they alone train: [C, B].

    It takes observations, records of bytes [B, ...]; or features [B, F] where these are encoded already.
    """

    def __init__(self, encoder: RecordEncoder, ensemble: EnsembleMLP) -> None:
        super().__init__()
        self.encoder, self.ensemble = encoder, ensemble

    def forward(self, obs: Tensor, actions: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        features = self.encoder(obs) if obs.dtype == torch.uint8 else obs
        return self.ensemble(features, actions, kept=kept)


class SACAgent(nn.Module):
    """A squashed normal policy and an ensemble of critics over vector observations, or over encoded images.

        obs [*, D] → (normalise) → features             records [*, R] or [*, S, R] → (normalise) → encoder → features
        actor:   features [*, F] → MLP → μ, log σ → tanh(μ + σ ε): actions [*, A] in (−1, 1)
        critics: obs, actions [B, A] → features → ensemble of C → Q values [C, B]

    `actor` and `critics` are what learning evaluates. The encoder belongs to the critics, whose loss alone trains it;
    the actor takes its features as they are, and the target critics have an encoder of their own (Yarats et al. 2019,
    arXiv:1910.01741). Critics take observations as `prepare` returns them, the actor `features` of these.

    Args:
        obs_space: of one environment, vectors [D] or records of bytes.
        num_actions: A.
        alpha: initial temperature; learned if `autotune`, else fixed, even against a checkpoint's.
        target_entropy: that the temperature aims at; None: −A.
        norm_obs: normalise observations by running statistics; else `obs_normalizer` is None.
        frame_stack: S; random_shift: pixels by which images in batches of replay are moved at most.
        dropout, layer_norm: of the critics and their targets (DroQ).
    """

    def __init__(
        self,
        obs_space: Box,
        num_actions: int,
        hidden_sizes: Sequence[int] = (256, 256),
        activation: str = "relu",
        num_critics: int = 2,
        alpha: float = 1.0,
        autotune: bool = True,
        target_entropy: float | None = None,
        norm_obs: bool = False,
        frame_stack: int = 1,
        cnn_features: int = 50,
        random_shift: int = 4,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.head = TanhNormalHead(num_actions)
        encoder = make_encoder(obs_space, frame_stack, cnn_features, layer_norm=True)
        size = obs_space.shape[0] if encoder is None else encoder.num_features  # F
        self.obs_space, self.frame_stack, self.random_shift = obs_space, frame_stack, random_shift
        self.obs_shape = (frame_stack, *obs_space.shape) if frame_stack > 1 else obs_space.shape
        self.obs_dtype = torch.float32 if encoder is None else torch.uint8
        self.actor = MLP(size, self.head.size, hidden_sizes, activation)
        critics = EnsembleMLP(num_critics, size + num_actions, hidden_sizes, activation, dropout, layer_norm)
        self.critics: Any = critics if encoder is None else EncodedCritics(encoder, critics)
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)), requires_grad=autotune)
        self.target_entropy = -float(num_actions) if target_entropy is None else target_entropy
        self.obs_normalizer = make_normalizer(obs_space) if norm_obs else None

    @property
    def encoder(self) -> RecordEncoder | None:
        """The critics' encoder; None if observations are vectors."""
        return self.critics.encoder if isinstance(self.critics, EncodedCritics) else None

    @property
    def ensemble(self) -> EnsembleMLP:
        """The critics without their encoder."""
        return self.critics.ensemble if isinstance(self.critics, EncodedCritics) else self.critics

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes parameters and statistics, but for a fixed temperature: that is an argument."""
        kept = {} if self.log_alpha.requires_grad else {"log_alpha": self.log_alpha.detach()}
        return super().load_state_dict({**state_dict, **kept}, strict, assign)

    def prepare(self, obs: Tensor) -> Tensor:
        """Observations as the networks take them: vectors as real numbers, normalised; records of bytes."""
        if self.obs_normalizer is not None:
            return normalized(self.obs_normalizer, obs)
        return obs.float() if self.encoder is None else obs

    def prepare_batches(self, batches: Batch, generator: torch.Generator) -> Batch:
        """Prepares the observations of replay batches [K, B, ...], and shifts their images at random (DrQ)."""
        columns = {name: self.prepare(batches.columns[name]) for name in ("obs", "next_obs")}
        if isinstance(self.obs_space, Records) and self.random_shift > 0:
            for name, obs in columns.items():
                rows = shift_images(obs.flatten(0, 1), self.obs_space, self.random_shift, generator)  # [K B, ...]
                columns[name] = rows.view(obs.shape)
        return batches.with_columns(**columns)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Prepared observations as the actor takes them, [*, F]: what trains the encoder is not its loss."""
        return inputs if self.encoder is None else self.encoder(inputs)

    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Draws actions [N, A] at raw observations [N, ...]. Only what acting needs."""
        return self.head.sample(self.actor(self.features(self.prepare(obs))), noise)

    def greedy(self, obs: Tensor) -> Tensor:
        """The actions without noise, [N, A], at raw observations [N, ...]."""
        return self.head.mode(self.actor(self.features(self.prepare(obs))))

    @property
    def alpha(self) -> Tensor:
        """The temperature, a scalar without gradient."""
        return self.log_alpha.detach().exp()


def make_agent(args: Any, envs: Any, kind: type[SACAgent] = SACAgent, **more: Any) -> SACAgent:
    """The agent that `args` describe, for these environments; `more` is what its `kind` needs besides."""
    return kind(
        envs.single_observation_space,
        int(np.prod(envs.single_action_space.shape)),
        args.hidden_sizes,
        args.activation,
        args.num_critics,
        args.alpha,
        args.autotune,
        args.target_entropy,
        args.norm_obs,
        args.frame_stack,
        args.cnn_features,
        args.random_shift,
        **more,
    )
