"""ppo.py, decoupled: the first ranks play, the others train (Schulman et al. 2017, arXiv:1707.06347).

    python fabricrl/algos/ppo/ppo_decoupled.py --env-id CartPole-v1 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/ppo/ppo_decoupled.py

Rank 0 plays, or the first P ranks with --players P. At the start all say that they are ready: Hello, Ready. Then come
the messages of each iteration. A player runs up to --max-lag iterations ahead of Answers; with 0 it waits for each:

    Order     player → each trainer    a Rollout: its share, and the coefficients to train with
    Answer    first trainer → players  all parameters; losses, faults and signals of the trainers
    State     first trainer → rank 0   the optimizer's state and the trainers' generators, at a checkpoint

Normalisers stay with the players, who alone see raw observations and rewards. Shapes as in ppo.py; B rows of a share,
from P players.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fabricrl.algos.decoupled import Messages, Player, Trainers, checked, run_ranks
from fabricrl.algos.ppo.agent import ACTION_SPACES, make_agent
from fabricrl.algos.ppo.args import PRESETS, PPODecoupledArgs
from fabricrl.algos.ppo.ppo import METRICS, returns_and_advantages, rollout, train, train_epoch, update
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.data import Batch
from fabricrl.utils import Adam, anneal, explained_variance
from fabricrl.utils.errors import require


class Rollout(NamedTuple):
    """A trainer's share of a player's rollout, every n-th row for n trainers, and how to train on it."""

    learning_rate: float
    clip_coef: float
    ent_coef: float
    data: Batch  # [B / P, ...]; frame stacks are put together
    steps: int = 1  # time steps by which the rows are ordered, equally many rows in each; 1: unordered

    def joined(self, others: "list[Rollout]") -> "Rollout":
        """The shares of several players as one, step by step: as the environments of one player would lie, [B, ...]."""
        columns = [rollout.data.columns for rollout in (self, *others)]
        data = {name: [part[name] for part in columns] for name, column in columns[0].items() if column is not None}
        joined = {name: torch.cat([p.unflatten(0, (self.steps, -1)) for p in parts], 1) for name, parts in data.items()}
        return self._replace(data=self.data.with_columns(**{name: c.flatten(0, 1) for name, c in joined.items()}))


def declare_share(run: Run, agent: Any) -> Batch:
    """Names, shapes and types of a player's message to a trainer."""
    trainers = run.fabric.world_size if run.trainers is None else run.trainers.count
    rows = run.args.num_steps * run.global_args.num_envs // (run.global_args.players * trainers)  # B / P
    names = ("logprobs", "values", "advantages", "returns")
    return Batch(
        obs=torch.zeros(rows, *agent.obs_shape, dtype=agent.obs_dtype),
        actions=torch.zeros(rows, agent.head.num_actions, dtype=agent.head.dtype),
        masks=torch.zeros(rows, run.mask_size, dtype=torch.bool) if run.mask_size else None,
        valid=torch.ones(rows, dtype=torch.bool),
        **dict.fromkeys(names, torch.zeros(rows)),
    )


def as_trained(data: Batch, device: torch.device) -> Batch:
    """The batch that has travelled, on the device; `valid`, a byte a row on the way, is numbers again."""
    return data.with_columns(valid=None if data.valid is None else data.valid.float()).to(device)


def divide(run: Run, data: Batch) -> Iterator[tuple[Batch, int]]:
    """Yields each trainer's share of this player's rows [T N], and the number of time steps that order it."""
    numbers = torch.arange(len(data)).view(run.args.num_steps, -1)[:, run.own_envs]
    own, count = data if numbers.numel() == len(data) else data[numbers.flatten()], run.trainers.count
    for rank in range(count):
        yield own[rank::count], len(numbers) if numbers.shape[1] % count == 0 else 1


def check_division(args: Any, count: int) -> None:
    """Raises ConfigError unless `count` trainers can share minibatches equally, and the rollouts of each player."""
    minibatch = args.num_steps * args.num_envs // args.num_minibatches
    allowed = f"such that each of {count} trainers has an equal share of every minibatch of {minibatch}"
    require(minibatch % count == 0, "num_envs", args.num_envs, allowed)
    rows = args.num_steps * args.num_envs // args.players
    allowed = f"such that each of {count} trainers has an equal share of the {rows} steps of each player"
    require(rows % count == 0, "num_envs", args.num_envs, allowed)


def player(args: PPODecoupledArgs, run: Run, trainers: Trainers) -> int:
    """main() of ppo.py, with the line `train(...)` replaced by messages to the trainers."""
    with run:
        # --- Environments
        envs = run.make_envs()

        # --- Agent, and the optimizer's state for checkpoints
        agent = make_agent(args, envs)
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))

        run.restore(agent=agent, optimizer=optimizer)
        share = Rollout(0.0, 0.0, 0.0, declare_share(run, agent))
        trainers.begin(Messages(share, METRICS, agent, optimizer))  # → Hello, ← Ready

        # --- Buffer
        rb = run.rollout_buffer(agent)

        # --- Start
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
            shares = divide(run, data)
            trainers.train(Rollout(learning_rate, clip_coef, ent_coef, *share) for share in shares)  # → Order, ← Answer
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

        # --- Close
        trainers.stop()  # → Order
    return run.exit_code


def trainer(args: PPODecoupledArgs, run: Run, player: Player) -> None:
    """The line `train(...)` of ppo.py's main(), for as long as the player wants it."""
    # --- Agent and optimizer
    agent = make_agent(args, run.env_spaces)
    model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
    update_step = run.compiled(partial(update, run, model, optimizer))
    run_epoch = run.captured(partial(train_epoch, update_step, args.norm_adv))

    run.restore(agent=agent, optimizer=optimizer)

    # --- Start
    share = Rollout(0.0, 0.0, 0.0, declare_share(run, agent))
    player.meet(Messages(share, METRICS, agent, optimizer))  # ← Hello
    share = share.joined([share] * (player.count - 1))
    if run.needs_warmup:
        with run.warmup():
            valid = share.data.valid if player.skips else None
            data = as_trained(share.data.with_columns(valid=valid), run.fabric.device)
            train(run, run_epoch, data, *run.coefs(0.0, 0.0))

    for order in player.orders():  # → Ready, ← Order
        # 3. Update
        learning_rate, clip_coef, ent_coef, data, _ = order.data
        optimizer.param_groups[0]["lr"].fill_(learning_rate)  # in place: a compiled step keeps this tensor
        data = as_trained(data, run.fabric.device)
        run.add_metrics(METRICS, train(run, run_epoch, data, *run.coefs(clip_coef, ent_coef)))

        # 4. Log, 5. Checkpoint
        player.answer(order)  # → Answer; State where a checkpoint is due


def main() -> int:
    args = checked(parse(PPODecoupledArgs, "ppo", PRESETS), check_division)
    run = Run(args, "ppo", ACTION_SPACES, images=True)
    return run_ranks(run, player, trainer, check_division)


if __name__ == "__main__":
    run_script(main)
