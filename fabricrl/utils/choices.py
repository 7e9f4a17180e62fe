"""Strategies and precisions of Fabric that these scripts take, and the reasons why not the others."""

from fabricrl.utils.errors import require

ALLOWED = {
    "strategy": ("auto", "ddp"),
    "precision": ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16"),
}
_SPAWNED = "a rank is a script that is started as you have started this one, and cannot be forked or spawned half-way"
_SHARDED = "it divides parameters among GPUs, and each rank acts with all of them at every step"
_SMALL = "parameters stay in 32 bits, where a small step is not lost"
REFUSED = {  # by how they begin
    "ddp_find_unused": "a parameter without a gradient keeps its value under ddp already",
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), _SPAWNED),
    **dict.fromkeys(("fsdp", "deepspeed"), _SHARDED),
    "dp": "it divides a batch among threads of one process, of which one can compute at a time",
    **dict.fromkeys(("xla", "single_xla", "single_tpu"), "it is for TPUs, which these scripts do not run on"),
    **dict.fromkeys(("16-true", "bf16-true"), _SMALL),
    "64": "observations and actions have 32 bits",
    "transformer-engine": "it is for layers of transformers, of which there are none",
}


def check_choice(name: str, given: str | None) -> None:
    """Raises ConfigError, with the reason if there is one, unless this is among what may be chosen."""
    why = next((f"; {reason}" for start, reason in REFUSED.items() if (given or "").startswith(start)), "")
    require(given in (None, *ALLOWED[name]), name, given, f"one of {', '.join(ALLOWED[name])}{why}")
