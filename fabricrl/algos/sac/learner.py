"""What trains an agent of SAC or DroQ: gradients, optimizers, targets.

Gradients are written out, network by network and loss by loss (`vjp`), and averaged over ranks as one vector. At the
widths of control policies, what automatic differentiation and the wrappers around it do besides takes a fifth of an
update.

Shapes: D observation size, A action size, C critics, B rows of a batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import OffPolicyArgs
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.utils.checkpoint import restore_optimizer
from fabricrl.utils.errors import CheckpointError, NonFiniteError
from fabricrl.utils.model import FlatParameters, VectorAdam
from fabricrl.utils.ranks import average

CRITIC_TAGS = ("losses/qf_loss", "losses/qf_values")
ACTOR_TAGS = ("losses/actor_loss", "losses/alpha_loss", "losses/entropy", "losses/alpha")
CHECK_EVERY = 1000  # updates


class Learner:
    """The agent with what trains it: gradients, optimizers, and the parameters of each as one vector.

    Args:
        mean_over_critics: whether the actor climbs the mean of the critics (DroQ) or their minimum (SAC).
    """

    def __init__(self, fabric: Fabric, agent: SACAgent, args: OffPolicyArgs, mean_over_critics: bool = False) -> None:
        self.fabric, self.agent, self.args = fabric, agent.to(fabric.device), args
        self.mean_over_critics = mean_over_critics
        self.target_entropy = -float(agent.head.num_actions) if args.target_entropy is None else args.target_entropy
        functions: list[Callable[..., Any]] = [next_actions, td_targets, critic_gradients, actor_gradients]
        if args.compile:
            functions = [torch.compile(function) for function in functions]
        self._next_actions, self._td_targets, self._critic_gradients, self._actor_gradients = functions
        self.critics, self.target_critics = FlatParameters(agent.critics), FlatParameters(agent.target_critics)
        self.actor = FlatParameters(nn.ParameterList([agent.log_alpha, *agent.actor.parameters()]))
        self.q_optimizer = VectorAdam(self.critics.vector, args.q_lr)
        self.actor_optimizer = VectorAdam(self.actor.vector, args.policy_lr)
        self._critic_history: list[tuple[Tensor, ...]] = []  # scalars that nobody has looked at yet
        self._actor_history: list[tuple[Tensor, ...]] = []

    def next_actions(self, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
        """The prepared batch [*, B, ...] with an action at each next observation; noise [*, B, A]."""
        return self._evaluate(self._next_actions, batch, noise)

    def td_targets(self, batch: dict[str, Tensor], dropped: Sequence[Tensor] = ()) -> Tensor:
        """What the critics shall say at a batch with next actions, [B]."""
        return self._evaluate(self._td_targets, batch, dropped)

    def update_critics(
        self, batch: dict[str, Tensor], dropped: Sequence[Tensor] = (), target_dropped: Sequence[Tensor] = ()
    ) -> None:
        """One step of the critics at a batch with next actions."""
        targets = self.td_targets(batch, target_dropped)
        self.critics.set_gradients(self.critic_gradients(batch["inputs"], targets, dropped))
        average(self.fabric, self.critics.vector.grad)
        self.q_optimizer.update()

    def critic_gradients(self, inputs: Tensor, targets: Tensor, dropped: Sequence[Tensor] = ()) -> list[Tensor]:
        """∂J_Q/∂θ on this rank, for each of the critics' parameters; the losses go to the metrics."""
        grads, *metrics = self._evaluate(self._critic_gradients, inputs, targets, dropped)
        self._critic_history.append(tuple(metrics))
        return grads

    def update_actor(self, obs: Tensor, noise: Tensor, dropped: Sequence[Tensor] = ()) -> None:
        """One step of actor and temperature at prepared observations [B, D], noise [B, A]."""
        self.actor.set_gradients(self.actor_gradients(obs, noise, dropped))
        average(self.fabric, self.actor.vector.grad)
        self.actor_optimizer.update()

    def actor_gradients(self, obs: Tensor, noise: Tensor, dropped: Sequence[Tensor] = ()) -> list[Tensor]:
        """∂J(α)/∂log α, if that is learned, and ∂J_π/∂φ for each of the actor's parameters, as `critic_gradients`."""
        settings = self.target_entropy, self.mean_over_critics
        grads, *metrics = self._evaluate(self._actor_gradients, obs, noise, dropped, *settings)
        self._actor_history.append(tuple(metrics))
        return grads

    def _evaluate(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """A function of the agent, without autograd, in the precision that was asked for."""
        with torch.inference_mode(), self.fabric.autocast():
            return function(self.agent, *inputs)

    def update_targets(self) -> None:
        """θ̄ ← τ θ + (1 − τ) θ̄."""
        self.target_critics.vector.data.lerp_(self.critics.vector.data, self.args.tau)

    def prepare(self, batches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sampled batches [K, B, ...] on the device, observations as the networks take them, and beside the actions."""
        batches = {name: column.to(self.fabric.device) for name, column in batches.items()}
        if self.args.compile:  # as `compile_ahead` has shown them
            batches = {name: column.contiguous() for name, column in batches.items()}
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
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"q_optimizer": self.q_optimizer.state_dict(), "actor_optimizer": self.actor_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the optimizers, but for learning rates and a fixed temperature: those are what the arguments say.

        Raises:
            CheckpointError: an optimizer's state has other shapes than its parameters.
        """
        stored = state["actor_optimizer"]["state"].get(0, {}).get("exp_avg", self.actor.vector)
        if stored.numel() - self.actor.vector.numel() == (-1 if self.args.autotune else 1):
            there, here = ("fixed", "learned") if self.args.autotune else ("learned", "fixed")
            raise CheckpointError(f"--autotune: the temperature was {there} there and is {here} here")
        rates = self.args.q_lr, self.args.policy_lr
        names = "q_optimizer", "actor_optimizer"
        for name, optimizer, rate in zip(names, (self.q_optimizer, self.actor_optimizer), rates, strict=True):
            restore_optimizer(optimizer, state[name])
            optimizer.param_groups[0]["lr"] = rate
        if not self.args.autotune:
            self.agent.log_alpha.data.fill_(math.log(self.args.alpha))


# What `Learner._evaluate` evaluates. Not decorated by no_grad: the compiler would take them all for that one function,
# of which it keeps eight variants.


def next_actions(agent: SACAgent, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Adds a' ~ π(·|s') beside s', and log π(a'|s')."""
    actions, logprobs = agent.policy(batch["next_obs"], noise)
    return batch | {"next_inputs": torch.cat((batch["next_obs"], actions), -1), "next_logprobs": logprobs}


def td_targets(agent: SACAgent, batch: dict[str, Tensor], dropped: Sequence[Tensor]) -> Tensor:
    """What the critics shall say at a batch with next actions, [B]."""
    next_q = agent.target_critics(batch["next_inputs"], dropped).float()  # [C, B]
    rewards, terminated, discounts = batch["rewards"], batch["terminated"], batch["discounts"]
    return td_target(rewards, terminated, discounts, next_q, batch["next_logprobs"], agent.alpha)


def critic_gradients(
    agent: SACAgent, inputs: Tensor, targets: Tensor, dropped: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """∂J_Q/∂θ at prepared observations beside actions [B, D + A] and targets [B]; J_Q; the mean of Q."""
    q, critics_pullback = agent.critics.vjp(inputs, dropped)
    q = q.float()
    loss, grad_q = critic_loss(q, targets)
    return critics_pullback(grad_q), loss, q.mean()


def actor_gradients(
    agent: SACAgent,
    obs: Tensor,
    noise: Tensor,
    dropped: Sequence[Tensor],
    target_entropy: float,
    mean_over_critics: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """∂J(α)/∂log α and ∂J_π/∂φ at prepared observations [B, D] and noise [B, A]; J_π, J(α), entropy, α."""
    alpha = agent.alpha
    params, actor_pullback = agent.actor.vjp(obs)
    actions, logprobs, head_pullback = agent.head.vjp(params, noise)
    q, critics_pullback = agent.critics.vjp(torch.cat((obs, actions), -1), dropped, of_inputs=True)
    pi_loss, grad_q, grad_logprobs = actor_loss(q.float(), logprobs, alpha, mean_over_critics)
    (grad_inputs,) = critics_pullback(grad_q)
    grads = actor_pullback(head_pullback(grad_inputs[:, obs.shape[-1] :], grad_logprobs))
    entropy = -logprobs.mean()
    temperature_loss, grad_log_alpha = alpha_loss(agent.log_alpha, entropy, target_entropy)
    if agent.log_alpha.requires_grad:
        grads = [grad_log_alpha, *grads]
    return grads, pi_loss, temperature_loss, entropy, alpha


def compile_ahead(learner: Learner, updates: int = 0, dropped: Sequence[Sequence[Tensor]] = ((), (), ())) -> None:
    """Compiles what the update evaluates on an empty batch now, not within the first update; changes nothing.

    Args:
        updates: how many batches are given their next actions at once; 0: one, as [B, ...].
        dropped: what dropout sets to zero in critics, targets and the actor's loss.
    """
    agent, device, size = learner.agent, learner.fabric.device, learner.args.batch_size
    rows, widths = ((updates, size) if updates else (size,)), {"rewards": (), "terminated": (), "discounts": ()}
    inputs, num_actions = agent.actor.inputs, agent.head.num_actions
    widths |= {"obs": (inputs,), "next_obs": (inputs,), "inputs": (inputs + num_actions,), "actions": (num_actions,)}
    batches = {name: torch.zeros(*rows, *width, device=device) for name, width in widths.items()}
    batches = learner.next_actions(batches, torch.zeros_like(batches["actions"]))  # not the same tensor twice
    batch = {name: column[0] for name, column in batches.items()} if updates else batches
    learner.critic_gradients(batch["inputs"], learner.td_targets(batch, dropped[1]), dropped[0])
    learner.actor_gradients(batch["obs"], batch["actions"], dropped[2])
    learner.metrics()
