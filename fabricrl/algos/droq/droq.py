"""DroQ: many critic updates per step, by small dropout and layer norm (Hiraoka et al. 2022, arXiv:2110.02034v2).

    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4
    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4

Everything but the update is SAC's. Shapes: N environments of a rank, W ranks, D observation size, A action size,
C critics, F features, H units of a hidden layer, K critic updates of an environment step, B rows of a batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fabricrl.algos.droq.agent import ACTION_SPACES, make_agent
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.droq.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.algos.off_policy import SampleAndTrain, make_buffer, make_schedule, restore_replay
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.sac import ACTOR_METRICS, CRITIC_METRICS, Learner, rollout, setup
from fabricrl.utils import average_gradients, frozen, polyak_update


def update_critics(
    run: Run, learner: Learner, batch: Any, noise: Tensor, kept: list[Tensor], target_kept: list[Tensor]
) -> Tensor:
    """One optimizer step of the critics, and one of their targets (Algorithm 2, lines 5–9), on a batch [B, ...].

    Args:
        noise: [B, A].
        kept, target_kept: masks of dropout, as `DroQAgent.dropout_masks` draws them.

    Returns CRITIC_METRICS, [2].
    """
    agent, actor, critics, _, optimizer = learner
    with torch.no_grad(), run.fabric.autocast():
        params = actor(agent.features(batch.next_obs))
        next_actions, next_logprobs = agent.head.sample_with_logprob(params, noise)  # a' ~ π(·|s')
        next_q = agent.target_critics(batch.next_obs, next_actions, kept=target_kept)  # [C, B]
        rewards = run.args.reward_scale * batch.rewards  # [B]
        targets = td_target(rewards, batch.terminated, batch.discounts, next_q, next_logprobs, agent.alpha)
    q = critics(batch.obs, batch.actions, kept=kept)  # [C, B]
    loss = critic_loss(q, targets)

    optimizer.zero_grad()
    run.fabric.backward(loss)
    metrics = average_gradients(run.fabric, optimizer, torch.stack((loss, q.mean())))  # over ranks, in one message
    optimizer.step()
    polyak_update(agent.target_critics, agent.critics, run.args.tau)
    return metrics


def update_actor(run: Run, learner: Learner, obs: Tensor, noise: Tensor, kept: list[Tensor]) -> Tensor:
    """One optimizer step of actor and temperature (line 10), maximising the mean of the critics: ACTOR_METRICS, [4]."""
    agent, actor, critics, optimizer, _ = learner
    with run.fabric.autocast():
        features = agent.features(obs)  # [B, F]: of images, as the critics have learned to see them
    actions, logprobs = agent.head.sample_with_logprob(actor(features), noise)  # [B, A], [B]
    with frozen(agent.critics):
        q = critics(features, actions, kept=kept).mean(0)  # [B]
    alpha, entropy = agent.alpha, -logprobs.mean()
    pi_loss = actor_loss(q, logprobs, alpha)
    temperature_loss = alpha_loss(agent.log_alpha, entropy, agent.target_entropy)

    optimizer.zero_grad()
    run.fabric.backward(pi_loss + temperature_loss)
    metrics = average_gradients(run.fabric, optimizer, torch.stack((pi_loss, temperature_loss, entropy, alpha)))
    optimizer.step()
    return metrics


def train(
    run: Run,
    learner: Learner,
    step_critics: Callable[..., Tensor],
    step_actor: Callable[..., Tensor],
    batches: Any,
) -> dict[tuple[str, ...], Tensor]:
    """The update of Algorithm 2 for one environment step: its share of critic updates (lines 4–9), then one of actor
    and temperature (line 10) on a batch of its own.

    Args:
        batches: [K + 1, B, ...], as sampled; the last is the actor's.

    Returns the metrics, [4] and [K, 2], by their tags.
    """
    agent: Any = learner.agent
    size, rng = run.args.batch_size, run.device_rng
    *batches, last = agent.prepare_batches(batches, rng)
    *noises, last_noise = agent.head.noise((len(batches) + 1, size), rng)  # [K + 1, B, A]
    critic_metrics = []
    for batch, noise in zip(batches, noises, strict=True):
        kept, target_kept = agent.dropout_masks(2, size, rng)
        critic_metrics.append(step_critics(batch, noise, kept, target_kept))
    (kept,) = agent.dropout_masks(1, size, rng)
    metrics = {ACTOR_METRICS: step_actor(last.obs, last_noise, kept)}
    return metrics | ({CRITIC_METRICS: torch.stack(critic_metrics)} if critic_metrics else {})


def spread_updates(count: int, steps: int) -> list[int]:
    """Divides `count` critic updates among `steps` environment steps, as evenly as possible."""
    return [count * (i + 1) // steps - count * i // steps for i in range(steps)]


def make_sample_and_train(run: Run, learner: Learner, rb: Any) -> SampleAndTrain:
    """Makes the function that draws batches and trains on them: as it is, or compiled and captured."""
    step_critics = run.compiled(partial(update_critics, run, learner))
    step_actor = run.compiled(partial(update_actor, run, learner))
    sample_and_train = SampleAndTrain(run, rb, partial(train, run, learner, step_critics, step_actor))
    if run.needs_warmup:
        play = partial(rollout, run, learner.agent, run.envs, rb)
        with run.warmup(partial(play, explores=True), partial(play, explores=False)):
            for count in {math.floor(run.args.replay_ratio), math.ceil(run.args.replay_ratio)}:  # updates a step
                sample_and_train(count + 1)
    return sample_and_train


def main() -> int:
    with Run(parse(DroQArgs, "droq"), "droq", ACTION_SPACES, bounded=True, images=True) as run:
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
            steps = schedule.steps_due(step, run.global_step)
            _, count = schedule.take(run.global_step)  # critic updates, each of which draws a batch

            # 3. Update
            for num_updates in spread_updates(count, steps):
                sample_and_train(num_updates + 1)  # the last batch is the actor's
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
