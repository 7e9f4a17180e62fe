"""`--resume auto` goes on with the newest run of the same arguments, on all ranks alike, be they more or fewer."""

import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from fabricrl.algos import resume, run
from fabricrl.algos.names import identity, run_name
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.sac.args import SACArgs
from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.errors import CheckpointError, ConfigError
from tests.conftest import on_ranks
from tests.process import Finished, call, differences, load, run_team, saved_steps, stopped_in

# As in test_resume.py: a resumed environment is where it would have been; 16 iterations of 64 steps
FLAGS = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 1024]
FLAGS += ["--norm-obs", "--norm-reward", "--learning-rate", 1e-2, "--checkpoint-every", 192, "--keep-checkpoints", 100]
FLAGS += ["--resume", "auto"]


def learned(path: Path | str) -> dict[str, Any]:
    return {name: value for name, value in load(path).items() if name not in ("args", "asked")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return call(ppo.main, *FLAGS, "--log-dir", tmp_path_factory.mktemp("straight"))


@pytest.fixture
def stopped(tmp_path: Path) -> Finished:
    """A run that was stopped after 5 of its 16 iterations."""
    with stopped_in(5):
        return call(ppo.main, *FLAGS, "--log-dir", tmp_path)


def runs(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("*/*/*/args.json")))


# --- Which run


def test_the_same_command_starts_a_run_goes_on_with_it_and_then_has_nothing_to_do(
    straight: Finished, stopped: Finished, tmp_path: Path
) -> None:
    assert (stopped.code, stopped.result["steps"]) == (143, "320")
    second = call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    assert (second.code, second.folder) == (0, stopped.folder)
    assert differences(learned(straight.checkpoint), learned(second.checkpoint)) == []
    before = {path: path.read_bytes() for path in (second.folder / "checkpoints").iterdir()}
    third = call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    assert (third.code, third.folder) == (0, stopped.folder)
    text = f"nothing to do: 1024 of 1024 steps are done; to continue: --resume {stopped.folder} --total-timesteps 2048"
    assert text in third.err.splitlines()
    assert {path: path.read_bytes() for path in (second.folder / "checkpoints").iterdir()} == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--log-every", 64, "--checkpoint-every", 64, "--timeout", 1, "--num-threads", 1],
        ["--vectorization", "async", "--eval-every", 512, "--eval-episodes", 1],
    ],
    ids=["logs, checkpoints and hardware", "environments in processes, evaluations"],
)
def test_how_a_run_is_watched_and_where_it_computes_may_change(
    stopped: Finished, tmp_path: Path, flags: list[object]
) -> None:
    assert call(ppo.main, *FLAGS, *flags, "--log-dir", tmp_path).folder == stopped.folder
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 2],
        ["--learning-rate", 2e-2],
        ["--num-envs", 4],
        ["--exp-name", "other"],
        ["--env-kwargs", '{"truncate": true}'],
        ["--total-timesteps", 512],
    ],
    ids=lambda flags: flags[0],
)
def test_another_argument_of_environment_or_algorithm_is_another_run(
    stopped: Finished, tmp_path: Path, flags: list[object]
) -> None:
    other = call(ppo.main, *FLAGS, "--log-dir", tmp_path, *flags)
    assert other.folder != stopped.folder
    assert saved_steps(stopped.folder) == [192, 320]
    assert call(ppo.main, *FLAGS, "--log-dir", tmp_path, *flags).folder == other.folder


@pytest.mark.parametrize("kind", [PPOArgs, SACArgs, PPODecoupledArgs])
def test_arguments_are_the_same_where_they_name_a_run_alike(kind: Any) -> None:
    """For each argument on its own: whatever shows in a run's name makes another run, and nothing else does."""
    base = kind()
    for field in dataclasses.fields(kind):
        value, other = getattr(base, field.name), object.__new__(kind)
        changed = not value if isinstance(value, bool) else "0.123" if isinstance(value, str) else 0.123
        for name in vars(base):
            object.__setattr__(other, name, changed if name == field.name else getattr(base, name))
        names = [run_name(args, "x") + f"{args.env_id}{args.seed}" for args in (base, other)]
        same = identity(kind, vars(base)) == identity(kind, vars(other))
        assert same == (names[0] == names[1]), field.name


