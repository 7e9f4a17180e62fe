"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) with memory, for one process or many.

    python fabricrl/algos/ppo_recurrent/ppo_recurrent.py --env-id CartPole-v1 --mask-velocities
    python fabricrl/algos/ppo_recurrent/ppo_recurrent.py --env-id CartPole-v1 --mask-velocities --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/ppo_recurrent/ppo_recurrent.py

Rollouts are cut into sequences at the ends of episodes, and each sequence is trained on from the memory that was there.

Shapes: T steps, N environments of a rank, W ranks, D observation size, I inputs of the core, A action size,
E epochs of M minibatches of B = T N / M rows in S sequences.

The update is PPO's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from fabricrl.algos.ppo.ppo import METRICS, shaped_rewards, update
from fabricrl.algos.ppo_recurrent.agent import ACTION_SPACES, RecurrentPPOAgent, make_agent
from fabricrl.algos.ppo_recurrent.args import PRESETS, RecurrentPPOArgs
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.data import Batch, RecurrentRolloutBuffer, minibatches, with_moments
from fabricrl.envs import env_actions
from fabricrl.models.recurrent import Layout, Sequences
from fabricrl.utils import Adam, anneal, explained_variance, gae


@torch.inference_mode()
def rollout(run: Run, player: RecurrentPPOAgent, envs: VectorEnv, rb: RecurrentRolloutBuffer) -> None:
    """Plays T steps in every environment. Values and log-probabilities come later, in one batch."""
    noise = run.noise(player.head, len(rb.actions))  # [T, N, ...]
    with run.failing_together(), rb.checked():
        if run.uses_tensor_envs:  # of which all steps are one CUDA graph on a GPU
            run.take_tensor_steps(take_step, player, envs, rb, noise)
        else:
            for t, noise_t in enumerate(noise):
                take_step(run, player, envs, rb, t, noise_t)
    run.clock.lap("comm")


def take_step(
    run: Run, player: RecurrentPPOAgent, envs: VectorEnv, rb: RecurrentRolloutBuffer, t: Any, noise: Tensor
) -> None:
    """Takes step t in every environment, by actions drawn with noise [N, ...], and remembers it."""
    device = run.player_device
    drawn, states = run.act(player, rb.stacked_obs(t, device), rb.memory_at(t), noise, rb.mask(t, device))
    actions = run.for_envs(drawn)  # [N, A]
    run.clock.lap("act")
    next_obs, rewards, terminated, truncated, infos = envs.step(env_actions(run.action_space, actions))
    rb.add(t, actions, next_obs, rewards, terminated, truncated, infos)
    rb.remember(t, player.remember(drawn, rb.rewards_at(t), states))
    run.clock.lap("env")


@torch.no_grad()
def returns_and_advantages(run: Run, agent: RecurrentPPOAgent, rb: RecurrentRolloutBuffer) -> tuple[Batch, Sequences]:
    """The rollout as training data on the device, environment by environment, [N T, ...] each; and its sequences."""
    args, device = run.args, run.fabric.device
    sequences = Sequences.cut(rb.dones, args.sequence_length, args.num_minibatches, run.uses_tensor_envs)
    obs, next_obs = rb.inputs(agent.prepare, device)  # [T N, ...], [N, ...]
    memory, actions = run.to_device(rb.memory), run.to_device(rb.actions)
    by_env = torch.arange(rb.dones.numel(), device=device).view(rb.dones.shape).T.flatten()  # [N T]
    columns = {"actions": actions, "previous": agent.previous(memory[:-1]), "states": agent.states(memory[:-1])}
    columns = {name: column.flatten(0, 1)[by_env] for name, column in columns.items()}
    obs = obs[by_env] if isinstance(obs, Tensor) else obs.rows(by_env)
    data = Batch(obs=obs, **columns, **Batch(masks=rb.masks(device), valid=rb.valid(device))[by_env].columns)
    with run.fabric.autocast():
        layout = sequences.in_order().to(device)
        logprobs, values = logprobs_and_values(agent, data, layout)  # [N T]: by the policy that acted
        next_values = agent.prepared_value(next_obs, memory[-1]).float()  # [N]

    rewards = run.to_device(shaped_rewards(run, agent, rb))  # [T, N]
    if args.bootstrap_truncated and rb.has_truncated:
        t, env, final_obs = (run.to_device(part) for part in rb.truncated_episodes())
        with run.fabric.autocast():
            final_values = agent.value(final_obs, run.to_device(rb.final_memory())).float()
        rewards[t, env] += args.gamma * rb.bootstraps * final_values  # truncated, not terminated
    old_values, dones = values.view(rb.num_envs, -1).T, run.to_device(rb.dones)  # [T, N]
    advantages, returns = gae(rewards, old_values, dones, next_values, args.gamma, args.gae_lambda)  # [T, N]
    estimates = {"advantages": advantages.T.flatten(), "returns": returns.T.flatten()}
    return data.with_columns(logprobs=logprobs, values=values, **estimates), sequences


