"""Checkpoints whose seal is right and whose contents are not: code 3, and nothing of them is silently taken."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.utils.checkpoint import load_checkpoint, load_shard, save_checkpoint, save_shard
from fabricrl.utils.errors import CheckpointError, ConfigError
from tests.process import Finished, call

ON_POLICY: list[object] = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 1]
ON_POLICY += ["--hidden-sizes", 8, "--vectorization", "sync", "--total-timesteps", 64]
OFF_POLICY: list[object] = ["--num-envs", 2, "--buffer-size", 20, "--batch-size", 4, "--learning-starts", 8]
OFF_POLICY += ["--hidden-sizes", 8, "--num-threads", 1, "--vectorization", "sync", "--total-timesteps", 64]
SCRIPTS: dict[str, tuple[Any, list[object]]] = {
    "ppo": (ppo, ON_POLICY),
    "ppo_recurrent": (ppo_recurrent, [*ON_POLICY, "--rnn-hidden-size", 8]),
    "sac": (sac, [*OFF_POLICY, "--implicit-next-obs"]),
    "droq": (droq, [*OFF_POLICY, "--replay-ratio", 1]),
}
DELETED = object()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A checkpoint of each script."""

    def state(script: Any, flags: list[object]) -> dict[str, Any]:
        finished = call(script.main, *flags, "--log-dir", tmp_path_factory.mktemp("logs"))
        return {name: part for name, part in load_checkpoint(finished.checkpoint)[0].items() if name != "format"}

    return {algo: state(*script) for algo, script in SCRIPTS.items()}


