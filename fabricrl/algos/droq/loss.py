"""Losses of DroQ, which are SAC's: Algorithm 2 of Hiraoka et al. 2022 (arXiv:2110.02034v2) beside them.

    line 6   td_target     y = r + γ (1 − terminated) ( min_i Q̄_i(s', a') − α log π(a'|s') ), by critics with dropout
    line 8   critic_loss   mean( ½ (Q_i(s, a) − y)² ) for each critic, by critics with dropout
    line 10  actor_loss    mean( α log π(a|s) − Σ_i Q_i(s, a) / C ): the mean of the critics, not their minimum

The temperature is not in the algorithm, which takes it as given;
its experiments learn it as SAC does.
"""

from fabricrl.algos.sac.loss import actor_loss, alpha_loss, critic_loss, td_target

__all__ = ["actor_loss", "alpha_loss", "critic_loss", "td_target"]
