"""Resuming SAC and DroQ: with its buffer a run ends as if it had not been stopped; without, it fills one first."""

import fcntl
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fabricrl.algos.droq import droq
from fabricrl.algos.sac import sac
from fabricrl.data.replay import ReplayBuffer
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint, save_shard
from fabricrl.utils.errors import CheckpointError, ConfigError
from tests.process import Finished, call, differences, load, logged, run_folder, run_team, saved_steps, stopped_in

SCRIPTS: dict[str, Any] = {"sac": sac, "droq": droq}
RATIO = {"sac": "0.69", "droq": "1.3"}

# Episodes of 8 steps in 2 environments end every 16 steps, at which a resumed environment is where it would have been.
# An iteration takes 2 steps. Learning starts at 64 of 240, and the ring of 48 transitions has wrapped by then
FLAGS = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--total-timesteps", 240]
FLAGS += ["--env-kwargs", '{"continuous": true, "truncate": true}', "--buffer-size", 48, "--learning-starts", 64]
FLAGS += ["--batch-size", 8, "--hidden-sizes", 16, 16, "--num-critics", 3, "--norm-obs", "--n-step", 2, "--tau", 0.05]
FLAGS += ["--num-threads", 1, "--log-every", 16, "--checkpoint-every", 16, "--keep-checkpoints", 100]
STARTS, TOTAL = 64, 240
# At 144 steps SAC has taken 55.2 updates: a fraction is left, and the next is one of the actor, not of the targets
OWN = {
    "sac": ["--replay-ratio", RATIO["sac"], "--target-network-frequency", 3],
    "droq": ["--replay-ratio", RATIO["droq"]],
}

BUFFERS = {
    "in memory": [],
    "implicit": ["--implicit-next-obs"],
    "in a file": ["--buffer-memmap"],
    "implicit, in a file": ["--implicit-next-obs", "--buffer-memmap"],
}


