"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for one process or many.

    python fabricrl/algos/ppo/ppo.py --env-id CartPole-v1
    python fabricrl/algos/ppo/ppo.py --env-id CartPole-v1 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/ppo/ppo.py --env-id CartPole-v1

Shapes: T steps, N environments of a rank, W ranks, D observation size, A action size, M minibatches, B = T N / M rows,
R size of an observation's row: D numbers, or the bytes of a record with images.
"""

from typing import Any

import torch
from gymnasium.vector import VectorEnv
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabricrl.algos.args import parse
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo.loss import approx_kl, clip_fraction, entropy_loss, policy_loss, value_loss
from fabricrl.algos.ppo.utils import ACTION_SPACES, make_agent
from fabricrl.data.buffers import RolloutBuffer, Stacks
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe, env_actions
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
def rollout(player: PPOAgent, envs: VectorEnv, rb: RolloutBuffer, rng: torch.Generator, clock: Stopwatch) -> None:
    """Plays T steps in every environment. Values and log-probabilities come later, in one batch."""
    num_steps, device = len(rb.actions), next(player.parameters()).device
    noise = player.head.noise(rb.actions.shape[:2], rng).to(device).unbind()  # T × [N, ...]
    try:
        for t in range(num_steps):
            actions = player.act(rb.seen(t).to(device), noise[t]).cpu().numpy()  # [N, A]
            clock.lap("act")
            step = envs.step(env_actions(envs.single_action_space, actions))
            clock.lap("env")
            rb.add(t, actions, *step)
    finally:
        if problem := rb.first_bad():  # also if an environment choked on the action that NaN led to
            raise NonFiniteError(problem)


@torch.no_grad()
def returns_and_advantages(
    player: PPOAgent, rb: RolloutBuffer, carry: Tensor, args: PPOArgs, fabric: Fabric
) -> tuple[dict[str, Any], Tensor]:
    """The rollout as training data, each [T N, ...] on the device, and the discounted reward carried on, [N]."""
    rewards, dones = rb.rewards.sign() if args.clip_reward else rb.rewards.clone(), rb.dones  # [T, N]
    if player.reward_normalizer is not None:
        sums, carry = discounted_sums(rewards, dones, carry, args.gamma)
        player.reward_normalizer.update(sums[~rb.skipped][:, None].to(fabric.device), fabric)
        rewards = player.scale_rewards(rewards.to(fabric.device)).cpu()
    limits = rb.time_limits()
    if limits is not None and args.bootstrap_truncated:
        t, env, final_obs = limits
        rewards[t, env] += args.gamma * player.value(final_obs.to(fabric.device)).cpu()  # truncated, not terminated
    inputs, next_inputs = rb.inputs(player.prepare, fabric.device)  # [T N, ...], [N, ...]
    actions = rb.actions.flatten(0, 1).to(fabric.device)  # [T N, A]
    with fabric.autocast():  # as in the update, so that the first ratio is 1 in any precision
        logprobs, values = evaluate(player, inputs, actions)  # [T N]: the policy has not changed since it acted
        next_values = player.prepared_value(next_inputs)  # [N]
    logprobs, values, next_values = logprobs.float(), values.float(), next_values.float()
    estimates = gae(rewards, values.cpu().view(dones.shape), dones, next_values.cpu(), args.gamma, args.gae_lambda)
    advantages, returns = (estimate.flatten().to(fabric.device) for estimate in estimates)
    columns = {"advantages": advantages, "returns": returns, "values": values, "actions": actions, "logprobs": logprobs}
    data: dict[str, Any] = columns | {"obs": inputs}
    if (count := rb.count(fabric)) < len(actions):
        kept = (~rb.skipped).flatten().nonzero()[:count, 0].to(fabric.device)
        data = {name: column[kept] for name, column in columns.items()}
        data["obs"] = inputs.rows(kept) if isinstance(inputs, Stacks) else inputs[kept]
    return data, carry


def evaluate(player: PPOAgent, inputs: Tensor | Stacks, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log π(a|s) and V(s), [T N] each; of images some at a time, which stay in the caches."""
    rows = len(actions) if player.encoder is None else 256
    parts = [player(inputs[at : at + rows], actions[at : at + rows]) for at in range(0, len(actions), rows)]
    logprobs, _, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, values


