"""What trains an agent of SAC or DroQ: losses as modules for DDP and `--compile`, optimizers, targets.

Shapes: D observation size, A action size, C critics, B rows of a batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import OffPolicyArgs
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.utils.checkpoint import restore_optimizer
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.model import AsIs, FlatParameters

CRITIC_TAGS = ("losses/qf_loss", "losses/qf_values")
ACTOR_TAGS = ("losses/actor_loss", "losses/alpha_loss", "losses/entropy", "losses/alpha")
CHECK_EVERY = 1000  # updates


class CriticObjective(nn.Module):
    """J_Q. What DDP wraps and `--compile` compiles: its forward is the critics' one gradient path."""

    def __init__(self, agent: SACAgent) -> None:
        super().__init__()
        self.critics = agent.critics

    def forward(self, batch: AsIs, dropped: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """inputs, prepared observations beside actions [B, D + A]; targets [B] → the loss; detached: mean Q."""
        q = self.critics(batch["inputs"], dropped).float()  # [C, B]
        loss = critic_loss(q, batch["targets"])
        return loss, q.detach().mean()


class ActorObjective(nn.Module):
    """J_π + J(α), which share no gradient. As CriticObjective, for actor and temperature.

    The critics are no part of this module, and frozen in its forward: their gradients are neither computed nor reduced.
    """

    def __init__(self, agent: SACAgent, target_entropy: float, mean_over_critics: bool) -> None:
        super().__init__()
        self.actor, self.log_alpha, self.head = agent.actor, agent.log_alpha, agent.head
        self._critics = (agent.critics,)  # hidden in a tuple from nn.Module
        self.target_entropy, self.mean_over_critics = target_entropy, mean_over_critics

    def forward(self, batch: AsIs, dropped: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """obs, prepared [B, D]; noise [B, A] → the loss; detached: actor loss, temperature loss, mean log π."""
        inputs, noise = batch["obs"], batch["noise"]
        actions, logprobs = self.head.sample_with_logprob(self.actor(inputs), noise)  # as agent.policy
        q = self._critics[0](torch.cat((inputs, actions), -1), dropped, frozen=True).float()  # [C, B]
        q = q.mean(0) if self.mean_over_critics else q.amin(0)  # [B]
        pi_loss = actor_loss(q, logprobs, self.log_alpha.detach().exp())
        temperature_loss = alpha_loss(self.log_alpha, logprobs, self.target_entropy)
        loss = pi_loss + temperature_loss if self.log_alpha.requires_grad else pi_loss
        return loss, pi_loss.detach(), temperature_loss.detach(), logprobs.detach().mean()


class Learner:
    """The agent with what trains it: objectives, optimizers, and the parameters of each as one vector.

    Args:
        mean_over_critics: whether the actor climbs the mean of the critics (DroQ) or their minimum (SAC).
    """

    def __init__(self, fabric: Fabric, agent: SACAgent, args: OffPolicyArgs, mean_over_critics: bool = False) -> None:
        self.fabric, self.agent, self.args = fabric, agent.to(fabric.device), args
        target_entropy = -float(agent.head.num_actions) if args.target_entropy is None else args.target_entropy
        critic, actor = CriticObjective(agent), ActorObjective(agent, target_entropy, mean_over_critics)
        self.critic_objective = fabric.setup_module(torch.compile(critic) if args.compile else critic)
        self.actor_objective = fabric.setup_module(torch.compile(actor) if args.compile else actor)
        self._next_actions = torch.compile(next_actions) if args.compile else next_actions
        self._td_targets = torch.compile(td_targets) if args.compile else td_targets
        self.critics, self.target_critics = FlatParameters(agent.critics), FlatParameters(agent.target_critics)
        self.actor = FlatParameters(actor)  # and temperature
        fused = fabric.device.type in ("cpu", "cuda")
        self.q_optimizer, self.actor_optimizer = (
            fabric.setup_optimizers(torch.optim.Adam([self.critics.vector], lr=args.q_lr, fused=fused)),
            fabric.setup_optimizers(torch.optim.Adam([self.actor.vector], lr=args.policy_lr, fused=fused)),
        )
        self._critic_history: list[tuple[Tensor, ...]] = []  # scalars that nobody has looked at yet
        self._actor_history: list[tuple[Tensor, ...]] = []

    def next_actions(self, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
        """The prepared batch [*, B, ...] with an action at each next observation; noise [*, B, A]."""
        with self.fabric.autocast():
            return self._next_actions(self.agent, batch, noise)

    def td_targets(self, batch: dict[str, Tensor], dropped: Sequence[Tensor] = ()) -> Tensor:
        """What the critics shall say at a batch with next actions, [B]."""
        with self.fabric.autocast():
            return self._td_targets(self.agent, batch, dropped)

    def update_critics(
        self, batch: dict[str, Tensor], dropped: Sequence[Tensor] = (), target_dropped: Sequence[Tensor] = ()
    ) -> None:
        """One step of the critics at a batch with next actions."""
        known = AsIs({"inputs": batch["inputs"], "targets": self.td_targets(batch, target_dropped)})
        loss, mean_q = self.critic_objective(known, dropped)
        self.fabric.backward(loss)
        self.critics.collect_gradients()
        self.q_optimizer.step()
        self._critic_history.append((loss.detach(), mean_q))

    def update_actor(self, obs: Tensor, noise: Tensor, dropped: Sequence[Tensor] = ()) -> None:
        """One step of actor and temperature at prepared observations [B, D], noise [B, A]."""
        alpha = self.agent.alpha
        loss, *metrics = self.actor_objective(AsIs({"obs": obs, "noise": noise}), dropped)
        self.fabric.backward(loss)
        self.actor.collect_gradients()
        self.actor_optimizer.step()
        self._actor_history.append((*metrics, alpha))

    def update_targets(self) -> None:
        """θ̄ ← τ θ + (1 − τ) θ̄."""
        self.target_critics.vector.data.lerp_(self.critics.vector.data, self.args.tau)

    def prepare(self, batches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sampled batches [K, B, ...] on the device, observations as the networks take them, and beside the actions."""
        batches = {name: column.to(self.fabric.device) for name, column in batches.items()}
        for name in ("obs", "next_obs"):
            batches[name] = self.agent.prepare(batches[name])
        batches["inputs"] = torch.cat((batches["obs"], batches["actions"]), -1)  # [K, B, D + A]
        return batches

    @property
    def wants_check(self) -> bool:
        """Whether so many updates have been taken since the last call of `metrics` that it is time for another."""
        return len(self._critic_history) >= CHECK_EVERY

    def metrics(self) -> dict[str, Tensor]:
        """What the updates since the last call have noted, under the tags of the log; [K] each, still on the device.

        Not called in each iteration: looking at scalars costs as much as a product of the networks, and a GPU its pace.

        Raises:
            NonFiniteError: a loss or a parameter is NaN or infinite, as it is once a gradient was.
        """
        metrics: dict[str, Tensor] = {}
        for tags, history in ((CRITIC_TAGS, self._critic_history), (ACTOR_TAGS, self._actor_history)):
            metrics |= {tag: torch.stack(column) for tag, column in zip(tags, zip(*history, strict=True), strict=False)}
            history.clear()
        checked = metrics | {"critics": self.critics.vector.detach(), "actor": self.actor.vector.detach()}
        if not torch.stack([values.sum() for values in checked.values()]).isfinite().all():
            bad = [name for name, values in checked.items() if not values.isfinite().all()]
            raise NonFiniteError(f"not finite after the update: {', '.join(bad) or 'sums of parameters'}")
        if "losses/entropy" in metrics:
            metrics["losses/entropy"] = -metrics["losses/entropy"]  # log π until here
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"q_optimizer": self.q_optimizer.state_dict(), "actor_optimizer": self.actor_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the optimizers, but for learning rates and a fixed temperature: those are what the arguments say.

        Raises:
            CheckpointError: an optimizer's state has other shapes than its parameters.
        """
        rates = self.args.q_lr, self.args.policy_lr
        names = "q_optimizer", "actor_optimizer"
        for name, optimizer, rate in zip(names, (self.q_optimizer, self.actor_optimizer), rates, strict=True):
            restore_optimizer(optimizer, state[name])
            optimizer.param_groups[0]["lr"] = rate
        if not self.args.autotune:
            self.agent.log_alpha.data.fill_(math.log(self.args.alpha))


@torch.no_grad()
def next_actions(agent: SACAgent, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Adds a' ~ π(·|s') beside s', and log π(a'|s')."""
    actions, logprobs = agent.policy(batch["next_obs"], noise)
    return batch | {"next_inputs": torch.cat((batch["next_obs"], actions), -1), "next_logprobs": logprobs}


@torch.no_grad()
def td_targets(agent: SACAgent, batch: dict[str, Tensor], dropped: Sequence[Tensor]) -> Tensor:
    """What the critics shall say at a batch with next actions, [B]."""
    next_q = agent.target_critics(batch["next_inputs"], dropped).float()  # [C, B]
    rewards, terminated, discounts = batch["rewards"], batch["terminated"], batch["discounts"]
    return td_target(rewards, terminated, discounts, next_q, batch["next_logprobs"], agent.alpha)


def compile_ahead(learner: Learner, updates: int = 0, dropped: Sequence[Sequence[Tensor]] = ((), (), ())) -> None:
    """Compiles forward and backward on an empty batch now, not within the first update; changes nothing.

    Args:
        updates: how many batches are given their next actions at once; 0: one, as [B, ...].
        dropped: what dropout sets to zero in critics, targets and the actor's loss.
    """
    agent, device, size = learner.agent, learner.fabric.device, learner.args.batch_size
    rows, widths = ((updates, size) if updates else (size,)), {"rewards": (), "terminated": (), "discounts": ()}
    inputs, num_actions = agent.actor.inputs, agent.head.num_actions
    widths |= {"obs": (inputs,), "next_obs": (inputs,), "inputs": (inputs + num_actions,), "actions": (num_actions,)}
    batches = {name: torch.zeros(*rows, *width, device=device) for name, width in widths.items()}
    batches = learner.next_actions(batches, batches["actions"])
    batch = {name: column[0] for name, column in batches.items()} if updates else batches
    targets = learner.td_targets(batch, dropped[1])
    learner.fabric.backward(learner.critic_objective(AsIs(batch | {"targets": targets}), dropped[0])[0])
    learner.fabric.backward(learner.actor_objective(AsIs(batch | {"noise": batch["actions"]}), dropped[2])[0])
    learner.critics.collect_gradients()
    learner.actor.collect_gradients()
