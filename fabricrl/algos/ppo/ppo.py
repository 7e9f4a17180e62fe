"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for one process or many.

    python fabricrl/algos/ppo/ppo.py --env-id CartPole-v1
    python fabricrl/algos/ppo/ppo.py --env-id CartPole-v1 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/ppo/ppo.py --env-id CartPole-v1

Shapes: T steps, N environments of a rank, W ranks, D observation size, A action size, E epochs of M minibatches of
B = T N / M rows, R size of an observation's row: D numbers, or the bytes of a record with images, S frames of
a stack, L choices of an action mask, if the environment has masks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from fabricrl.algos.ppo.agent import ACTION_SPACES, PPOAgent, make_agent
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo.loss import mean, policy_loss, policy_metrics, value_loss
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.data import Batch, RolloutBuffer, minibatches, shuffled
from fabricrl.envs import env_actions
from fabricrl.utils import Adam, anneal, average_gradients, explained_variance, gae

LOSSES = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
METRICS = tuple(f"losses/{name}" for name in LOSSES)
Coef = float | Tensor  # a tensor where updates are compiled or captured


@torch.inference_mode()
def rollout(run: Run, player: PPOAgent, envs: VectorEnv, rb: RolloutBuffer) -> None:
    """Plays T steps in every environment. Values and log-probabilities come later, in one batch."""
    noise = run.noise(player.head, len(rb.actions))  # [T, N, ...]
    with run.failing_together(), rb.checked():
        if run.uses_tensor_envs:  # of which all steps are one CUDA graph on a GPU
            run.take_tensor_steps(take_step, player, envs, rb, noise)
        else:
            for t, noise_t in enumerate(noise):
                take_step(run, player, envs, rb, t, noise_t)
    run.clock.lap("comm")


def take_step(run: Run, player: PPOAgent, envs: VectorEnv, rb: RolloutBuffer, t: Any, noise: Tensor) -> None:
    """Takes step t in every environment, by actions drawn with noise [N, ...]."""
    device = run.player_device
    drawn = run.act(player, rb.stacked_obs(t, device), noise, rb.mask(t, device))  # [N, A]
    actions = run.for_envs(drawn)
    run.clock.lap("act")
    next_obs, rewards, terminated, truncated, infos = envs.step(env_actions(run.action_space, actions))
    rb.add(t, actions, next_obs, rewards, terminated, truncated, infos)
    run.clock.lap("env")


@torch.no_grad()
def shaped_rewards(run: Run, agent: Any, rb: RolloutBuffer) -> Tensor:
    """The rewards that the critic learns, [T, N]: with `--clip-reward` their signs, with `--norm-reward` scaled."""
    rewards = rb.rewards.sign() if run.args.clip_reward else rb.rewards.clone()
    if agent.reward_normalizer is None:
        return rewards
    valid = rb.valid(run.fabric.device)
    return agent.reward_normalizer.scale(rewards, rb.dones, valid, run.args.gamma, run.fabric)


@torch.no_grad()
def returns_and_advantages(run: Run, model: nn.Module, agent: PPOAgent, rb: RolloutBuffer) -> Batch:
    """The rollout as training data on the device, [T N, ...] each: observations, actions, masks, log-probabilities,
    values, advantages and returns."""
    args, device = run.args, run.fabric.device
    obs, next_obs = rb.inputs(agent.prepare, device)  # [T N, ...], [N, ...]
    actions = run.to_device(rb.actions.flatten(0, 1))  # [T N, A]
    data = Batch(obs=obs, actions=actions, masks=rb.masks(device), valid=rb.valid(device))
    logprobs, values = logprobs_and_values(model, data, agent.rows_at_once)  # [T N]: by the policy that acted
    with run.fabric.autocast():
        next_values = agent.prepared_value(next_obs).float()  # [N]

    rewards = run.to_device(shaped_rewards(run, agent, rb))  # [T, N]
    if args.bootstrap_truncated and rb.has_truncated:
        t, env, final_obs = (run.to_device(part) for part in rb.truncated_episodes())
        with run.fabric.autocast():
            final_values = agent.value(final_obs).float()
        rewards[t, env] += args.gamma * rb.bootstraps * final_values  # truncated, not terminated
    old_values, dones = values.view(rewards.shape), run.to_device(rb.dones)  # [T, N]
    advantages, returns = gae(rewards, old_values, dones, next_values, args.gamma, args.gae_lambda)  # [T, N]
    estimates = {"advantages": advantages.flatten(), "returns": returns.flatten()}
    return data.with_columns(logprobs=logprobs, values=values, **estimates)


def logprobs_and_values(model: nn.Module, data: Batch, chunk: int | None) -> tuple[Tensor, Tensor]:
    """log π(a|s) and V(s) of a rollout, [T N] each; images in chunks of rows, which stay in the caches."""
    rows = chunk or len(data.actions)
    starts = range(0, len(data.actions), rows)
    parts = [model(data[i : i + rows]) for i in starts]
    logprobs, _, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, values