def test_a_decoupled_run_is_not_that_of_the_coupled_script() -> None:
    coupled, decoupled = PPOArgs(), PPODecoupledArgs()
    assert identity(PPODecoupledArgs, vars(coupled)) != identity(PPODecoupledArgs, vars(decoupled))
    assert identity(PPOArgs, vars(coupled)) != identity(PPOArgs, vars(decoupled))


def test_an_argument_that_an_older_run_did_not_know_counts_as_its_default(stopped: Finished, tmp_path: Path) -> None:
    args, path = PPOArgs(log_dir=str(tmp_path)), stopped.folder / "args.json"
    older = path.read_text().replace('"anneal_clip": false,', "")
    assert older != path.read_text()
    path.write_text(older)
    flags = {"env_id": "tests.envs:Deterministic-v0", "num_envs": 2, "num_steps": 32, "total_timesteps": 1024}
    args = dataclasses.replace(args, **flags, norm_obs=True, norm_reward=True, learning_rate=1e-2)
    assert resume.newest_run(args, "ppo") == stopped.folder.resolve()
    assert resume.newest_run(dataclasses.replace(args, anneal_clip=True), "ppo") is None


def test_the_newest_run_is_the_one_that_began_last_and_has_a_checkpoint(stopped: Finished, tmp_path: Path) -> None:
    """The clock of the file system, and the order in which it lists folders, do not matter."""
    names = [f"{stopped.folder.name[:-16]}_{time}" for time in ("20250101-000000", "20990101-000000-2")]
    older, newer = (Path(shutil.copytree(stopped.folder, stopped.folder.with_name(name))) for name in names)
    shutil.copytree(stopped.folder, f"{newer}"[:-2] + "-1")
    nothing = stopped.folder.with_name(f"{stopped.folder.name[:-16]}_20991231-000000")
    nothing.mkdir()  # a run that was killed before its first checkpoint
    shutil.copy(newer / "args.json", nothing)
    (older / "args.json").touch()
    assert call(ppo.main, *FLAGS, "--log-dir", tmp_path).folder == newer


def test_a_run_without_checkpoints_is_begun_again(tmp_path: Path) -> None:
    with stopped_in(2):
        first = call(ppo.main, *FLAGS, "--no-save-model", "--log-dir", tmp_path)
    assert "checkpoint=None" in first.out
    second = call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    assert (second.code, second.result["steps"], runs(tmp_path)) == (0, "1024", 2)


def test_a_damaged_checkpoint_is_passed_over_but_a_run_with_nothing_else_is_not_begun_anew(
    straight: Finished, stopped: Finished, tmp_path: Path
) -> None:
    newest = stopped.folder / "checkpoints" / "step_000000000320.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    finished = call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    assert "trying the one before it" in finished.err
    assert finished.folder == stopped.folder
    assert differences(learned(straight.checkpoint), learned(finished.checkpoint)) == []
    for path in (stopped.folder / "checkpoints").glob("step*"):
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        call(ppo.main, *FLAGS, "--log-dir", tmp_path)
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("text", ["", '{"env_id": "CartP'], ids=["empty", "cut off"])
def test_a_run_that_was_killed_while_it_wrote_its_arguments_is_known_by_its_checkpoint(
    stopped: Finished, tmp_path: Path, text: str
) -> None:
    (stopped.folder / "args.json").write_text(text)
    folders = set(stopped.folder.parent.iterdir())
    assert call(ppo.main, *FLAGS, "--log-dir", tmp_path).result["steps"] == "1024"
    assert set(stopped.folder.parent.iterdir()) == folders


def test_two_processes_do_not_go_on_with_the_same_run(stopped: Finished, tmp_path: Path) -> None:
    import fcntl

    with (stopped.folder / "args.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is running in .*ppo_"):
            call(ppo.main, *FLAGS, "--log-dir", tmp_path)


