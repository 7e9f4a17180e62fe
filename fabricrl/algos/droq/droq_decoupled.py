"""droq.py, decoupled: the first ranks play, the others train (Hiraoka et al. 2022, arXiv:2110.02034v2).

    python fabricrl/algos/droq/droq_decoupled.py --env-id HalfCheetah-v4 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/droq/droq_decoupled.py --num-envs 2

Each trainer owns the replay buffer of its share of the environments, and draws its share of every batch from that: a
transition travels once, however often it is learned from.

Rank 0 plays, or the first P ranks with --players P. At the start all say that they are ready: Hello, Ready. Then come
the messages of each iteration. A player runs up to --max-lag iterations ahead of Answers; with 0 it waits for each:

    Order     player → each trainer    Steps of its environments, the normaliser, and which updates are due
    Answer    first trainer → players  parameters of actor, temperature and encoder; losses, faults and signals
    State     first trainer → rank 0   critics, targets, optimizers and generators, at a checkpoint

Everything but the update is SAC's. Shapes as in droq.py.
"""

from fabricrl.algos.decoupled import Player, Trainers, checked, run_ranks
from fabricrl.algos.droq.agent import ACTION_SPACES, make_agent
from fabricrl.algos.droq.args import DroQDecoupledArgs
from fabricrl.algos.droq.droq import make_sample_and_train, rollout, setup, spread_updates
from fabricrl.algos.off_policy import make_buffer, make_schedule, restore_replay
from fabricrl.algos.off_policy.decoupled import check_division, divide, store, take_share_of_args
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.sac_decoupled import make_messages


def player(args: DroQDecoupledArgs, run: Run, trainers: Trainers) -> int:
    """main() of droq.py, with the updates replaced by messages to the trainers."""
    with run:
        # --- Schedule and buffer: first, as there may not be the memory for it
        schedule = make_schedule(run)
        rb = make_buffer(run)

        # --- Environments
        envs = run.make_envs()

        # --- Agent, and the optimizers' state for checkpoints
        agent = make_agent(args, envs)
        learner = setup(run, agent)

        run.restore(agent=agent, q_optimizer=learner.q_optimizer, actor_optimizer=learner.actor_optimizer)
        trainers.begin(make_messages(run, learner))  # → Hello, ← Ready
        restore_replay(run, rb, schedule)

        # --- Start
        rb.start(run.reset())
        trainers.send(divide(rb, agent, trainers), bulk=schedule.explores(run.global_step))  # → Order

        for step in run.iterations(args.num_envs):
            # 1. Rollout
            rollout(run, run.player(agent), envs, rb, schedule.explores(step))
            if agent.obs_normalizer is not None:
                agent.obs_normalizer.update(run.to_device(rb.newest_vectors()), run.fabric)

            # 2. Sample
            steps = schedule.steps_due(step, run.global_step)
            _, count = schedule.take(run.global_step)  # critic updates, each of which draws a batch

            # 3. Update
            shares = divide(rb, agent, trainers, (count, steps))
            trainers.train(shares, steps > 0, schedule.explores(run.global_step))  # → Order, ← Answer
            run.clock.lap("train")

            # 4. Log
            run.record_step()
            run.evaluate(agent)
            if run.log_is_due:
                run.log({"charts/learning_rate": args.policy_lr})

            # 5. Checkpoint
            run.checkpoint(rb, schedule=schedule)

        # --- Close
        trainers.stop()  # → Order
    return run.exit_code


def trainer(args: DroQDecoupledArgs, run: Run, player: Player) -> None:
    """The lines of droq.py's main() that sample and update, for as long as the player wants them."""
    args = take_share_of_args(run)

    # --- Agent and optimizers
    agent = make_agent(args, run.env_spaces)
    learner = setup(run, agent)

    run.restore(agent=agent, q_optimizer=learner.q_optimizer, actor_optimizer=learner.actor_optimizer)

    # --- Buffer
    folder = player.meet(make_messages(run, learner))  # ← Hello
    rb = make_buffer(run, folder)
    refill = restore_replay(run, rb)
    sample_and_train = make_sample_and_train(run, learner, rb)

    for order in player.orders(rb, refill):  # → Ready, ← Order
        store(rb, agent, order.data)

        # 2. Sample
        count, steps = order.data.due

        # 3. Update
        for num_updates in spread_updates(count, steps):
            sample_and_train(num_updates + 1)  # the last batch is the actor's

        # 4. Log, 5. Checkpoint
        player.answer(order)  # → Answer; State where a checkpoint is due


def main() -> int:
    args = checked(parse(DroQDecoupledArgs, "droq"), check_division)
    run = Run(args, "droq", ACTION_SPACES, bounded=True, images=True)
    return run_ranks(run, player, trainer, check_division)


if __name__ == "__main__":
    run_script(main)
