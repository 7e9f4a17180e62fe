"""sac.py, decoupled: the first ranks play, the others train (Haarnoja et al. 2018, arXiv:1812.05905v2).

    python fabricrl/algos/sac/sac_decoupled.py --env-id Pendulum-v1 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/sac/sac_decoupled.py --num-envs 2

Each trainer owns the replay buffer of its share of the environments, and draws its share of every batch from that: a
transition travels once, however often it is learned from.

Rank 0 plays, or the first P ranks with --players P. At the start all say that they are ready: Hello, Ready. Then come
the messages of each iteration. A player runs up to --max-lag iterations ahead of Answers; with 0 it waits for each:

    Order     player → each trainer    Steps of its environments, the normaliser, and which updates are due
    Answer    first trainer → players  parameters of actor, temperature and encoder; losses, faults and signals
    State     first trainer → rank 0   critics, targets, optimizers and generators, at a checkpoint

Shapes as in sac.py.
"""

from fabricrl.algos.decoupled import Messages, Player, Trainers, checked, run_ranks
from fabricrl.algos.off_policy import make_buffer, make_schedule, restore_replay
from fabricrl.algos.off_policy.decoupled import BLOCK, check_division, declare_steps, divide, store, take_share_of_args
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.agent import ACTION_SPACES, make_agent
from fabricrl.algos.sac.args import SACDecoupledArgs
from fabricrl.algos.sac.sac import (
    ACTOR_METRICS,
    CRITIC_METRICS,
    Learner,
    make_plan,
    make_sample_and_train,
    rollout,
    setup,
)


def make_messages(run: Run, learner: Learner) -> Messages:
    """Declares what a trainer and a player exchange."""
    agent, metrics = learner.agent, (*CRITIC_METRICS, *ACTOR_METRICS)
    one, block = (declare_steps(run, agent, count) for count in (1, BLOCK))
    optimizers = learner.actor_optimizer, learner.q_optimizer
    encoder = [] if agent.encoder is None else agent.encoder.parameters()
    return Messages(one, metrics, agent, *optimizers, bulk=block, max_iterations=BLOCK, extra_parameters=encoder)


def player(args: SACDecoupledArgs, run: Run, trainers: Trainers) -> int:
    """main() of sac.py, with the updates replaced by messages to the trainers."""
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
            first, count = schedule.take(run.global_step)

            # 3. Update
            shares = divide(rb, agent, trainers, (first, count))
            trainers.train(shares, count > 0, schedule.explores(run.global_step))  # → Order, ← Answer
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


def trainer(args: SACDecoupledArgs, run: Run, player: Player) -> None:
    """The lines of sac.py's main() that sample and update, for as long as the player wants them."""
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
        due = order.data.due  # number of the first update, and how many; each draws a batch

        # 3. Update
        for first, count in sample_and_train.parts(*due):
            sample_and_train(count, make_plan(args, first, count))

        # 4. Log, 5. Checkpoint
        player.answer(order)  # → Answer; State where a checkpoint is due


def main() -> int:
    args = checked(parse(SACDecoupledArgs, "sac"), check_division)
    run = Run(args, "sac", ACTION_SPACES, bounded=True, images=True)
    return run_ranks(run, player, trainer, check_division)


if __name__ == "__main__":
    run_script(main)