def content(path: Path | str) -> dict[str, Any]:
    """Contents of a checkpoint and its shards, without those that depend on how the run was started."""
    path = Path(path)
    shards = {shard.suffix: load(shard) for shard in path.parent.glob(f"{path.stem}.shard*")}
    return {name: value for name, value in load(path).items() if name != "args"} | shards


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:012d}.ckpt"


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Runs that were never stopped, each made once."""
    made: dict[tuple[str, ...], Finished] = {}

    def train(algo: str, *flags: str) -> Finished:
        if (algo, *flags) not in made:
            log_dir = tmp_path_factory.mktemp("straight")
            line = [*FLAGS, *OWN[algo], *flags, "--log-dir", log_dir]
            made[algo, *flags] = call(SCRIPTS[algo].main, *line)
        return made[algo, *flags]

    return train


def resumed(algo: str, run: Finished, step: int, log_dir: Path, *flags: object) -> Finished:
    """The run goes on, in a new folder, from its checkpoint of a step."""
    return call(SCRIPTS[algo].main, "--resume", checkpoint(run.folder, step), "--log-dir", log_dir, *flags)


# --- With the buffer


@pytest.mark.parametrize("step", [32, 64, 144], ids=["before learning", "when learning starts", "in the middle"])
@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_resumed_run_equals_the_straight_run_to_the_last_bit(
    algo: str, buffer: str, step: int, straight: Callable, tmp_path: Path
) -> None:
    whole = straight(algo, *BUFFERS[buffer])
    expected, before = content(whole.checkpoint), content(checkpoint(whole.folder, step))
    parts = {"agent", "q_optimizer", "actor_optimizer", "schedule", "generators", "episodes", "shard"}
    parts |= {"best_return", "global_step"}
    assert parts <= expected.keys()
    second = resumed(algo, whole, step, tmp_path)
    assert second.code == 0
    assert differences(expected, content(second.checkpoint)) == []
    changed = {name.split("/")[1] for name in differences(before, expected)}
    assert parts - {"best_return"} <= changed, "what does not change cannot show that it was restored"
    for field in ("steps", "return_mean", "episodes"):
        assert second.result[field] == whole.result[field]


def test_how_the_buffer_is_kept_changes_nothing_that_is_learned(algo: str, straight: Callable) -> None:
    agents = [load(straight(algo, *flags).checkpoint)["agent"] for flags in BUFFERS.values()]
    assert all(differences(agents[0], agent) == [] for agent in agents[1:])


def test_a_run_that_was_stopped_three_times_equals_the_straight_run_and_so_do_its_logs(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    """By a signal after 16, 48 and 72 of 120 iterations: before learning, and twice in the middle of it."""
    whole = straight(algo)
    line: list[object] = [*FLAGS, *OWN[algo]]
    for iterations in (16, 32, 24):
        with stopped_in(iterations):
            assert call(SCRIPTS[algo].main, *line, "--log-dir", tmp_path).code == 143
        line = ["--resume", run_folder(tmp_path)]
    last = call(SCRIPTS[algo].main, *line)
    assert differences(content(whole.checkpoint), content(last.checkpoint)) == []
    expected, found = logged(whole.folder), logged(last.folder)
    assert expected.keys() == found.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values], tag
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert found[tag] == values, tag


def test_a_buffer_may_go_on_in_a_file_and_back_in_memory(algo: str, straight: Callable, tmp_path: Path) -> None:
    whole = straight(algo)
    second = resumed(algo, whole, 96, tmp_path / "second", "--buffer-memmap")
    third = resumed(algo, second, 144, tmp_path / "third", "--no-buffer-memmap")
    assert differences(content(whole.checkpoint), content(third.checkpoint)) == []


def test_environments_in_processes_resume_alike(algo: str, straight: Callable, tmp_path: Path) -> None:
    whole = straight(algo)
    second = resumed(algo, whole, 144, tmp_path, "--vectorization", "async")
    assert differences(content(whole.checkpoint), content(second.checkpoint)) == []


def test_a_finished_run_has_nothing_to_do_and_goes_on_with_a_larger_budget(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight(algo).folder, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    finished = call(SCRIPTS[algo].main, "--resume", folder)
    assert finished.code == 0
    assert "nothing to do" in finished.err
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
    more = call(SCRIPTS[algo].main, "--resume", folder, "--total-timesteps", 272)
    assert (more.folder, more.result["steps"]) == (folder, "272")
    assert taken(load(more.checkpoint))[0] == due(RATIO[algo], 272 - STARTS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of the same run with one environment on each of two ranks; made once."""
    made: dict[str, Path] = {}

    def train(algo: str) -> Path:
        if algo not in made:
            base = tmp_path_factory.mktemp("two_ranks")
            flags = [*FLAGS, *OWN[algo], *TWO[algo], "--log-dir", base / "logs"]
            run_team(SCRIPTS[algo].__name__, *flags, folder=base)
            made[algo] = run_folder(base / "logs")
        return made[algo]

    return train


# One environment a rank: the same steps, and environments end as they did
TWO = {"sac": ["--num-envs", 1], "droq": ["--num-envs", 1, *BUFFERS["implicit, in a file"]]}


@pytest.mark.parametrize("step", [32, 144], ids=["before learning", "in the middle"])
def test_two_ranks_resume_to_the_last_bit_each_with_its_own_buffer(
    algo: str, step: int, two_ranks: Callable, tmp_path: Path
) -> None:
    folder = two_ranks(algo)
    before, expected = (content(checkpoint(folder, at)) for at in (step, TOTAL))
    assert ".shard1" in before.keys() & expected.keys()
    for state in (before, expected):
        assert differences(state["generators"][0], state["generators"][1]), "both ranks draw the same numbers"
        assert "/records" in differences(state["shard"], state[".shard1"]["shard"]), "both ranks collect the same"
    team = run_team(
        SCRIPTS[algo].__name__, "--resume", checkpoint(folder, step), "--log-dir", tmp_path / "logs", folder=tmp_path
    )
    assert differences(expected, content(team.result["checkpoint"])) == []


# --- How many updates


def due(ratio: str, steps: int) -> int:
    return int(Fraction(ratio) * steps)