def update(run: Run, model: nn.Module, optimizer: Adam, batch: Batch, clip_coef: Coef, ent_coef: Coef) -> Tensor:
    """One optimizer step on a minibatch [B, ...].

    Minimises the negated Eq. 9, L = L_policy + c_vf L_value − c_ent H. Returns METRICS, [6].
    """
    new_logprobs, entropy, new_values = model(batch)  # [B]
    logratio, weights = new_logprobs - batch.logprobs, batch.weights
    pg_loss = policy_loss(logratio, batch.advantages, clip_coef, weights)
    v_loss = value_loss(new_values, batch.values, batch.returns, clip_coef, run.args.clip_vloss, weights)
    mean_entropy = mean(entropy, weights)
    loss = pg_loss + run.args.vf_coef * v_loss
    if run.args.ent_coef > 0:  # a weight of 0 would cost its backward pass all the same
        loss = loss - ent_coef * mean_entropy

    optimizer.zero_grad()
    run.fabric.backward(loss)
    losses = torch.stack((pg_loss, v_loss, mean_entropy)).detach()
    metrics = torch.cat((losses, policy_metrics(logratio.detach(), clip_coef, weights)))
    metrics = average_gradients(run.fabric, optimizer, metrics)  # over ranks, with the gradient in one message
    optimizer.clip_gradient(run.args.max_grad_norm)
    optimizer.step()
    return metrics


def train_epoch(step: Callable[..., Tensor], norm_adv: bool, data: Batch, epoch: Batch, *coefs: Coef) -> Tensor:
    """One pass over the rollout: METRICS of each minibatch, [M, 6]."""
    return torch.stack([step(batch, *coefs) for batch in minibatches(data, epoch, norm_adv)])


def train(run: Run, run_epoch: Callable[..., Tensor], data: Batch, *coefs: Coef) -> Tensor:
    """The update: epochs of minibatch steps, which end early once the policy has moved by `target_kl`.

    Args:
        coefs: of clipping and of the entropy.

    Returns METRICS of all minibatches, [E M, 6]; of fewer after an early stop.
    """
    history: list[Tensor] = []
    for epoch in shuffled(run.fabric, data, run.args.update_epochs, run.args.num_minibatches, run.device_rng):
        history.append(run_epoch(data, epoch, *coefs))
        if run.args.target_kl is not None and history[-1][-1, METRICS.index("losses/approx_kl")] > run.args.target_kl:
            break  # on all ranks or on none, since metrics are averaged
    return torch.cat(history)


def main() -> int:
    with Run(parse(PPOArgs, "ppo", PRESETS), "ppo", ACTION_SPACES, images=True) as run:
        args = run.args
        # --- Environments
        envs = run.make_envs()

        # --- Agent and optimizer
        agent = make_agent(args, envs)
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
        update_step = run.compiled(partial(update, run, model, optimizer))
        run_epoch = run.captured(partial(train_epoch, update_step, args.norm_adv))

        run.restore(agent=agent, optimizer=optimizer)

        # --- Buffer
        rb = run.rollout_buffer(agent)

        # --- Start
        if run.needs_warmup:
            with run.warmup(partial(rollout, run, agent, envs, rb)):
                train(run, run_epoch, returns_and_advantages(run, model, agent, rb), *run.coefs(0.0, 0.0))
        rb.start(run.reset(), run.masks)

        for step in run.iterations(args.num_steps * args.num_envs):
            # 1. Rollout
            rollout(run, run.player(agent), envs, rb)
            if step == 0:  # nothing is learned from observations that are not normalised yet
                run.update_normalizer(agent, rb)

            # 2. Returns and advantages
            data = returns_and_advantages(run, model, agent, rb)

            # 3. Update
            progress = step / args.total_timesteps
            learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
            clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
            ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
            optimizer.param_groups[0]["lr"].fill_(learning_rate)  # in place: a compiled step keeps this tensor
            run.add_metrics(METRICS, train(run, run_epoch, data, *run.coefs(clip_coef, ent_coef)))
            if step > 0:  # after the update: a rollout's actions and losses see the same statistics
                run.update_normalizer(agent, rb)
            run.clock.lap("train")

            # 4. Log
            run.record_rollout(rb)
            run.evaluate(agent)
            if run.log_is_due:
                explained = explained_variance(run.fabric, data.values, data.returns, data.valid).item()
                run.log({"charts/learning_rate": learning_rate, "losses/explained_variance": explained})

            # 5. Checkpoint
            run.checkpoint()
            rb.start()
    return run.exit_code


if __name__ == "__main__":
    run_script(main)