def logprobs_and_values(agent: RecurrentPPOAgent, data: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """log π(a|s) and V(s) of a rollout, [N T] each; images in chunks, for which there is memory."""
    rows = agent.rows_at_once or len(data.actions)
    features = torch.cat([agent.features(data.obs[i : i + rows]) for i in range(0, len(data.actions), rows)])
    data = data.with_columns(layout=layout, states=data.states[layout.first])
    logprobs, _, values = agent.forward_from_features(features, data)
    return logprobs, values


def recorded_update(run: Run, model: nn.Module, optimizer: Adam) -> Callable[..., Tensor]:
    """`update`, compiled and captured if that was asked for: a graph for each size of a layout, one program for all."""
    step = run.compiled(partial(update, run, model, optimizer))

    def step_of_any_size(batch: Batch, *coefs: Tensor) -> Tensor:
        return step(batch.with_columns(layout=batch.layout.sized_by_tensor()), *coefs)

    return run.captured(step_of_any_size if run.args.compile else step)


def train(run: Run, step: Callable[..., Tensor], data: Batch, sequences: Sequences, *coefs: float | Tensor) -> Tensor:
    """The update: epochs of minibatch steps, which end early once the policy has moved by `target_kl`.

    Args:
        coefs: of clipping and of the entropy.

    Returns METRICS of all minibatches, [E M, 6]; of fewer after an early stop.
    """
    args, device = run.args, run.fabric.device
    drawn = [
        sequences.minibatches(args.num_minibatches, run.device_rng, run.captures) for _ in range(args.update_epochs)
    ]
    epochs = with_moments(run.fabric, data, torch.stack([rows for rows, _ in drawn]))
    history: list[Tensor] = []
    for epoch, (_, layouts) in zip(epochs, drawn, strict=True):
        for rows, layout, batch in zip(epoch.rows, layouts, minibatches(data, epoch, args.norm_adv), strict=True):
            layout = layout.to(device)
            states = data.states[rows[layout.first]]  # [S, ...]
            history.append(step(batch.with_columns(layout=layout, states=states), *coefs))
        if args.target_kl is not None and history[-1][METRICS.index("losses/approx_kl")] > args.target_kl:
            break  # on all ranks or on none, since metrics are averaged
    return torch.stack(history)


def main() -> int:
    with Run(parse(RecurrentPPOArgs, "ppo_recurrent", PRESETS), "ppo_recurrent", ACTION_SPACES, images=True) as run:
        args = run.args
        # --- Environments
        envs = run.make_envs()

        # --- Agent and optimizer
        agent = make_agent(args, envs)
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
        update_step = recorded_update(run, model, optimizer)

        run.restore(agent=agent, optimizer=optimizer)

        # --- Buffer
        rb = run.rollout_buffer(agent)

        # --- Start
        if run.needs_warmup:
            with run.warmup(partial(rollout, run, agent, envs, rb)):
                data, some_sequences = returns_and_advantages(run, agent, rb)
                for sequences in some_sequences.of_all_sizes(run.captures):
                    train(run, update_step, data, sequences, *run.coefs(0.0, 0.0))
        rb.start(run.reset(), run.masks)

        for step in run.iterations(args.num_steps * args.num_envs):
            # 1. Rollout
            rollout(run, run.player(agent), envs, rb)
            if step == 0:  # nothing is learned from observations that are not normalised yet
                run.update_normalizer(agent, rb)

            # 2. Returns and advantages
            data, sequences = returns_and_advantages(run, agent, rb)

            # 3. Update
            progress = step / args.total_timesteps
            learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
            clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
            ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
            optimizer.param_groups[0]["lr"].fill_(learning_rate)  # in place: a compiled step keeps this tensor
            run.add_metrics(METRICS, train(run, update_step, data, sequences, *run.coefs(clip_coef, ent_coef)))
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
