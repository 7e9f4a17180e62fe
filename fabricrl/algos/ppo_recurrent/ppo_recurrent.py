"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) with memory, for one process or many.

    python fabricrl/algos/ppo_recurrent/ppo_recurrent.py --env-id CartPole-v1 --mask-velocities
    python fabricrl/algos/ppo_recurrent/ppo_recurrent.py --env-id CartPole-v1 --mask-velocities --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/ppo_recurrent/ppo_recurrent.py

Rollouts are cut into sequences at the ends of episodes, and each sequence is trained on from the memory that was there.

Shapes: T steps, N environments of a rank, W ranks, D observation size, I inputs of the core, A action size,
M minibatches of B = T N / M rows in S sequences.
"""

from typing import Any

import torch
from gymnasium.vector import VectorEnv
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.args import parse
from fabricrl.algos.ppo.args import PRESETS
from fabricrl.algos.ppo.loss import approx_kl
from fabricrl.algos.ppo.ppo import Objective, checked, compiled_coefs
from fabricrl.algos.ppo_recurrent.agent import RecurrentPPOAgent
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.ppo_recurrent.utils import ACTION_SPACES, make_agent
from fabricrl.data.buffers import RecurrentRolloutBuffer, Stacks
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe, env_actions
from fabricrl.models.recurrent import Sequences
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore, restore_optimizer
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.launch import StopSignal, check_ranks, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.model import AsIs, FlatParameters
from fabricrl.utils.ranks import all_mean
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import (
    anneal,
    discounted_sums,
    env_seeds,
    explained_variance,
    gae,
    generators,
    normalize_rows,
    require,
)


@torch.inference_mode()
def rollout(
    player: RecurrentPPOAgent, envs: VectorEnv, rb: RecurrentRolloutBuffer, rng: torch.Generator, clock: Stopwatch
) -> None:
    """Plays T steps in every environment. Values and log-probabilities come later, in one batch."""
    num_steps, device = len(rb.actions), next(player.parameters()).device
    noise = player.head.noise(rb.actions.shape[:2], rng).to(device).unbind()  # T × [N, ...]
    try:
        for t in range(num_steps):
            drawn, states = player.act(rb.seen(t).to(device), rb.memory_rows[t], noise[t])
            actions = drawn.cpu().numpy()  # [N, A]
            clock.lap("act")
            step = envs.step(env_actions(envs.single_action_space, actions))
            clock.lap("env")
            rb.add(t, actions, *step)
            rb.remember(t, player.remember(drawn, rb.rewards[t].to(device), states))
    finally:
        if problem := rb.first_bad():  # also if an environment choked on the action that NaN led to
            raise NonFiniteError(problem)


@torch.no_grad()
def returns_and_advantages(
    player: RecurrentPPOAgent, rb: RecurrentRolloutBuffer, carry: Tensor, args: RecurrentPPOArgs, fabric: Fabric
) -> tuple[dict[str, Any], Sequences, Tensor]:
    """The rollout as training data, each [N T, ...] on the device; its sequences; the discounted reward so far, [N]."""
    rewards, dones = rb.rewards.sign() if args.clip_reward else rb.rewards.clone(), rb.dones  # [T, N]
    if player.reward_normalizer is not None:
        sums, carry = discounted_sums(rewards, dones, carry, args.gamma)
        player.reward_normalizer.update(sums[~rb.skipped][:, None].to(fabric.device), fabric)
        rewards = player.scale_rewards(rewards.to(fabric.device)).cpu()
    limits = rb.time_limits()
    if limits is not None and args.bootstrap_truncated:
        t, env, final_obs = limits
        final_values = player.value(final_obs.to(fabric.device), rb.final_memory())  # truncated, not terminated
        rewards[t, env] += args.gamma * final_values.cpu()
    sequences = Sequences(dones, args.sequence_length, rb.skipped, rb.count(fabric))
    inputs, next_inputs = rb.inputs(player.prepare, fabric.device)  # [T N, ...], [N, ...]
    by_env = torch.arange(dones.numel(), device=fabric.device).view(dones.shape).T.flatten()  # [N T]
    columns = {"actions": rb.actions.to(fabric.device), "previous": player.previous(rb.memory[:-1])}
    columns["states"] = player.states(rb.memory[:-1])
    data: dict[str, Any] = {name: column.flatten(0, 1)[by_env] for name, column in columns.items()}  # [N T, ...]
    data["obs"] = inputs.rows(by_env) if isinstance(inputs, Stacks) else inputs[by_env]
    layout = sequences.in_order().to(fabric.device)
    with fabric.autocast():  # as in the update, so that the first ratio is 1 in any precision
        # [N T]: the policy has not changed since it acted
        states = data["states"][layout.first]
        size = len(by_env) if player.encoder is None else 1024  # of images so many at a time: there is memory for those
        features = torch.cat([player.features(data["obs"][at : at + size]) for at in range(0, len(by_env), size)])
        logprobs, _, values = player.evaluate(features, data["actions"], data["previous"], states, layout)
        next_values = player.prepared_value(next_inputs, rb.memory[-1])  # [N]
    data["logprobs"], data["values"], next_values = logprobs.float(), values.float(), next_values.float()
    values = data["values"].view(rb.num_envs, -1).T.cpu()  # [T, N]
    advantages, returns = gae(rewards, values, dones, next_values.cpu(), args.gamma, args.gae_lambda)
    data |= {"advantages": advantages.T.flatten().to(fabric.device), "returns": returns.T.flatten().to(fabric.device)}
    return data, sequences, carry


class RecurrentObjective(Objective):
    """PPO's objective, its minibatch laid out as sequences."""

    def evaluate(self, batch: AsIs | dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a|s), entropy and value now; each [B]."""
        return self.agent(batch["obs"], batch["actions"], batch["previous"], batch["states"], batch["layout"])


def train(
    fabric: Fabric,
    objective: nn.Module,
    flat: FlatParameters,
    optimizer: torch.optim.Optimizer,
    data: dict[str, Any],
    sequences: Sequences,
    rng: torch.Generator,
    args: RecurrentPPOArgs,
    clip_coef: float,
    ent_coef: float,
) -> dict[str, Tensor]:
    """The update: epochs of minibatch steps. Returns the losses of all minibatches, still on the device.

    Raises:
        NonFiniteError: as `checked` does.
    """
    history: list[tuple[Tensor, Tensor]] = []
    coefs = compiled_coefs(fabric, clip_coef, ent_coef) if args.compile else (clip_coef, ent_coef)
    for _ in range(args.update_epochs):
        order, layouts = sequences.minibatches(args.num_minibatches, rng)
        order = order.to(fabric.device)  # [M, B]
        shuffled = {name: column[order] for name, column in data.items() if name not in ("obs", "states")}
        if args.norm_adv:
            shuffled["advantages"] = normalize_rows(fabric, shuffled["advantages"])
        for rows, layout, minibatch in zip(order, layouts, zip(*shuffled.values(), strict=True), strict=True):
            layout = layout.to(fabric.device)
            batch = dict(zip(shuffled, minibatch, strict=True)) | {"layout": layout, "obs": data["obs"][rows]}
            batch["states"] = data["states"][rows[layout.first]]  # [S, ...]
            loss, losses, logratio = objective(AsIs(batch), *coefs)
            fabric.backward(loss)
            flat.collect_gradients()
            if args.max_grad_norm > 0:
                flat.clip_gradients(args.max_grad_norm)
            optimizer.step()
            history.append((losses, logratio))
        if args.target_kl is not None and all_mean(fabric, approx_kl(history[-1][1])) > args.target_kl:
            break  # all ranks or none: the mean over ranks decides
    return checked(history, flat, clip_coef)


def compile_ahead(
    fabric: Fabric,
    player: RecurrentPPOAgent,
    objective: nn.Module,
    flat: FlatParameters,
    rb: RecurrentRolloutBuffer,
    args: RecurrentPPOArgs,
) -> None:
    """Compiles forward and backward on empty minibatches now, not within the first update; changes nothing."""
    size = args.num_steps * args.num_envs // args.num_minibatches
    batch: dict[str, Any] = {name: torch.zeros(size) for name in ("advantages", "returns", "values", "logprobs")}
    batch |= {"obs": torch.zeros(size, *player.obs_shape, dtype=player.obs_dtype)}
    batch |= {"actions": rb.actions.flatten(0, 1)[:size], "previous": torch.zeros(size, player.num_prev)}
    for length in (2, 3):  # how many sequences there are varies, which the second call shows to the compiler
        _, (layout, *_) = Sequences(rb.dones, length).minibatches(args.num_minibatches, torch.Generator())
        batch |= {"layout": layout, "states": torch.zeros(len(layout.first), player.memory_size - player.num_prev)}
        batch = {name: column.to(fabric.device) for name, column in batch.items()}
        fabric.backward(objective(AsIs(batch), *compiled_coefs(fabric, args.clip_coef, args.ent_coef))[0])
        flat.collect_gradients()


def main() -> int:
    args = parse(RecurrentPPOArgs, "ppo_recurrent", PRESETS)
    video_mode = "rgb_array" if args.capture_video else None
    spaces = describe(*check_env(args, ACTION_SPACES, video_mode, images=True))
    state, resumed = load_checkpoint(args.resume, "ppo_recurrent") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps over all ranks

    # --- Fabric, seed, run folder
    stop = StopSignal()
    fabric = launch(args)
    batch_size = args.num_steps * args.num_envs * fabric.world_size  # steps an iteration takes
    require(batch_size <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {batch_size}")
    if state:
        check_batch(state, args, fabric.world_size)
        check_spaces(state["spaces"], spaces)
    run = Run(fabric, args, "ppo_recurrent", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)

    # --- Environments
    with failing_together(fabric):
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent and optimizer
    player = make_agent(args, envs)  # acts and evaluates; gradients flow through `objective` alone
    objective: nn.Module = RecurrentObjective(player, args)
    objective = fabric.setup_module(torch.compile(objective) if args.compile else objective)
    flat = FlatParameters(player)
    adam = torch.optim.Adam([flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda"))
    optimizer = fabric.setup_optimizers(adam)

    # --- Metrics and buffer
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()
    obs_space, head = envs.single_observation_space, player.head
    sizes = (args.num_steps, args.num_envs, obs_space, head.num_actions, head.dtype, player.memory_size)
    rb = RecurrentRolloutBuffer(*sizes, args.frame_stack, fabric.device)
    carry = torch.zeros(args.num_envs)  # discounted reward so far, [N]

    # --- Counters
    if state:
        with reading(resumed):
            restore(player, state["agent"])
            restore_optimizer(optimizer, state["optimizer"])
            episodes.load_state_dict(state["episodes"])
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
            run.best_return = state["best_return"]
    if args.compile:
        compile_ahead(fabric, player, objective, flat, rb, args)

    run.start()
    clock = Stopwatch("env", "act", "train", "comm", "log")
    with failing_together(fabric):
        obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
    rb.start(obs)
    check_ranks(fabric, player, rb.obs[0])

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        with failing_together(fabric):
            rollout(player, envs, rb, act_rng, clock)
        clock.lap("comm")
        global_step += batch_size

        # 2. Returns and advantages
        data, sequences, carry = returns_and_advantages(player, rb, carry, args, fabric)

        # 3. Update
        progress = (global_step - batch_size) / args.total_timesteps
        learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
        clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
        ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
        optimizer.param_groups[0]["lr"] = learning_rate
        with failing_together(fabric):
            coefs = clip_coef, ent_coef
            losses.update(train(fabric, objective, flat, optimizer, data, sequences, train_rng, args, *coefs))
        if player.obs_normalizer is not None:  # after the update: actions and losses of a rollout see one normaliser
            player.obs_normalizer.update(rb.vectors(rb.obs[:-1][~rb.skipped]).to(fabric.device), fabric)
        clock.lap("train")

        # 4. Log
        episodes.update(fabric, rb.rewards, rb.ends, rb.skipped)
        exit_code = stop.exit_code(fabric)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        clock.lap("comm")
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": learning_rate, "charts/SPS": run.sps(global_step)}
            real = sequences.rows.to(fabric.device)
            charts["losses/explained_variance"] = explained_variance(data["values"][real], data["returns"][real]).item()
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)

        # 5. Checkpoint
        if run.wants_checkpoint(global_step, last):
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "optimizer": optimizer.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": rank_generators(fabric, act_rng, train_rng),
            }
            run.save(global_step, episodes.mean_return, state)
        clock.lap("log")
        if exit_code:
            break
        rb.start()

    # --- Close
    envs.close()
    run.finish(global_step, episodes)
    return exit_code


if __name__ == "__main__":
    run_script(main)
