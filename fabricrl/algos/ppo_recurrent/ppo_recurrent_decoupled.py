"""ppo_recurrent.py, decoupled: the first ranks play, the others train (Schulman et al. 2017, arXiv:1707.06347).

    python fabricrl/algos/ppo_recurrent/ppo_recurrent_decoupled.py --env-id CartPole-v1 --mask-velocities --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 \
        fabricrl/algos/ppo_recurrent/ppo_recurrent_decoupled.py

Rank 0 plays, or the first P ranks with --players P. At the start all say that they are ready: Hello, Ready. Then come
the messages of each iteration. A player runs up to --max-lag iterations ahead of Answers; with 0 it waits for each:

    Order     player → each trainer    a Rollout: its share, and the coefficients to train with
    Answer    first trainer → players  all parameters; losses, faults and signals of the trainers
    State     first trainer → rank 0   the optimizer's state and the trainers' generators, at a checkpoint

Memory stays with the player. With each step travels the state of the cores before it: a trainer's minibatch may cut a
sequence anywhere. Normalisers stay with the player, too. Shapes as in ppo_recurrent.py; B rows of a share, from P
players.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fabricrl.algos.decoupled import Messages, Player, Trainers, checked, run_ranks
from fabricrl.algos.ppo.ppo import METRICS
from fabricrl.algos.ppo.ppo_decoupled import as_trained, check_division, declare_share
from fabricrl.algos.ppo_recurrent.agent import ACTION_SPACES, RecurrentPPOAgent, make_agent
from fabricrl.algos.ppo_recurrent.args import PRESETS, RecurrentPPODecoupledArgs
from fabricrl.algos.ppo_recurrent.ppo_recurrent import recorded_update, returns_and_advantages, rollout, train
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.data import Batch
from fabricrl.models.recurrent import Sequences
from fabricrl.utils import Adam, anneal, explained_variance


class Rollout(NamedTuple):
    """A trainer's share of a player's rollout, consecutive rows of it, and how to train on it."""

    learning_rate: float
    clip_coef: float
    ent_coef: float
    data: Batch  # [B / P, ...]; frame stacks are put together
    ends: Tensor  # [B / P], rows that no sequence goes beyond

    def joined(self, others: "list[Rollout]") -> "Rollout":
        """The shares of several players one after the other, environment by environment, [B, ...]."""
        columns = [rollout.data.columns for rollout in (self, *others)]
        data = {name: [part[name] for part in columns] for name, column in columns[0].items() if column is not None}
        joined = self.data.with_columns(**{name: torch.cat(parts) for name, parts in data.items()})
        return self._replace(data=joined, ends=torch.cat([self.ends, *(other.ends for other in others)]))


def declare_rollout(run: Run, agent: RecurrentPPOAgent) -> Rollout:
    """Names, shapes and types of a player's message to a trainer."""
    data = declare_share(run, agent)
    rows = len(data.actions)  # B / P
    memory = {"previous": torch.zeros(rows, agent.num_prev)}
    memory["states"] = torch.zeros(rows, agent.memory_size - agent.num_prev)
    return Rollout(0.0, 0.0, 0.0, data.with_columns(**memory), torch.zeros(rows, dtype=torch.bool))


def divide(run: Run, data: Batch, ends: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    """The rollout of this player's own environments, one after the other, and its `ends` [N T], in equal parts.

    A sequence that lies in two of them is cut there; what another player's share brings after it is another one.
    """
    own, num_steps = run.own_envs, run.args.num_steps
    rows = (own.stop - own.start) * num_steps // run.trainers.count
    for first in range(own.start * num_steps, own.stop * num_steps, rows):
        part = slice(first, first + rows)
        own_ends = ends[part].clone()
        own_ends[-1] = True
        yield data[part], own_ends


def player(args: RecurrentPPODecoupledArgs, run: Run, trainers: Trainers) -> int:
    """main() of ppo_recurrent.py, with the line `train(...)` replaced by messages to the trainers."""
    with run:
        # --- Environments
        envs = run.make_envs()

        # --- Agent, and the optimizer's state for checkpoints
        agent = make_agent(args, envs)
        # The wrapped model is for trainers alone: the rollout is evaluated by the agent itself
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))  # noqa: RUF059

        run.restore(agent=agent, optimizer=optimizer)
        share = declare_rollout(run, agent)
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
            data, sequences = returns_and_advantages(run, agent, rb)

            # 3. Update
            progress = step / args.total_timesteps
            learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
            clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
            ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
            optimizer.param_groups[0]["lr"].fill_(learning_rate)  # in place: a compiled step keeps this tensor
            shares = divide(run, data, sequences.ends)
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


def trainer(args: RecurrentPPODecoupledArgs, run: Run, player: Player) -> None:
    """The line `train(...)` of ppo_recurrent.py's main(), for as long as the player wants it."""
    # --- Agent and optimizer
    agent = make_agent(args, run.env_spaces)
    model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
    update_step = recorded_update(run, model, optimizer)

    run.restore(agent=agent, optimizer=optimizer)

    # --- Start
    share = declare_rollout(run, agent)
    player.meet(Messages(share, METRICS, agent, optimizer))  # ← Hello
    share = share.joined([share] * (player.count - 1))
    if run.needs_warmup:
        with run.warmup():
            valid = share.data.valid if player.skips else None
            data = as_trained(share.data.with_columns(valid=valid), run.fabric.device)
            for sequences in Sequences(share.ends[:, None], args.sequence_length).of_all_sizes(run.captures):
                train(run, update_step, data, sequences, *run.coefs(0.0, 0.0))

    for order in player.orders():  # → Ready, ← Order
        # 3. Update
        learning_rate, clip_coef, ent_coef, data, ends = order.data
        optimizer.param_groups[0]["lr"].fill_(learning_rate)  # in place: a compiled step keeps this tensor
        data, sequences = as_trained(data, run.fabric.device), Sequences(ends[:, None], args.sequence_length)
        run.add_metrics(METRICS, train(run, update_step, data, sequences, *run.coefs(clip_coef, ent_coef)))

        # 4. Log, 5. Checkpoint
        player.answer(order)  # → Answer; State where a checkpoint is due


def main() -> int:
    args = checked(parse(RecurrentPPODecoupledArgs, "ppo_recurrent", PRESETS), check_division)
    run = Run(args, "ppo_recurrent", ACTION_SPACES, images=True)
    return run_ranks(run, player, trainer, check_division)


if __name__ == "__main__":
    run_script(main)