def changed(state: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of a state with something else at a place such as args.gamma."""
    *way, last = [int(name) if name.isdecimal() else name for name in place.split("/")]
    state = copy.deepcopy(state)
    inner: Any = state
    for name in way:
        inner = inner[name]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return state


def resume(algo: str, state: dict[str, Any], folder: Path) -> Finished:
    path = save_checkpoint(folder / "bad", 1, state, keep=1)
    return call(SCRIPTS[algo][0].main, "--resume", path, "--total-timesteps", 96, "--log-dir", folder / "new")


def refused(algo: str, state: dict[str, Any], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resume(algo, state, folder)
    message = str(caught.value)
    assert "step_000000000001.ckpt" in message
    assert len(message.splitlines()) == 1
    assert not (folder / "new").exists() or not list((folder / "new").rglob("events*")), "it was refused too late"
    return message


@pytest.mark.parametrize("algo", SCRIPTS)
def test_contents_that_are_right_are_taken(algo: str, states: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert resume(algo, states[algo], tmp_path).result["steps"] == "96"


def test_a_run_that_goes_on_is_one_run(
    states: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not matter of how many seeds its checkpoint tells."""
    monkeypatch.setattr("fabricrl.sweep.run_seeds", lambda *_: pytest.fail("it starts runs"))
    state = changed(changed(states["ppo"], "args/seeds", 3), "args/jobs", 2)
    assert resume("ppo", state, tmp_path).result["steps"] == "96"


COMMON: list[tuple[str, Any]] = [
    ("args", []),
    ("args", {}),
    ("args/env_id", 5),
    ("args/env_id", DELETED),
    ("args/env_kwargs", "{"),
    ("args/num_envs", DELETED),
    ("args/num_envs", 2.0),
    ("args/num_envs", True),
    ("args/total_timesteps", 63),  # of which 64 are done
    ("args/gamma", "much"),
    ("args/gamma", float("nan")),
    ("args/seed", None),
    ("args/hidden_sizes", "88"),
    ("args/hidden_sizes", (8, 8.0)),
    ("args/obs_keys", (1,)),
    ("args/activation", "sine"),
    ("args/vectorization", "magic"),
    ("args/accelerator", "tpu"),
    ("args/log_every", 2**70),
    ("args/resume", ""),
    ("args/unheard_of", 1),
    ("global_step", "64"),
    ("global_step", -64),
    ("global_step", 0),
    ("global_step", True),
    ("world_size", 0),
    ("world_size", 1.0),
    ("spaces/obs", 3),
    ("best_return", "high"),
    ("best_return", float("nan")),
    ("episodes", None),
    ("episodes/returns", {}),
    ("episodes/returns", ["a"]),
    ("episodes/returns", [float("nan")]),
    ("episodes/count", -1),
    ("episodes/count", 0),  # of which some have returns
    ("episodes/count", 2.5),
    ("generators", torch.zeros(1, 3)),
    ("generators", lambda states: states[:, :, :-1]),
    ("generators", lambda states: states[:, :1]),
    ("agent", {}),
    ("agent/0", torch.zeros(1)),
]
ADAM: list[tuple[str, Any]] = [
    ("state", 1),
    ("state/0/exp_avg", DELETED),
    ("state/0/exp_avg_sq", lambda moment: -moment - 1),
    ("state/0/exp_avg", lambda moment: moment * torch.nan),
    ("state/0/step", torch.tensor(-1.0)),
    ("state/0/step", torch.zeros(2)),
    ("state/1", {}),
    ("param_groups", []),
    ("param_groups/0/betas", "x"),
    ("param_groups/0/eps", None),
    ("param_groups/0/params", [0, 1]),
]
SHARD: list[tuple[str, Any]] = [
    ("shard", 5),
    ("shard/position", 11),  # of 10 rows and one more
    ("shard/position", -1),
    ("shard/position", "0"),
    ("shard/size", 9),  # which is full
    ("shard/size", 11),
    ("shard/size", 2.0),
    ("shard/records", lambda records: records[:-8]),
    ("shard/records", lambda records: torch.cat((records, records))),
    ("shard/records", lambda records: records.float()),
    ("shard/layout", "10 × 2 of everything"),
    ("shard/layout", lambda layout: layout.replace("10 × 2", "20 × 1")),
    ("shard/free", [10**6]),
    ("shard/free", [-1]),
    ("schedule", None),
    ("schedule/starts", -1),
    ("schedule/done", "many"),
    ("schedule/before", 10**6),  # more than are done
    ("schedule/ratio", 0.0),
    ("schedule/least", DELETED),
]
CASES = [("ppo", *case) for case in COMMON] + [("ppo", f"optimizer/{place}", value) for place, value in ADAM]
CASES += [
    ("sac", f"{name}/{place}", value) for place, value in ADAM[1:4] for name in ("q_optimizer", "actor_optimizer")
]
CASES += [("sac", *case) for case in SHARD]
CASES += [("droq", *case) for case in (*SHARD[1:6:2], SHARD[7])]
CASES += [("ppo_recurrent", *case) for case in COMMON[10:14]]


@pytest.mark.parametrize(
    ("algo", "place", "value"), CASES, ids=[f"{algo}-{place}-{number}" for number, (algo, place, _) in enumerate(CASES)]
)
def test_contents_that_are_wrong_are_refused(
    algo: str, place: str, value: Any, states: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    if place == "agent/0":
        place = f"agent/{next(iter(states[algo]['agent']))}"
    refused(algo, changed(states[algo], place, value), tmp_path)


def test_next_observations_kept_apart_must_be_there(states: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert "'shard'" in refused("sac", changed(states["sac"], "shard/finals", torch.zeros(0, 5)), tmp_path)

    def pointing_nowhere(records: torch.Tensor) -> torch.Tensor:
        return torch.full_like(records, 1)  # every number in it is 16 843 009

    assert "'shard'" in refused("sac", changed(states["sac"], "shard/records", pointing_nowhere), tmp_path)


def test_the_shard_of_another_rank_is_looked_at_too(states: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    state = states["sac"] | {"shard": None}
    path = save_checkpoint(tmp_path, 64, state, keep=1)
    save_shard(tmp_path, 64, 1, changed(states["sac"], "shard/position", 99)["shard"])
    with pytest.raises(CheckpointError, match="no valid 'shard'"):
        load_shard(state, path, 1)


def test_an_unknown_argument_is_named(states: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert "ppo does not know: 'gama'" in refused("ppo", changed(states["ppo"], "args/gama", 0.9), tmp_path)


def test_a_run_folder_goes_on_from_the_checkpoint_before_one_with_wrong_contents(
    states: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    good = save_checkpoint(folder, 32, changed(states["ppo"], "global_step", 32), keep=2)
    for place, value in (("world_size", "one"), ("episodes/count", -1), ("args", None)):
        save_checkpoint(folder, 64, changed(states["ppo"], place, value), keep=2)
        assert load_checkpoint(folder.parent, "ppo")[1] == good


@pytest.mark.parametrize(
    ("place", "value"),
    [("args/env_id", 5), ("args/env_kwargs", "{"), ("args/hidden_sizes", "8"), ("args/obs_keys", 1), ("agent", {}),
     ("args/action_repeat", 0), ("global_step", "x"), ("spaces/obs", 1), ("args/num_envs", DELETED),
     ("args/env_kwargs", DELETED), ("args/norm_obs", torch.zeros(3)), ("args/hidden_sizes", (10**30,))],
)  # fmt: skip
def test_evaluation_refuses_them_too(place: str, value: Any, states: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 64, changed(states["ppo"], place, value), keep=1)
    with pytest.raises(CheckpointError) as caught:
        call(evaluate.main, path, "--episodes", 1)
    assert len(str(caught.value).splitlines()) == 1


def test_what_this_machine_cannot_do_is_a_matter_of_the_command_line(
    states: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """A run of a larger machine, or one that logged elsewhere, can be resumed with other flags."""
    state = changed(changed(states["ppo"], "args/num_threads", 9999), "args/log_dir", "/dev/null/logs")
    with pytest.raises(ConfigError, match="--num-threads is 9999"):
        resume("ppo", state, tmp_path)
    path = save_checkpoint(tmp_path / "bad", 1, state, keep=1)
    flags = ["--num-threads", 1, "--log-dir", tmp_path / "new"]
    assert call(ppo.main, "--resume", path, *flags).result["steps"] == "64"