def taken(state: dict[str, Any]) -> tuple[int, int]:
    """Steps that the optimizers of the critics and of the actor have counted, Adam's own counts."""
    optimizers = [state[name]["state"] for name in ("q_optimizer", "actor_optimizer")]
    return tuple(int(optimizer[0]["step"]) if optimizer else 0 for optimizer in optimizers)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("ratio", "starts", "num_envs", "total"),
    [
        ("0.1", 16, 1, 116),  # ten updates; a float's 0.1 · 100 would do, a sum of 0.1 a hundred times would not
        ("0.29", 16, 1, 116),  # 29, but int(100 * 0.29) is 28
        ("0.75", 21, 4, 101),  # learning starts within an iteration, and the last iteration does not fit
        ("1", 0, 3, 60),  # after a batch of 8, which is not the end of an iteration
        ("2.5", 8, 2, 51),
    ],
)
def test_updates_are_the_replay_ratio_times_the_steps_since_learning_started(
    algo: str, ratio: str, starts: int, num_envs: int, total: int, tmp_path: Path
) -> None:
    flags = ["--replay-ratio", ratio, "--learning-starts", starts, "--num-envs", num_envs, "--total-timesteps", total]
    state = load(call(SCRIPTS[algo].main, *FLAGS, *flags, "--log-dir", tmp_path).checkpoint)
    steps = total // num_envs * num_envs
    assert state["global_step"] == steps
    since = steps - max(starts, 8)
    critic_steps, actor_steps = taken(state)
    assert critic_steps == state["schedule"]["done"] == due(ratio, since)
    # DroQ: one per environment step. SAC: two after every second update of the critics
    assert actor_steps == (since if algo == "droq" else critic_steps // 2 * 2)


@pytest.mark.parametrize("step", [128, 240])
def test_two_ranks_take_the_updates_of_all_steps_together_and_each_of_them_once(
    algo: str, step: int, two_ranks: Callable
) -> None:
    state = load(checkpoint(two_ranks(algo), step))
    critic_steps, actor_steps = taken(state)
    assert critic_steps == state["schedule"]["done"] == due(RATIO[algo], step - STARTS)
    assert actor_steps == (step - STARTS if algo == "droq" else critic_steps // 2 * 2)


def test_before_learning_another_start_of_it_may_be_chosen(algo: str, straight: Callable, tmp_path: Path) -> None:
    second = resumed(algo, straight(algo), 32, tmp_path, "--learning-starts", 100)
    assert taken(load(second.checkpoint))[0] == due(RATIO[algo], TOTAL - 100)


def test_another_replay_ratio_holds_from_the_step_of_resumption(algo: str, straight: Callable, tmp_path: Path) -> None:
    second = resumed(algo, straight(algo), 144, tmp_path, "--replay-ratio", 3)
    assert taken(load(second.checkpoint))[0] == due(RATIO[algo], 144 - STARTS) + 3 * (TOTAL - 144)


# --- Without the buffer


class Watch:
    """Each iteration of a run: exploration, critic and actor updates, and the size of its buffer."""

    def __init__(self, algo: str) -> None:
        self.iterations: list[dict[str, Any]] = []
        script = SCRIPTS[algo]
        rollout, critics, actor = script.rollout, script.update_critics, script.update_actor

        def watched_rollout(run: Any, player: Any, envs: Any, rb: ReplayBuffer, explores: bool) -> None:
            self.iterations.append({"random": explores, "critics": 0, "actor": 0})
            rollout(run, player, envs, rb, explores)
            self.iterations[-1]["size"] = rb.size

        def count(name: str, original: Callable) -> Callable:
            def counted(*given: Any) -> Any:
                self.iterations[-1][name] += 1
                return original(*given)

            return counted

        self.patches = [
            mock.patch.object(script, "rollout", watched_rollout),
            mock.patch.object(script, "update_critics", count("critics", critics)),
            mock.patch.object(script, "update_actor", count("actor", actor)),
        ]

    def __enter__(self) -> "Watch":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def column(self, name: str) -> list[Any]:
        return [iteration[name] for iteration in self.iterations]


STARTS_EMPTY = "the replay buffer starts empty: 64 steps are played to fill it before the next update"


def test_without_its_buffer_a_resumed_run_fills_one_before_it_updates_and_says_so(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    """After 144 of 240 steps: 64 fill the buffer, by the policy that has been learned, and 32 have updates."""
    whole = straight(algo, "--no-checkpoint-buffer")
    assert load(whole.checkpoint)["shard"] is None
    assert STARTS_EMPTY not in whole.err
    with Watch(algo) as watch:
        second = resumed(algo, whole, 144, tmp_path)
    assert second.err.count(STARTS_EMPTY) == 1
    assert watch.column("random") == [False] * 48
    assert watch.column("size") == [min(row, 24) for row in range(1, 49)]
    assert watch.column("critics")[:32] == [0] * 32
    assert watch.column("actor")[:32] == [0] * 32
    most = -(-due(RATIO[algo], 200) // 100)  # of an iteration of two steps, rounded up
    assert max(watch.column("critics")) <= most, "updates that were put off are made up for at once"
    before = due(RATIO[algo], 144 - STARTS)
    assert sum(watch.column("critics")) == due(RATIO[algo], 32)
    state = load(second.checkpoint)
    assert taken(state)[0] == state["schedule"]["done"] == before + due(RATIO[algo], 32)


def test_without_its_buffer_a_run_that_had_not_learned_yet_explores_until_it_does(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    whole = straight(algo, "--no-checkpoint-buffer")
    with Watch(algo) as watch:
        second = resumed(algo, whole, 32, tmp_path)
    assert watch.column("random") == [True] * 32 + [False] * 72
    assert watch.column("critics")[:32] == [0] * 32
    assert taken(load(second.checkpoint))[0] == due(RATIO[algo], TOTAL - 96)


def test_a_run_that_is_stopped_while_it_fills_its_buffer_fills_another(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    """From 144, learning would go on at 208; stopped at 176, it does at 240, and 60 of 300 steps are left."""
    second = resumed(algo, straight(algo, "--no-checkpoint-buffer"), 144, tmp_path / "second")
    third = resumed(algo, second, 176, tmp_path / "third", "--total-timesteps", 300)
    assert STARTS_EMPTY in third.err
    assert taken(load(third.checkpoint))[0] == due(RATIO[algo], 144 - STARTS) + due(RATIO[algo], 60)


def test_a_buffer_that_is_filled_again_is_stored_if_asked_and_the_run_goes_on_exactly(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    """Stopped at 176 while it fills a buffer that checkpoints hold: 144 + 64 is when learning goes on, still."""
    whole = straight(algo, "--no-checkpoint-buffer")
    second = resumed(algo, whole, 144, tmp_path / "second", "--checkpoint-buffer")
    third = resumed(algo, second, 176, tmp_path / "third")
    assert STARTS_EMPTY not in third.err
    assert differences(content(second.checkpoint), content(third.checkpoint)) == []


def refusal(algo: str, *flags: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(SCRIPTS[algo].main, *flags)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--buffer-size", 60], ["24 × 2", "30 × 2"]),
        (["--num-envs", 3], ["24 × 2", "16 × 3"]),
        (["--implicit-next-obs"], ["next_obs", "final"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_buffer_that_does_not_fit_is_refused_unless_an_empty_one_is_allowed(
    algo: str, flags: list[object], words: list[str], straight: Callable, tmp_path: Path
) -> None:
    older = checkpoint(straight(algo).folder, 144)
    before = older.read_bytes()
    line = ["--resume", older, *flags, "--log-dir", tmp_path]
    message = refusal(algo, *line)
    assert str(older) in message
    assert all(word in message for word in [*words, "--allow-empty-buffer"])
    assert older.read_bytes() == before
    second = call(SCRIPTS[algo].main, *line, "--allow-empty-buffer")
    assert second.err.count(STARTS_EMPTY) == 1
    state = load(second.checkpoint)
    assert taken(state)[0] == due(RATIO[algo], 144 - STARTS) + due(RATIO[algo], state["global_step"] - 208)
    again = ["--resume", second.folder, "--total-timesteps", 300, "--buffer-size", 90]
    assert "--allow-empty-buffer" in refusal(algo, *again), "what was allowed once is not allowed for ever"


def test_a_checkpoint_that_has_lost_its_buffer_is_refused_unless_an_empty_one_is_allowed(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    state, _ = load_checkpoint(checkpoint(straight(algo).folder, 144))
    contents = {name: value for name, value in state.items() if name != "format"} | {"shard": None}
    older = save_checkpoint(tmp_path, 144, contents, keep=1)
    line = ["--resume", older, "--log-dir", tmp_path / "logs"]
    message = refusal(algo, *line)
    assert "without the replay buffer of rank 0" in message
    assert "--allow-empty-buffer" in message
    second = call(SCRIPTS[algo].main, *line, "--allow-empty-buffer")
    assert STARTS_EMPTY in second.err
    assert taken(load(second.checkpoint))[0] == due(RATIO[algo], 144 - STARTS) + due(RATIO[algo], 32)


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another step", "of other contents"])
def test_a_rank_that_has_lost_its_shard_refuses_for_all_and_says_so(
    damage: str, two_ranks: Callable, tmp_path: Path
) -> None:
    algo = "sac"
    folder = Path(shutil.copytree(two_ranks(algo), tmp_path / "run"))
    older = checkpoint(folder, 144)
    shard = older.with_suffix(".shard1")
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "of another step":
        shutil.copy(checkpoint(folder, 160).with_suffix(".shard1"), shard)
    else:
        save_shard(shard.parent, 144, 1, {"layout": load(shard)["shard"]["layout"]})
    line = [SCRIPTS[algo].__name__, "--resume", older, "--log-dir", tmp_path / "logs"]
    refused = run_team(*line, folder=tmp_path / "refused", code=3)
    (message,) = refused.errors
    assert str(older if damage in ("missing", "of other contents") else shard) in message
    assert damage != "missing" or "rank 1" in message
    assert "--allow-empty-buffer" in message
    assert STARTS_EMPTY not in refused.printed("err"), "it does not go on"
    if damage == "missing":
        allowed = run_team(*line, "--allow-empty-buffer", folder=tmp_path / "allowed")
        assert allowed.printed("err").count(STARTS_EMPTY) == 1
        state = load(allowed.result["checkpoint"])
        assert taken(state)[0] == due(RATIO[algo], 144 - STARTS) + due(RATIO[algo], 32)


def test_two_ranks_go_on_as_one_with_what_both_had_or_with_an_empty_buffer(two_ranks: Callable, tmp_path: Path) -> None:
    older = checkpoint(two_ranks("sac"), 144)
    line = ["--resume", older, "--devices", 1, "--log-dir", tmp_path]
    assert "has 2 steps (2 ranks), here 1 (1)" in refusal("sac", *line, "--num-envs", 1)
    whole = call(sac.main, *line)
    assert (whole.code, whole.result["steps"]) == (0, "240")
    assert taken(load(whole.checkpoint))[0] == due(RATIO["sac"], 240 - STARTS)
    line += ["--buffer-size", 20]
    assert "--allow-empty-buffer" in refusal("sac", *line)
    second = call(sac.main, *line, "--allow-empty-buffer")
    assert (second.code, second.result["steps"]) == (0, "240")
    assert taken(load(second.checkpoint))[0] == due(RATIO["sac"], 144 - STARTS) + due(RATIO["sac"], 32)


def test_a_folder_in_which_another_process_runs_is_left_alone(straight: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight("sac", *BUFFERS["in a file"]).folder, tmp_path / "run"))
    before = sorted(folder.rglob("*"))
    descriptor = os.open(folder / "args.json", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process"):
            call(sac.main, "--resume", folder, "--total-timesteps", 320)
    finally:
        os.close(descriptor)
    assert sorted(folder.rglob("*")) == before


def test_the_checkpoint_that_a_run_is_resumed_from_may_go_away_while_it_runs(tmp_path: Path) -> None:
    """Only the newest is kept: the file whose buffer was read is deleted by the first save."""
    flags = [*FLAGS, "--keep-checkpoints", 1, "--total-timesteps", 144, "--log-dir", tmp_path]
    folder = call(sac.main, *flags).folder
    finished = call(sac.main, "--resume", folder, "--total-timesteps", TOTAL)
    assert saved_steps(finished.folder) == [TOTAL]
    assert torch.isfinite(load(finished.checkpoint)["agent"]["log_alpha"])
