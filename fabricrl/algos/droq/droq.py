"""DroQ: many critic updates per step, by small dropout and layer norm (Hiraoka et al. 2022, arXiv:2110.02034v2).

    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4
    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4

Everything but the update is SAC's. Shapes: N environments of a rank, W ranks, D observation size, A action size,
C critics, H units of a hidden layer, S environment steps that updates are due for, K critic updates, B rows of a batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fabricrl.algos.droq.agent import ACTION_SPACES, make_agent
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.off_policy.utils import make_buffer, make_schedule, restore_replay
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target
from fabricrl.algos.sac.sac import ACTOR_METRICS, CRITIC_METRICS, Learner, rollout, setup
from fabricrl.data import Batch
from fabricrl.utils import average_gradients, frozen, polyak_update


def update_critics(
    run: Run, learner: Learner, batch: Batch, noise: Tensor, dropped: list[Tensor], target_dropped: list[Tensor]
) -> Tensor:
    """One optimizer step of the critics, and one of their targets (Algorithm 2, lines 5–9), on a batch [B, ...].

    Args:
        noise: [B, A].
        dropped, target_dropped: what dropout sets to zero, as `DroQAgent.drop` draws it.

    Returns CRITIC_METRICS, [2].
    """
    agent, actor, critics, _, optimizer = learner
    with torch.no_grad(), run.fabric.autocast():
        next_actions, next_logprobs = agent.head.sample_with_logprob(actor(batch.next_obs), noise)  # a' ~ π(·|s')
        next_q = agent.target_critics(batch.next_obs, next_actions, dropped=target_dropped)  # [C, B]
        rewards = run.args.reward_scale * batch.rewards  # [B]
        targets = td_target(rewards, batch.terminated, batch.discounts, next_q, next_logprobs, agent.alpha)
    q = critics(batch.obs, batch.actions, dropped=dropped)  # [C, B]
    loss = critic_loss(q, targets)

    optimizer.zero_grad()
    run.fabric.backward(loss)
    metrics = average_gradients(run.fabric, optimizer, torch.stack((loss, q.mean())))  # over ranks, in one message
    optimizer.step()
    polyak_update(agent.target_critics, agent.critics, run.args.tau)
    return metrics


def update_actor(run: Run, learner: Learner, obs: Tensor, noise: Tensor, dropped: list[Tensor]) -> Tensor:
    """One optimizer step of actor and temperature (line 10), up the mean of the critics: ACTOR_METRICS, [4]."""
    agent, actor, critics, optimizer, _ = learner
    actions, logprobs = agent.head.sample_with_logprob(actor(obs), noise)  # [B, A], [B]
    with frozen(agent.critics):
        q = critics(obs, actions, dropped=dropped).mean(0)  # [B]
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
    batches: Batch,
    steps: int,
) -> None:
    """The update of Algorithm 2: for each environment step its share of critic updates (lines 4–9), then one update of
    actor and temperature (line 10) on a batch of its own.

    Args:
        batches: [K + S, B, ...], as sampled; the last S are the actor's.
        steps: S.
    """
    agent: Any = learner.agent
    device = run.fabric.device
    batches = agent.prepared(batches.to(device))
    count, size = len(batches) - steps, run.args.batch_size  # K, B
    noise = agent.head.noise((len(batches), size), run.train_rng).to(device)  # [K + S, B, A]
    for step in range(steps):
        for i in range(count * step // steps, count * (step + 1) // steps):
            dropped, target_dropped = agent.drop(2, size, run.train_rng)
            run.note(CRITIC_METRICS, step_critics(batches[i], noise[i], dropped, target_dropped))
        (dropped,), row = agent.drop(1, size, run.train_rng), count + step
        run.note(ACTOR_METRICS, step_actor(batches.obs[row], noise[row], dropped))


def make_updates(run: Run, learner: Learner, batches: Batch) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The critics' update and the actor's, as they are, or compiled and captured, by batches [2, B, ...]."""
    step_critics = run.captured(run.compiled(partial(update_critics, run, learner)))
    step_actor = run.captured(run.compiled(partial(update_actor, run, learner)))
    if run.records:
        with run.rehearsal():
            train(run, learner, step_critics, step_actor, batches, 1)
    return step_critics, step_actor


def main() -> int:
    args = parse(DroQArgs, "droq")
    with Run(args, "droq", ACTION_SPACES, bounded=True) as run:
        # --- Schedule and buffer
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
        step_critics, step_actor = make_updates(run, learner, rb.sample(2, args.batch_size, torch.Generator()))
        rb.start(run.reset())

        for step in run.iterations(args.num_envs):
            # 1. Rollout
            rollout(run, run.player(agent), envs, rb, schedule.explores(step))
            if agent.obs_normalizer is not None:
                agent.obs_normalizer.update(rb.newest_obs().to(run.fabric.device), run.fabric)

            # 2. Sample
            steps = min(max(run.global_step - schedule.starts, 0), run.global_step - step)  # that updates are due for
            _, count = schedule.take(run.global_step)
            if steps:
                batches = rb.sample(count + steps, args.batch_size, run.train_rng)

                # 3. Update
                train(run, learner, step_critics, step_actor, batches, steps)
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
