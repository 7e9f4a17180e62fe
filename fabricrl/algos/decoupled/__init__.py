"""Both ends of a decoupled run: `Trainers`, whom a player drives, and `Player`, whom a trainer obeys.

    Hello    player → each trainer    once: it is ready
    Ready    first trainer → players  once: so are the trainers
    Order    player → each trainer    the data of an iteration or of several, and what to do with them
    Answer   first trainer → players  the weights to act with, if an update was due; losses, faults and signals
    State    first trainer → rank 0   what else a checkpoint holds, at one

A checkpoint has an Order of its own, because an evaluation may decide whether one is due. With `--max-lag 0`
a player waits for the Answer to its Order, with K it is up to K iterations ahead of it. After the last iteration an
Order ends the trainers; after a fault, whoever has it tells the others, by Order, Ready or Answer.

Several players are a world of their own, as several ranks of a coupled script are: they agree on faults and signals,
share statistics, and do the same at the same time. Each sends the data of its environments; the first leads: it alone
orders what is not training, and writes. With `--max-lag 0` each also sees every step of all environments
(`envs/shared.py`), and computes what one player would.
"""

from fabricrl.algos.decoupled.messages import Messages
from fabricrl.algos.decoupled.player import Player
from fabricrl.algos.decoupled.ranks import checked, run_ranks
from fabricrl.algos.decoupled.trainers import Trainers

__all__ = ["Messages", "Player", "Trainers", "checked", "run_ranks"]