class Objective(nn.Module):
    """L = L_policy + c_ent L_entropy + c_vf L_value (Eq. 9, negated). What DDP wraps and `--compile` compiles:
    its forward is the one gradient path."""

    def __init__(self, agent: PPOAgent, args: PPOArgs) -> None:
        super().__init__()
        self.agent, self.clip_vloss, self.vf_coef = agent, args.clip_vloss, args.vf_coef

    def forward(
        self, batch: AsIs | dict[str, Tensor], clip_coef: float | Tensor, ent_coef: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Minibatch [B, ...] → the loss; detached: policy, value and entropy loss [3], and log ratios [B]."""
        new_logprobs, entropy, new_values = self.evaluate(batch)
        logratio = new_logprobs - batch["logprobs"]
        pg_loss = policy_loss(logratio, batch["advantages"], clip_coef)
        v_loss = value_loss(new_values, batch["values"], batch["returns"], clip_coef, self.clip_vloss)
        ent_loss = entropy_loss(entropy)
        loss = pg_loss + self.vf_coef * v_loss
        if isinstance(ent_coef, Tensor) or ent_coef > 0:  # a weight of 0 would cost its backward pass all the same
            loss = loss + ent_coef * ent_loss
        return loss, torch.stack((pg_loss, v_loss, ent_loss)).detach(), logratio.detach()

    def evaluate(self, batch: AsIs | dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a|s), entropy and value now; each [B]."""
        return self.agent(batch["obs"], batch["actions"])


def train(
    fabric: Fabric,
    objective: nn.Module,
    flat: FlatParameters,
    optimizer: torch.optim.Optimizer,
    data: dict[str, Any],
    rng: torch.Generator,
    args: PPOArgs,
    clip_coef: float,
    ent_coef: float,
) -> dict[str, Tensor]:
    """The update: epochs of minibatch steps. Returns the losses of all minibatches, still on the device.

    Raises:
        NonFiniteError: as `checked` does.
    """
    history: list[tuple[Tensor, Tensor]] = []
    batch_size = len(data["returns"])
    kept = batch_size // args.num_minibatches * args.num_minibatches  # all, unless steps were skipped
    coefs = compiled_coefs(fabric, clip_coef, ent_coef) if args.compile else (clip_coef, ent_coef)
    for _ in range(args.update_epochs):
        order = torch.randperm(batch_size, generator=rng)[:kept].view(args.num_minibatches, -1).to(fabric.device)
        shuffled = {name: column[order] for name, column in data.items() if name != "obs"}  # [M, B, ...]
        if args.norm_adv:
            shuffled["advantages"] = normalize_rows(fabric, shuffled["advantages"])
        for rows, minibatch in zip(order, zip(*shuffled.values(), strict=True), strict=True):
            batch = dict(zip(shuffled, minibatch, strict=True)) | {"obs": data["obs"][rows]}
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


def checked(history: list[tuple[Tensor, Tensor]], flat: FlatParameters, clip_coef: float) -> dict[str, Tensor]:
    """What the objective has returned for K minibatches, under the tags of the log; [K] each.

    Raises:
        NonFiniteError: a loss or a parameter is NaN or infinite, as it is once a gradient was.
    """
    losses, logratios = (torch.stack(column) for column in zip(*history, strict=True))  # [K, 3], [K, B]
    metrics = {"losses/policy_loss": losses[:, 0], "losses/value_loss": losses[:, 1], "losses/entropy": -losses[:, 2]}
    metrics |= {"losses/old_approx_kl": -logratios.mean(1), "losses/approx_kl": approx_kl(logratios)}
    metrics["losses/clipfrac"] = clip_fraction(logratios, clip_coef)
    finite = torch.stack([value.isfinite().all() for value in (flat.vector, *metrics.values())])
    if not finite.all():
        names = [name for name, good in zip(("parameters", *metrics), finite.tolist(), strict=True) if not good]
        raise NonFiniteError(f"not finite after the update: {', '.join(names)}")
    return metrics


def compiled_coefs(fabric: Fabric, *coefs: float) -> tuple[Tensor, ...]:
    """Coefficients as tensors: numbers would become part of the compiled code, which annealing would compile anew."""
    return tuple(torch.tensor(coef, device=fabric.device) for coef in coefs)


def compile_ahead(
    fabric: Fabric, objective: nn.Module, flat: FlatParameters, agent: PPOAgent, size: int, args: PPOArgs
) -> None:
    """Compiles forward and backward on an empty minibatch of `size` rows now, not within the first update."""
    batch = {name: torch.zeros(size) for name in ("advantages", "returns", "values", "logprobs")}
    batch["obs"] = torch.zeros(size, *agent.obs_shape, dtype=agent.obs_dtype)
    batch["actions"] = torch.zeros(size, agent.head.num_actions, dtype=agent.head.dtype)
    batch = {name: column.to(fabric.device) for name, column in batch.items()}
    fabric.backward(objective(AsIs(batch), *compiled_coefs(fabric, args.clip_coef, args.ent_coef))[0])
    flat.collect_gradients()


def main() -> int:
    args = parse(PPOArgs, "ppo", PRESETS)
    video_mode = "rgb_array" if args.capture_video else None
    spaces = describe(*check_env(args, ACTION_SPACES, video_mode, images=True))
    state, resumed = load_checkpoint(args.resume, "ppo") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps over all ranks

    # --- Fabric, seed, run folder
    stop = StopSignal()
    fabric = launch(args)
    batch_size = args.num_steps * args.num_envs * fabric.world_size  # steps an iteration takes
    require(batch_size <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {batch_size}")
    if state:
        check_batch(state, args, fabric.world_size)
        check_spaces(state["spaces"], spaces)
    run = Run(fabric, args, "ppo", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)

    # --- Environments
    with failing_together(fabric):
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent and optimizer
    player = make_agent(args, envs)  # acts and evaluates; gradients flow through `objective` alone
    objective: nn.Module = Objective(player, args)
    objective = fabric.setup_module(torch.compile(objective) if args.compile else objective)
    flat = FlatParameters(player)
    adam = torch.optim.Adam([flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda"))
    optimizer = fabric.setup_optimizers(adam)

    # --- Metrics and buffer
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()
    obs_space, head = envs.single_observation_space, player.head
    rb = RolloutBuffer(args.num_steps, args.num_envs, obs_space, head.num_actions, head.dtype, args.frame_stack)
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
        minibatch_size = args.num_steps * args.num_envs // args.num_minibatches
        compile_ahead(fabric, objective, flat, player, minibatch_size, args)

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
        data, carry = returns_and_advantages(player, rb, carry, args, fabric)

        # 3. Update
        progress = (global_step - batch_size) / args.total_timesteps
        learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
        clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
        ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
        optimizer.param_groups[0]["lr"] = learning_rate
        with failing_together(fabric):
            losses.update(train(fabric, objective, flat, optimizer, data, train_rng, args, clip_coef, ent_coef))
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
            charts["losses/explained_variance"] = explained_variance(data["values"], data["returns"]).item()
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