def test_a_preset_may_stand_beside_it(tmp_path: Path) -> None:
    """Beside a path it may not, since a run that is resumed has its arguments already."""
    flags = ["--preset", "mujoco", "--env-id", "Pendulum-v1", "--num-steps", 64, "--total-timesteps", 128]
    flags += ["--num-minibatches", 1, "--update-epochs", 1, "--resume", "auto", "--log-dir", tmp_path]
    first, second = (call(ppo.main, *flags) for _ in range(2))
    assert second.folder == first.folder
    assert "nothing to do" in second.err


# --- Ranks agree


def blind(rank: int) -> None:
    """Rank 1 does not see what is there, as on a node whose file system is slow."""
    if rank == 1:
        run.newest_run = lambda args, algo: None


def sees_older(rank: int) -> None:
    """Rank 1 sees all but the newest checkpoint."""
    if rank == 1:
        original = run.load_checkpoint
        run.load_checkpoint = lambda path, algo: original(
            sorted(Path(path).glob("checkpoints/step*"))[0] if Path(path).is_dir() else path, algo
        )


def sees_more(rank: int) -> None:
    """Rank 0, whose word counts, sees nothing: the run begins anew on both."""
    if rank == 0:
        run.newest_run = lambda args, algo: None


@pytest.mark.parametrize(("prepare", "start"), [(blind, 320), (sees_older, 320), (sees_more, 0)])
def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_has_found(
    stopped: Finished, tmp_path: Path, prepare: Any, start: int
) -> None:
    """Ranks whose parameters differed at the start would say so, and end."""
    flags = [*FLAGS[:2], "--num-envs", 2, *FLAGS[4:], "--log-dir", tmp_path]
    ended = run_team("fabricrl.algos.ppo.ppo", *flags, folder=tmp_path / "out", prepare=prepare)
    assert ended.result["steps"] == "1024"
    assert (Path(ended.result["checkpoint"]).parent.parent == stopped.folder) == (start > 0)
    assert ("each now has --num-envs 1" in ended.printed("err")) == (start > 0)


