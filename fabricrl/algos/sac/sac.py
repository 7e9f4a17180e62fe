"""Soft actor-critic with automatic temperature (Haarnoja et al. 2018, arXiv:1812.05905v2), for one process or many.

    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1
    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/sac/sac.py --env-id Pendulum-v1

Shapes: N environments of a rank, W ranks, D observation size, A action size, C critics, K updates, B rows of a batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.args import parse
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import OffPolicyArgs, SACArgs
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.algos.sac.utils import ACTION_SPACES, UpdateSchedule, make_agent, make_buffer, restore_buffer
from fabricrl.data.buffers import ReplayBuffer
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe, stretch
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore, restore_optimizer
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.launch import StopSignal, check_ranks, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.model import FlatParameters
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import env_seeds, generators, require


@torch.inference_mode()
def rollout(
    player: SACAgent,
    envs: VectorEnv,
    rb: ReplayBuffer,
    episodes: EpisodeStatistics,
    rng: torch.Generator,
    random: bool,
    clock: Stopwatch,
) -> None:
    """One step in every environment, by uniform actions if `random`, into the replay buffer."""
    num_envs, device = rb.num_envs, player.log_alpha.device
    if random:
        actions = (2 * torch.rand(num_envs, player.head.num_actions, generator=rng) - 1).numpy()  # [N, A]
    else:
        noise = player.head.noise((num_envs,), rng).to(device)
        actions = player.act(rb.newest_obs().to(device), noise).cpu().numpy()  # [N, A]
    if not np.isfinite(actions).all():
        raise NonFiniteError("the policy's actions are not finite")
    clock.lap("act")
    step = envs.step(stretch(envs.single_action_space, actions))
    clock.lap("env")
    rb.add(actions, *step)
    if problem := rb.first_bad():
        raise NonFiniteError(problem)
    episodes.add(rewards=step[1], dones=step[2] | step[3])


class CriticObjective(nn.Module):
    """J_Q. What DDP wraps and `--compile` compiles: its forward is the critics' one gradient path."""

    def __init__(self, agent: SACAgent) -> None:
        super().__init__()
        self.critics = agent.critics

    def forward(self, inputs: Tensor, targets: Tensor, dropped: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Prepared observations beside actions [B, D + A], targets [B] → the loss; detached: loss and mean Q [2]."""
        q = self.critics(inputs, dropped)  # [C, B]
        loss = critic_loss(q, targets)
        return loss, torch.stack((loss, q.mean())).detach()


class ActorObjective(nn.Module):
    """J_π + J(α), which share no gradient. As CriticObjective, for actor and temperature.

    The critics are no part of this module, and frozen in its forward: their gradients are neither computed nor reduced.
    """

    def __init__(self, agent: SACAgent, target_entropy: float, mean_over_critics: bool) -> None:
        super().__init__()
        self.actor, self.log_alpha, self.head = agent.actor, agent.log_alpha, agent.head
        self._critics = (agent.critics,)  # hidden in a tuple from nn.Module
        self.target_entropy, self.mean_over_critics = target_entropy, mean_over_critics

    def forward(self, inputs: Tensor, noise: Tensor, dropped: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Prepared observations [B, D], noise [B, A] → the loss; detached: actor and temperature loss, entropy [3]."""
        actions, logprobs = self.head.sample_with_logprob(self.actor(inputs), noise)
        q = self._critics[0](torch.cat((inputs, actions), -1), dropped, frozen=True)  # [C, B]
        q = q.mean(0) if self.mean_over_critics else q.amin(0)  # [B]
        pi_loss = actor_loss(q, logprobs, self.log_alpha.detach().exp())
        temperature_loss = alpha_loss(self.log_alpha, logprobs, self.target_entropy)
        loss = pi_loss + temperature_loss if self.log_alpha.requires_grad else pi_loss
        return loss, torch.stack((pi_loss, temperature_loss, -logprobs.mean())).detach()


class Learner:
    """The agent with what trains it: objectives, optimizers, and the parameters of each as one vector.

    Args:
        mean_over_critics: whether the actor climbs the mean of the critics (DroQ) or their minimum (SAC).
    """

    def __init__(self, fabric: Fabric, agent: SACAgent, args: OffPolicyArgs, mean_over_critics: bool = False) -> None:
        self.fabric, self.agent, self.tau = fabric, agent.to(fabric.device), args.tau
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
    ) -> Tensor:
        """One step of the critics at a batch with next actions. Returns loss and mean Q, [2]."""
        loss, metrics = self.critic_objective(batch["inputs"], self.td_targets(batch, target_dropped), dropped)
        self.fabric.backward(loss)
        self.critics.collect_gradients()
        self.q_optimizer.step()
        return metrics

    def update_actor(self, obs: Tensor, noise: Tensor, dropped: Sequence[Tensor] = ()) -> Tensor:
        """One step of actor and temperature at prepared observations [B, D], noise [B, A].

        Returns both losses, the policy's entropy, and the temperature that it was weighed with; [4].
        """
        alpha = self.agent.alpha
        loss, metrics = self.actor_objective(obs, noise, dropped)
        self.fabric.backward(loss)
        self.actor.collect_gradients()
        self.actor_optimizer.step()
        return torch.cat((metrics, alpha[None]))

    def update_targets(self) -> None:
        """θ̄ ← τ θ + (1 − τ) θ̄."""
        self.target_critics.vector.data.lerp_(self.critics.vector.data, self.tau)

    def prepare(self, batches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sampled batches [K, B, ...] on the device, observations as the networks take them, and beside the actions."""
        batches = {name: column.to(self.fabric.device) for name, column in batches.items()}
        for name in ("obs", "next_obs"):
            batches[name] = self.agent.prepare(batches[name])
        batches["inputs"] = torch.cat((batches["obs"], batches["actions"]), -1)  # [K, B, D + A]
        return batches

    def check_finite(self, metrics: dict[str, Tensor]) -> None:
        """Raises NonFiniteError if a loss is NaN or infinite, as all are once a parameter or gradient was."""
        if not torch.stack([values.sum() for values in metrics.values()]).isfinite().all():
            bad = [name for name, values in metrics.items() if not values.isfinite().all()]
            raise NonFiniteError(f"not finite in the update: {', '.join(bad) or 'a sum of losses'}")

    def state_dict(self) -> dict[str, Any]:
        return {"q_optimizer": self.q_optimizer.state_dict(), "actor_optimizer": self.actor_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if an optimizer's state has other shapes than its parameters."""
        restore_optimizer(self.q_optimizer, state["q_optimizer"])
        restore_optimizer(self.actor_optimizer, state["actor_optimizer"])


@torch.no_grad()
def next_actions(agent: SACAgent, batch: dict[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Adds a' ~ π(·|s') beside s', and log π(a'|s')."""
    actions, logprobs = agent.policy(batch["next_obs"], noise)
    return batch | {"next_inputs": torch.cat((batch["next_obs"], actions), -1), "next_logprobs": logprobs.float()}


@torch.no_grad()
def td_targets(agent: SACAgent, batch: dict[str, Tensor], dropped: Sequence[Tensor]) -> Tensor:
    """What the critics shall say at a batch with next actions, [B]."""
    next_q = agent.target_critics(batch["next_inputs"], dropped).float()  # [C, B]
    rewards, terminated, discounts = batch["rewards"], batch["terminated"], batch["discounts"]
    return td_target(rewards, terminated, discounts, next_q, batch["next_logprobs"], agent.alpha)


def train(
    learner: Learner, batches: dict[str, Tensor], first: int, rng: torch.Generator, args: SACArgs
) -> dict[str, Tensor]:
    """The update: K critic steps on a batch each, the actor's among them. Returns all losses, still on the device.

    Args:
        batches: [K, B, ...], as sampled.
        first: number of the first of these updates in the run, from 1.

    Raises:
        NonFiniteError: a loss is NaN or infinite, as it is once a parameter or gradient was.
    """
    batches = learner.prepare(batches)
    shape = (*batches["rewards"].shape, 1 + args.policy_frequency)  # [K, B, 1 + F]
    noise = learner.agent.head.noise(shape, rng).to(learner.fabric.device)  # [K, B, 1 + F, A]
    critic_history, actor_history = [], []
    for k, (update, minibatch) in enumerate(enumerate(zip(*batches.values(), strict=True), first)):
        batch = dict(zip(batches, minibatch, strict=True))
        critic_history.append(learner.update_critics(learner.next_actions(batch, noise[k, :, 0])))
        if update % args.policy_frequency == 0:  # delayed, and then as often as it was put off
            actor_history += [
                learner.update_actor(batch["obs"], noise[k, :, i + 1]) for i in range(args.policy_frequency)
            ]
        if update % args.target_network_frequency == 0:
            learner.update_targets()
    return named(learner, critic_history, actor_history)


def named(learner: Learner, critic_history: list[Tensor], actor_history: list[Tensor]) -> dict[str, Tensor]:
    """What the steps of an update have returned, under the tags of the log; [K] each. Raises NonFiniteError."""
    metrics: dict[str, Tensor] = {}
    if critic_history:
        metrics |= dict(zip(("losses/qf_loss", "losses/qf_values"), torch.stack(critic_history, 1), strict=True))
    if actor_history:
        tags = ("losses/actor_loss", "losses/alpha_loss", "losses/entropy", "losses/alpha")
        metrics |= dict(zip(tags, torch.stack(actor_history, 1), strict=True))
    learner.check_finite(metrics)
    return metrics


def compile_ahead(learner: Learner, args: OffPolicyArgs) -> None:
    """Compiles forward and backward on an empty batch now, not within the first update; changes nothing."""
    agent, device = learner.agent, learner.fabric.device
    size, num_actions = args.batch_size, agent.head.num_actions
    batch = {name: torch.zeros(size, device=device) for name in ("rewards", "terminated", "discounts")}
    batch |= {name: torch.zeros(size, agent.actor.inputs, device=device) for name in ("obs", "next_obs")}
    batch["inputs"] = torch.zeros(size, agent.actor.inputs + num_actions, device=device)
    noise = torch.zeros(size, num_actions, device=device)
    learner.td_targets(learner.next_actions(batch, noise))
    learner.fabric.backward(learner.critic_objective(batch["inputs"], batch["rewards"])[0])
    learner.fabric.backward(learner.actor_objective(batch["obs"], noise)[0])
    learner.critics.collect_gradients()
    learner.actor.collect_gradients()


def main() -> int:
    args = parse(SACArgs, "sac")
    video_mode = "rgb_array" if args.capture_video else None
    obs_space, action_space = check_env(args.env_id, args.env_kwargs, ACTION_SPACES, video_mode, bounded=True)
    spaces = describe(obs_space, action_space)
    state, resumed = load_checkpoint(args.resume, "sac") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps over all ranks

    # --- Fabric, seed, run folder
    stop = StopSignal()
    fabric = launch(args)
    batch_size = args.num_envs * fabric.world_size  # steps an iteration takes
    require(batch_size <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {batch_size}")
    if state:
        check_batch(state, args, fabric.world_size)
        check_spaces(state["spaces"], spaces)
    run = Run(fabric, args, "sac", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)
    schedule = UpdateSchedule(args, fabric.world_size)

    # --- Environments
    with failing_together(fabric):
        rb = make_buffer(args, obs_space, action_space, fabric, run.folder)
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent and optimizers
    player = make_agent(args, envs)  # acts and evaluates; gradients flow through the learner's objectives alone
    learner = Learner(fabric, player, args)

    # --- Metrics
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()

    # --- Counters
    if state:
        with failing_together(fabric), reading(resumed):
            restore(player, state["agent"])
            learner.load_state_dict(state["learner"])
            episodes.load_state_dict(state["episodes"])
            refill = not restore_buffer(rb, state, resumed, args, fabric)
            schedule.load_state_dict(state["schedule"], global_step, refill)
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
            run.best_return = state["best_return"]
    if args.compile:
        compile_ahead(learner, args)

    run.start()
    clock = Stopwatch("env", "act", "train", "comm", "log")
    with failing_together(fabric):
        obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
    rb.start(obs)
    check_ranks(fabric, player, rb.newest_obs())

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        with failing_together(fabric):
            rollout(player, envs, rb, episodes, act_rng, schedule.explores(global_step), clock)
        clock.lap("comm")
        global_step += batch_size
        if player.obs_normalizer is not None:
            player.obs_normalizer.update(rb.newest_obs().to(fabric.device), fabric)

        # 2. Sample
        first, updates = schedule.take(global_step)
        batches = rb.sample(updates, args.batch_size, train_rng) if updates else {}

        # 3. Update
        if updates:
            with failing_together(fabric):
                losses.update(train(learner, batches, first, train_rng, args))
        clock.lap("train")

        # 4. Log
        exit_code = stop.exit_code(fabric)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        saves = run.wants_checkpoint(global_step, last)
        clock.lap("comm")
        if run.wants_log(global_step, last) or saves:
            episodes.flush(fabric)
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": args.policy_lr, "charts/SPS": run.sps(global_step)}
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)

        # 5. Checkpoint
        if saves:
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "learner": learner.state_dict(),
                "schedule": schedule.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": rank_generators(fabric, act_rng, train_rng),
            }
            run.save(global_step, episodes.mean_return, state, rb.state_dict() if args.checkpoint_buffer else None)
        clock.lap("log")
        if exit_code:
            break

    # --- Close
    envs.close()
    rb.close()
    run.finish(global_step, episodes)
    return exit_code


if __name__ == "__main__":
    run_script(main)
