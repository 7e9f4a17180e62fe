"""Soft actor-critic with automatic temperature (Haarnoja et al. 2018, arXiv:1812.05905v2), for one process or many.

    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1
    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/sac/sac.py --env-id Pendulum-v1

Shapes: N environments of a rank, W ranks, D observation size, F features, A action size, C critics, K updates of the
critics and L of the actor, B rows of a batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from fabricrl.algos.off_policy import SampleAndTrain, make_buffer, make_schedule, restore_replay
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.agent import ACTION_SPACES, SACAgent, make_agent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.data import Batch, Replay
from fabricrl.envs import rescale_actions
from fabricrl.utils import Adam, average_gradients, frozen, polyak_update

CRITIC_METRICS = ("losses/qf_loss", "losses/qf_values")
ACTOR_METRICS = ("losses/actor_loss", "losses/alpha_loss", "losses/entropy", "losses/alpha")


@torch.inference_mode()
def rollout(run: Run, player: SACAgent, envs: VectorEnv, rb: Replay, explores: bool) -> None:
    """Takes one step in every environment, by uniform actions if it `explores`, into the replay buffer."""
    noise = run.noise(player.head, 1, uniform=explores)[0]  # [N, A]
    with run.failing_together(), rb.checked():
        if run.uses_tensor_envs:  # whose step is one CUDA graph on a GPU
            run.take_tensor_step(take_step, player, envs, rb, noise, explores)
        else:
            take_step(run, player, envs, rb, noise, explores)
    run.clock.lap("comm")


def take_step(run: Run, player: SACAgent, envs: VectorEnv, rb: Replay, noise: Tensor, explores: bool) -> None:
    """Takes a step in every environment: actions are drawn with noise [N, A], or are that noise if it `explores`."""
    actions = run.for_envs(noise if explores else run.act(player, rb.stacked_obs(), noise))  # [N, A]
    run.clock.lap("act")
    next_obs, rewards, terminated, truncated, infos = envs.step(rescale_actions(run.action_space, actions))
    rb.add(actions, next_obs, rewards, terminated, truncated, infos)
    run.count(rewards, terminated | truncated, infos)
    run.clock.lap("env")


class Learner(NamedTuple):
    """The networks as Fabric has wrapped them, and their optimizers."""

    agent: SACAgent
    actor: nn.Module
    critics: nn.Module
    actor_optimizer: Adam
    q_optimizer: Adam


def setup(run: Run, agent: SACAgent) -> Learner:
    """Makes the optimizers, the temperature's with the actor's, and wraps the networks."""
    agent.to(run.fabric.device)
    actor_parameters = [agent.log_alpha, *agent.actor.parameters()]
    actor, actor_optimizer = run.setup(agent.actor, Adam(actor_parameters, run.args.policy_lr))
    critics, q_optimizer = run.setup(agent.critics, Adam(agent.critics.parameters(), run.args.q_lr))
    return Learner(agent, actor, critics, actor_optimizer, q_optimizer)


def update_critics(run: Run, learner: Learner, batch: Batch, noise: Tensor, moves_targets: bool) -> Tensor:
    """One optimizer step of the critics on a batch [B, ...], noise [B, A], and of their targets if `moves_targets`.

    Returns CRITIC_METRICS, [2].
    """
    agent, actor, critics, _, optimizer = learner
    with torch.no_grad(), run.fabric.autocast():
        params = actor(agent.features(batch.next_obs))
        next_actions, next_logprobs = agent.head.sample_with_logprob(params, noise)  # a' ~ π(·|s')
        next_q = agent.target_critics(batch.next_obs, next_actions)  # [C, B]
        rewards = run.args.reward_scale * batch.rewards  # [B]
        targets = td_target(rewards, batch.terminated, batch.discounts, next_q, next_logprobs, agent.alpha)
    q = critics(batch.obs, batch.actions)  # [C, B]
    loss = critic_loss(q, targets)

    optimizer.zero_grad()
    run.fabric.backward(loss)
    metrics = average_gradients(run.fabric, optimizer, torch.stack((loss, q.mean())))  # over ranks, in one message
    optimizer.step()
    if moves_targets:
        polyak_update(agent.target_critics, agent.critics, run.args.tau)
    return metrics


def update_actor(run: Run, learner: Learner, obs: Tensor, noise: Tensor) -> Tensor:
    """One optimizer step of actor and temperature on observations [B, ...], noise [B, A]: ACTOR_METRICS, [4]."""
    agent, actor, critics, optimizer, _ = learner
    with run.fabric.autocast():
        features = agent.features(obs)  # [B, F]: of images, as the critics have learned to see them
    actions, logprobs = agent.head.sample_with_logprob(actor(features), noise)  # [B, A], [B]
    with frozen(agent.critics):
        q = critics(features, actions).amin(0)  # [B]
    alpha, entropy = agent.alpha, -logprobs.mean()
    pi_loss = actor_loss(q, logprobs, alpha)
    temperature_loss = alpha_loss(agent.log_alpha, entropy, agent.target_entropy)

    optimizer.zero_grad()
    run.fabric.backward(pi_loss + temperature_loss)
    metrics = average_gradients(run.fabric, optimizer, torch.stack((pi_loss, temperature_loss, entropy, alpha)))
    optimizer.step()
    return metrics


def make_plan(args: SACArgs, first: int, count: int) -> tuple[tuple[bool, int], ...]:
    """Plans K critic updates from number `first` on. For each: whether the targets move with it, and how many updates
    of the actor follow. Every `policy_frequency` critic updates the actor makes up for as many, as in CleanRL."""
    delay, numbers = args.policy_frequency, range(first, first + count)
    return tuple((n % args.target_network_frequency == 0, delay * (n % delay == 0)) for n in numbers)


def train(
    run: Run,
    learner: Learner,
    step_critics: Callable[..., Tensor],
    step_actor: Callable[..., Tensor],
    batches: Batch,
    plan: tuple[tuple[bool, int], ...],
) -> dict[tuple[str, ...], Tensor]:
    """K critic updates on a batch [B, ...] each of `batches` [K, B, ...], and the actor's among them, as planned.

    Returns the metrics of all, [K, 2] and [L, 4], by their tags.
    """
    agent, critic_metrics, actor_metrics = learner.agent, [], []
    batches = agent.prepare_batches(batches, run.device_rng)
    shape = len(plan) + sum(updates for _, updates in plan), run.args.batch_size
    noise = iter(agent.head.noise(shape, run.device_rng))  # [K + L, B, A]
    for batch, (moves_targets, updates) in zip(batches, plan, strict=True):
        critic_metrics.append(step_critics(batch, next(noise), moves_targets))
        for _ in range(updates):
            actor_metrics.append(step_actor(batch.obs, next(noise)))
    metrics = {CRITIC_METRICS: torch.stack(critic_metrics)}
    return metrics | ({ACTOR_METRICS: torch.stack(actor_metrics)} if actor_metrics else {})


def make_sample_and_train(run: Run, learner: Learner, rb: Replay) -> SampleAndTrain:
    """Makes the function that draws batches and trains on them: as it is, or compiled and captured."""
    step_critics = run.compiled(partial(update_critics, run, learner))
    step_actor = run.compiled(partial(update_actor, run, learner))
    every = run.args.policy_frequency, run.args.target_network_frequency
    sample_and_train = SampleAndTrain(run, rb, partial(train, run, learner, step_critics, step_actor), *every)
    if run.needs_warmup:
        play = partial(rollout, run, learner.agent, run.envs, rb)
        with run.warmup(partial(play, explores=True), partial(play, explores=False)):
            for plan in {make_plan(run.args, *kind) for kind in sample_and_train.kinds()}:
                sample_and_train(len(plan), plan)
    return sample_and_train


def main() -> int:
    with Run(parse(SACArgs, "sac"), "sac", ACTION_SPACES, bounded=True, images=True) as run:
        args = run.args
        # --- Schedule and buffer: first, as there may not be the memory for it
        schedule = make_schedule(run)
        rb = make_buffer(run)

        # --- Environments
        envs = run.make_envs()

        # --- Agent and optimizers
        agent = make_agent(args, envs)
        learner = setup(run, agent)

        run.restore(agent=agent, q_optimizer=learner.q_optimizer, actor_optimizer=learner.actor_optimizer)
        restore_replay(run, rb, schedule)

        # --- Start
        sample_and_train = make_sample_and_train(run, learner, rb)
        rb.start(run.reset())

        for step in run.iterations(args.num_envs):
            # 1. Rollout
            rollout(run, run.player(agent), envs, rb, schedule.explores(step))
            if agent.obs_normalizer is not None:
                agent.obs_normalizer.update(run.to_device(rb.newest_vectors()), run.fabric)

            # 2. Sample
            due = schedule.take(run.global_step)  # number of the first update, and how many; each draws a batch

            # 3. Update
            for first, count in sample_and_train.parts(*due):
                sample_and_train(count, make_plan(args, first, count))
            run.clock.lap("train")

            # 4. Log
            run.record_step()
            run.evaluate(agent)
            if run.log_is_due:
                run.log({"charts/learning_rate": args.policy_lr})

            # 5. Checkpoint
            run.checkpoint(rb, schedule=schedule)
    return run.exit_code


if __name__ == "__main__":
    run_script(main)