@pytest.mark.parametrize(
    ("own", "loads"),
    [
        ("/scratch/node1/ppo_1/checkpoints/step_2.ckpt", False),  # the folders above have other names on this node
        ("/shared/ppo_1/checkpoints/step_1.ckpt", True),
        ("/shared/ppo_2/checkpoints/step_2.ckpt", True),
        (None, True),
    ],
)
def test_a_rank_takes_the_checkpoint_of_rank_0_unless_it_has_found_the_same(
    own: str | None, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = "/shared/ppo_1/checkpoints/step_2.ckpt"
    monkeypatch.setattr(resume, "load_checkpoint", lambda path, algo: ({"read": path}, Path(path)))

    def work(fabric: Any) -> Any:
        fabric.broadcast = lambda value: first
        path = Path(first) if fabric.global_rank == 0 else own and Path(own)
        return resume.agreed(fabric, {"found": path}, path, "ppo")

    (_, kept), (state, path) = on_ranks(2, work)
    assert kept == Path(first)
    assert (state, str(path)) == (({"read": first}, first) if loads else ({"found": Path(str(own))}, own))


def lost_file(rank: int) -> None:
    if rank == 1:
        blind(rank)
        original = resume.load_checkpoint
        resume.load_checkpoint = lambda path, algo: original(f"{path}.elsewhere", algo)


def test_a_rank_that_cannot_read_the_checkpoint_ends_all_in_one_line(stopped: Finished, tmp_path: Path) -> None:
    ended = run_team(
        "fabricrl.algos.ppo.ppo", *FLAGS, "--log-dir", tmp_path, folder=tmp_path / "out", prepare=lost_file, code=3
    )
    assert len(ended.errors) == 1, ended.report()
    assert ended.errors[0].startswith(
        "error: rank 1 cannot read the checkpoint that rank 0 resumes from: cannot read checkpoint "
    )


# --- Another number of ranks


def shares(args: Any, ranks: int, before: int, **stored: int) -> dict[str, int]:
    return resume.for_ranks(args, {"args": stored, "world_size": before}, ranks, [])


def test_a_runs_totals_stay_whatever_the_number_of_ranks() -> None:
    sac_args = SACArgs(num_envs=4, batch_size=256, buffer_size=1002)
    stored = {"num_envs": 4, "batch_size": 256, "buffer_size": 1002}
    # 2 ranks: 8 environments with 250 rows each, batches of 512; two transitions of a rank's 1002 fit into no row
    assert shares(sac_args, 2, 2, **stored) == stored
    assert shares(sac_args, 1, 2, **stored) == {"num_envs": 8, "batch_size": 512, "buffer_size": 2000}
    assert shares(sac_args, 4, 2, **stored) == {"num_envs": 2, "batch_size": 128, "buffer_size": 500}
    assert shares(PPOArgs(), 8, 2, num_envs=4) == {"num_envs": 1}
    kept = resume.for_ranks(sac_args, {"args": stored, "world_size": 2}, 1, ["num_envs"])
    assert kept == {"batch_size": 512, "buffer_size": 1002}  # of as many environments as each rank had
    more = SACArgs(num_envs=8, batch_size=256, buffer_size=1002)
    assert resume.for_ranks(more, {"args": stored, "world_size": 2}, 2, ["num_envs"]) == {"batch_size": 256}


@pytest.mark.parametrize(
    ("ranks", "stored", "reason"),
    [
        (3, {"num_envs": 4}, r"8 environments in all, which 3 ranks cannot share equally: .*another --num-envs"),
        (4, {"num_envs": 2, "batch_size": 127}, "254 transitions in a batch in all, which 4 ranks cannot share"),
    ],
)
def test_ranks_that_cannot_share_equally_are_refused(ranks: int, stored: dict[str, int], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        shares(SACArgs(), ranks, 2, **stored)


def test_ppo_goes_from_two_ranks_to_one_and_back_under_the_same_command(tmp_path: Path) -> None:
    """Each rank is given 2 environments, so that the run has 4; one rank alone plays all of them for a while."""
    flags = [*FLAGS, "--log-dir", tmp_path]

    def on_two_ranks(name: str, iterations: int) -> Any:
        code, stop = (143, {"STOPPED_IN": str(iterations)}) if iterations else (0, {})
        return run_team(
            "tests.stopped", "fabricrl.algos.ppo.ppo", *flags, folder=tmp_path / name, code=code, variables=stop
        )

    first = on_two_ranks("first", 2)
    assert first.result["steps"] == "256"
    with stopped_in(2):
        second = call(ppo.main, *flags)
    assert "ranks: 1, 2 in the checkpoint: each now has --num-envs 4" in second.err.splitlines()
    state, _ = load_checkpoint(second.folder)
    assert (state["global_step"], state["world_size"], state["args"]["num_envs"]) == (512, 1, 4)
    assert state["asked"] == {"num_envs": 2}
    third = on_two_ranks("third", 0)
    assert third.result["steps"] == "1024"
    assert runs(tmp_path) == 1
    state, path = load_checkpoint(second.folder)
    assert (str(path), state["args"]["num_envs"], state["asked"]) == (third.result["checkpoint"], 2, {})
    assert state["episodes"]["count"] == 1024 // 8


# As in test_off_policy_resume.py: the ring has wrapped, learning starts at 64 of 240
OFF_POLICY = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 4, "--total-timesteps", 240, "--norm-obs"]
OFF_POLICY += ["--env-kwargs", '{"continuous": true, "truncate": true}', "--buffer-size", 96, "--learning-starts", 64]
OFF_POLICY += ["--batch-size", 8, "--hidden-sizes", 16, "--n-step", 2, "--num-threads", 1, "--replay-ratio", 0.5]
FOUR = {"sac": OFF_POLICY, "droq": OFF_POLICY, "ppo_recurrent": [*FLAGS[:2], "--num-envs", 4, *FLAGS[4:-2]]}


@pytest.mark.parametrize("algo", FOUR)
def test_two_ranks_take_over_from_one_with_half_of_everything_each(algo: str, tmp_path: Path) -> None:
    """Environments, batches and replay buffers; the totals, which are those of the run, do not change."""
    script = f"fabricrl.algos.{algo}.{algo}"
    flags = [*FOUR[algo], "--resume", "auto", "--log-dir", tmp_path]
    with stopped_in(4 if algo == "ppo_recurrent" else 36):
        first = call(importlib.import_module(script).main, *flags)
    assert first.code == 143
    second = run_team(script, *flags, folder=tmp_path / "out")
    before, after = load(first.checkpoint), load(second.result["checkpoint"])
    total = 1024 if algo == "ppo_recurrent" else 240
    assert (before["world_size"], after["world_size"], after["global_step"]) == (1, 2, total)
    for name in {"num_envs", "batch_size", "buffer_size"} & before["args"].keys():
        assert after["args"][name] * 2 == before["args"][name] == after["asked"][name]
    if algo != "ppo_recurrent":
        updates = (240 - 64) // 2  # half an update each step after 64, on one rank and on two
        assert (before["schedule"]["done"], after["schedule"]["done"]) == ((144 - 64) // 2, updates)


@pytest.mark.parametrize(
    ("algo", "flags", "iterations", "steps", "share"),
    [
        ("ppo", FLAGS, 2, [128, 256, 1024], "such that each of 3 trainers has an equal share of every minibatch of 16"),
        ("sac", [*OFF_POLICY, "--resume", "auto"], 20, [80, 160, 240], "a multiple of 3, so that each trainer has"),
    ],
    ids=["ppo", "sac"],
)
def test_a_twin_goes_on_with_as_many_trainers_as_there_are_under_the_same_command(
    algo: str, flags: list[object], iterations: int, steps: list[int], share: str, tmp_path: Path
) -> None:
    """As torchrun starts it while nodes leave and return: where ranks are too few or cannot share, one line says so."""
    line = ["tests.stopped", f"fabricrl.algos.{algo}.{algo}_decoupled", *flags, "--log-dir", tmp_path / "logs"]
    done, refused = [], []
    for attempt, (ranks, code) in enumerate([(3, 143), (2, 143), (1, 2), (4, 2), (3, 0)]):
        variables = {"STOPPED_IN": str(iterations if code == 143 else 0)}
        options: dict[str, Any] = {"world_size": ranks, "code": code, "variables": variables}
        ended = run_team(*line, folder=tmp_path / f"{attempt}", **options)
        if code == 2:
            refused += ended.errors
        else:
            trainers = len(load(ended.result["checkpoint"])["generators"])
            done.append((int(ended.result["steps"]), trainers))
    assert done == list(zip(steps, [2, 1, 2], strict=True))
    assert runs(tmp_path / "logs") == 1
    alone, odd = refused
    assert alone.startswith("error: --nproc-per-node is 1: a decoupled script needs at least 2 ranks"), alone
    assert share in odd


def test_a_twin_takes_over_from_two_coupled_ranks_and_gives_the_run_back_to_one(tmp_path: Path) -> None:
    """Its player plays the environments of both."""
    flags = [*FLAGS[:-2], "--log-dir", tmp_path]
    stop = {"STOPPED_IN": "2"}
    script = "fabricrl.algos.ppo.ppo"
    first = run_team("tests.stopped", script, *flags, folder=tmp_path / "first", code=143, variables=stop)
    folder = Path(first.result["checkpoint"]).parent.parent
    twin = ["fabricrl.algos.ppo.ppo_decoupled", "--resume", folder]
    second = run_team("tests.stopped", *twin, folder=tmp_path / "second", code=143, variables=stop)
    assert load(second.result["checkpoint"])["args"]["num_envs"] == 4
    third = call(ppo.main, "--resume", folder)
    assert (third.code, third.result["steps"], load(third.checkpoint)["args"]["num_envs"]) == (0, "1024", 4)
