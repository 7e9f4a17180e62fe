"""Checkpoints of an earlier version go on as they would have then, and can be played.

Each folder of tests/data/checkpoints is a run that stopped nowhere: its checkpoint in the middle, which is resumed
here, and its last one, which is what has to come out. They are of commit 1fd16ff, whose gradients were written by hand,
and were made there, with the folder `old` beside it, by

    cd old; export PYTHONPATH=..; algos=../fabricrl/algos
    env="--env-id tests.envs:Deterministic-v0 --num-envs 2 --norm-obs --hidden-sizes 8 --num-threads 1 --logger csv"
    env="$env --checkpoint-every 96 --total-timesteps 192"
    ppo="--num-steps 16 --num-minibatches 2 --update-epochs 2 --learning-rate 0.01 --norm-reward --anneal-clip"
    sac="--learning-starts 32 --buffer-size 40 --batch-size 8 --n-step 2 --num-critics 3 --tau 0.05"
    discrete='{"truncate": true}' continuous='{"continuous": true, "truncate": true}'
    python $algos/ppo/ppo.py $env $ppo --env-kwargs "$discrete"
    python $algos/ppo/ppo_decoupled.py $env $ppo --env-kwargs "$discrete" --devices 2 --max-lag 0
    python $algos/ppo_recurrent/ppo_recurrent.py $env $ppo --env-kwargs "$discrete" --rnn-hidden-size 8
    python $algos/sac/sac.py $env $sac --env-kwargs "$continuous"
    python $algos/sac/sac_decoupled.py $env $sac --env-kwargs "$continuous" --devices 2 --max-lag 0
    python $algos/droq/droq.py $env $sac --env-kwargs "$continuous" --replay-ratio 2 --dropout 0

(what dropout draws comes in another order now), and copied from logs/*/*/*/checkpoints/step_*.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo, ppo_decoupled
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac, sac_decoupled
from fabricrl.envs.spaces import text_of
from fabricrl.envs.structure import stored_spaces
from tests.process import call, load, run_team

DATA = Path(__file__).parent / "data/checkpoints"
SCRIPTS: dict[str, Any] = {
    "ppo": ppo, "ppo_recurrent": ppo_recurrent, "sac": sac, "droq": droq,
    "ppo_decoupled": ppo_decoupled, "sac_decoupled": sac_decoupled,
}  # fmt: skip


def checkpoint(name: str, step: int) -> Path:
    return DATA / name / f"step_{step:012d}.ckpt"


def learned(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters, statistics and moments."""
    state = state | state.get("learner", {})
    found = dict(state["agent"])
    for name in {"optimizer", "q_optimizer", "actor_optimizer"} & state.keys():
        found |= {f"{name}.{part}": value for part, value in state[name]["state"][0].items()}
    return found


def test_there_is_one_of_each_script_and_none_is_large() -> None:
    assert {path.name for path in DATA.iterdir()} == SCRIPTS.keys()
    assert all(path.stat().st_size < 100 * 1024 for path in DATA.glob("*/*"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_goes_on_as_it_would_have_then(name: str, tmp_path: Path) -> None:
    """DroQ's goes on as well as it would have, from other batches: it draws them for each environment's step now."""
    line = ["--resume", checkpoint(name, 96), "--log-dir", tmp_path / "logs"]
    if "decoupled" in name:
        last = load(run_team(SCRIPTS[name].__name__, *line, folder=tmp_path).result["checkpoint"])
    else:
        last = load(call(SCRIPTS[name].main, *line).checkpoint)
    then = load(checkpoint(name, 192))
    for part in ("algo", "global_step", "world_size"):
        assert last[part] == then[part]
    spaces = stored_spaces(last)
    assert {"obs": text_of(spaces.obs), "actions": text_of(spaces.actions)} == then["spaces"]
    assert last["episodes"]["count"] == then["episodes"]["count"]
    before, expected, found = (learned(state) for state in (load(checkpoint(name, 96)), then, last))
    assert found.keys() == expected.keys()
    if name == "droq":
        assert all((found[part] != value).any() for part, value in before.items() if part.endswith("weight"))
        return
    assert last["episodes"]["returns"] == pytest.approx(then["episodes"]["returns"], rel=1e-4)
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=1e-3, atol=1e-5, msg=lambda text, part=part: part + text)
    assert any((expected[part] - value).abs().max() > 0.01 for part, value in before.items()), "nothing was learned"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_is_played(name: str) -> None:
    finished = call(evaluate.main, checkpoint(name, 192), "--episodes", 2, "--json")
    assert json.loads(finished.out)["greedy"]["length_mean"] == 8
