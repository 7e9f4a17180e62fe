"""Output of a run: its folder, metrics, result line, progress bar and videos."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gymnasium as gym
import pytest
import torch

from fabricrl.algos import remarks
from fabricrl.algos.command_line import preset_values
from fabricrl.algos.names import run_name
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PRESETS, PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo.ppo import main
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.data import RecurrentRolloutBuffer, ReplayBuffer, RolloutBuffer
from fabricrl.envs import make_envs
from fabricrl.envs.wrappers import RecordEpisodes
from fabricrl.utils import metric
from fabricrl.utils import run as run_utils
from fabricrl.utils.errors import EnvError, from_here
from fabricrl.utils.run import progress_bar
from tests.conftest import BareRun
from tests.process import FORKED, PPO, Finished, call, load, logged, run, run_folder, saved_steps

RESULT = re.compile(r"result steps=(\d+) sps=(\d+) return_mean=(-?[\d.]+|nan) episodes=(\d+) checkpoint=(\S+)")
TAGS = {
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS",
    "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance", "time/env", "time/act", "time/train", "time/comm",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """2048 steps of CartPole-v1: 2 environments × 128 steps, 8 iterations, a log entry every second."""
    flags = ["--num-envs", 2, "--total-timesteps", 2048, "--log-every", 512, "--checkpoint-every", 1024]
    flags += ["--capture-video", "--video-every", 10, "--seed", 3, "--exp-name", "named.run-1"]
    return call(main, *flags, "--log-dir", tmp_path_factory.mktemp("run") / "logs")


def test_run_folder_is_named_after_algorithm_environment_experiment_seed_and_time(finished: Finished) -> None:
    algo, env, name = finished.folder.parts[-3:]
    assert (algo, env) == ("ppo", "CartPole-v1")
    assert re.fullmatch(r"named\.run-1_3_\d{8}-\d{6}", name)


def test_run_folder_holds_events_arguments_checkpoints_and_videos_and_nothing_else(finished: Finished) -> None:
    names = sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in finished.folder.iterdir())
    names = [name for name in names if name != "hparams.yaml"]  # TensorBoard's logger may add it
    assert names == ["args.json", "checkpoints", "events.out.tfevents", "videos"]
    assert saved_steps(finished.folder) == [1024, 2048]


@pytest.mark.parametrize(
    ("algo", "buffer", "steps"),
    [(main, RolloutBuffer, 512), (ppo_recurrent.main, RecurrentRolloutBuffer, 1024), (sac.main, ReplayBuffer, 20)],
    ids=["ppo", "ppo_recurrent", "sac"],
)
def test_storing_a_step_counts_as_time_in_environments(
    algo: Any, buffer: Any, steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that stands still but while a step is stored."""
    passed, add = [0.0], buffer.add

    def add_slowly(*step: Any, **infos: Any) -> None:
        passed[0] += 1
        add(*step, **infos)

    monkeypatch.setattr(metric, "perf_counter", lambda: passed[0])
    monkeypatch.setattr(buffer, "add", add_slowly)
    flags = ["--learning-starts", 10, "--batch-size", 8] if algo is sac.main else []
    flags += ["--env-id", "Pendulum-v1", "--total-timesteps", steps]
    finished = call(algo, *flags, "--log-dir", tmp_path)
    shares = {tag: values[-1][1] for tag, values in logged(finished.folder).items() if tag.startswith("time/")}
    assert shares.pop("time/env") == 1
    assert set(shares.values()) == {0}


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_fails_before_it_writes_anything_leaves_no_folder(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise EnvError("it is broken")

    monkeypatch.setattr(ppo, *("rollout", fail) if late else ("make_agent", fail))
    with pytest.raises(EnvError, match="broken"):
        call(main, "--num-envs", 2, "--total-timesteps", 512, "--log-dir", tmp_path)
    folders = list((tmp_path / "ppo" / "CartPole-v1").iterdir())
    assert [(folder / "args.json").exists() for folder in folders] == [True] * late


def test_args_json_holds_the_arguments_that_ran(finished: Finished) -> None:
    stored = json.loads((finished.folder / "args.json").read_text())
    expected = dataclasses.asdict(PPOArgs(num_envs=2, total_timesteps=2048, log_every=512, checkpoint_every=1024))
    expected |= {"capture_video": True, "video_every": 10, "seed": 3, "exp_name": "named.run-1"}
    expected |= {"hidden_sizes": [64, 64], "obs_keys": [], "info_keys": []}
    expected |= {"log_dir": str(finished.folder.parent.parent.parent)}
    assert stored == expected


def test_result_is_one_line_on_standard_output_that_tells_what_happened(finished: Finished) -> None:
    match = RESULT.fullmatch(finished.out.rstrip("\n"))
    assert match, finished.out
    steps, sps, return_mean, episodes, checkpoint = match.groups()
    state = load(checkpoint)
    assert int(steps) == 2048 == state["global_step"]
    assert int(sps) > 0
    assert int(episodes) == state["episodes"]["count"]
    assert float(return_mean) == pytest.approx(
        sum(state["episodes"]["returns"]) / len(state["episodes"]["returns"]), abs=0.01
    )
    assert finished.code == 0


def test_every_tag_of_the_design_is_logged_and_steps_are_environment_steps(finished: Finished) -> None:
    scalars = logged(finished.folder)
    assert scalars.keys() >= TAGS
    for tag in TAGS:
        assert [step for step, _ in scalars[tag]] == [512, 1024, 1536, 2048], tag
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag
    assert scalars["charts/learning_rate"][-1][1] == pytest.approx(2.5e-4 / 8)  # the last of 8 iterations: 7/8 is gone
    assert all(length == score for length, score in zip(  # CartPole pays 1 a step
        scalars["charts/episodic_length"], scalars["charts/episodic_return"], strict=True))  # fmt: skip


def test_time_shares_of_each_entry_add_up_to_one(finished: Finished) -> None:
    shares = {tag: values for tag, values in logged(finished.folder).items() if tag.startswith("time/")}
    for entry in zip(*shares.values(), strict=True):
        assert all(0 <= share <= 1 for _, share in entry)
        assert sum(share for _, share in entry) == pytest.approx(1, abs=1e-4)


def test_every_tenth_episode_of_environment_zero_is_recorded(finished: Finished) -> None:
    videos = sorted((finished.folder / "videos").iterdir())
    assert {video.suffix for video in videos} == {".mp4"}
    numbers = [int(re.fullmatch(r"train-episode-(\d+)", video.stem).group(1)) for video in videos]  # type: ignore[union-attr]
    assert sorted(numbers) == list(range(0, 10 * len(numbers), 10))
    # Two environments share the episodes about equally: half of them over ten, not all of them over ten
    assert len(numbers) <= int(finished.result["episodes"]) // 10 - 2
    assert all(b"ftyp" in video.read_bytes()[:16] for video in videos)


def test_only_environment_zero_of_rank_zero_is_recorded(tmp_path: Path) -> None:
    def layers(env: gym.Env) -> Iterator[gym.Env]:
        while isinstance(env, gym.Wrapper):
            yield env
            env = env.env

    def recorded(rank: int) -> list[bool]:
        envs = make_envs(PPOArgs(num_envs=3, capture_video=True), rank, tmp_path)
        try:
            return [any(isinstance(layer, RecordEpisodes) for layer in layers(env)) for env in envs.unwrapped.envs]
        finally:
            envs.close()

    assert recorded(0) == [True, False, False]
    assert recorded(1) == [False, False, False]


def test_no_progress_bar_without_a_terminal_and_one_with_it(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\r" not in finished.err
    chosen, where = finished.err.splitlines()  # and not how to watch
    assert re.fullmatch(r"vectorization: (a?sync|native)", chosen)
    assert "1 rank on cpu" in where

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--total-timesteps", "1024", "--log-dir", str(tmp_path)])
    assert main() == 0
    assert "1.02k/1.02k" in terminal.getvalue() or "1024/1024" in terminal.getvalue()
    assert re.search(r"return \d+\.\d", terminal.getvalue())
    logs, address = re.search(r"to watch: tensorboard --logdir (\S+), and (\S+)\n", terminal.getvalue()).groups()  # type: ignore[union-attr]
    assert logs == str(tmp_path)
    assert parse_qs(urlsplit(address).query) == {
        "pinnedCards": ['[{"plugin":"scalars","tag":"charts/episodic_return"}]']
    }


def test_without_a_terminal_a_line_now_and_then_tells_how_far_it_is(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_utils, "TELL_EVERY", 0.0)
    lines = train(main, "--total-timesteps", 1536, "--num-steps", 128).output.splitlines()
    told = [re.fullmatch(r"step (\d+) of 1536, \d+ steps/s, return (\d+\.\d)", line) for line in lines]
    assert [int(line[1]) for line in told if line] == [512, 1024, 1536]


def test_a_run_goes_on_where_nobody_reads_how_far_it_is(
    script: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith(("step ", "hint")):
                raise BrokenPipeError
            return super().write(text)

    told: list[str] = []
    monkeypatch.setattr(run_utils, "TELL_EVERY", 0.0)
    monkeypatch.setattr(remarks, "faster", lambda run: told.append("hint") or "hint")
    monkeypatch.setattr(sys, "stderr", Closed())
    assert script(main, "--total-timesteps", 1024, "--log-dir", tmp_path) == 0
    assert told


def test_a_narrow_terminal_shows_the_return_also_once_it_has_been_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    with progress_bar(1_000_000, 0, hidden=False) as bar:
        bar.set_description_str("return 123.4", refresh=False)
        for columns in (120, 60, 24, 16, 90):
            bar.dynamic_ncols = lambda _, columns=columns: (columns, 24)  # stands for what the terminal answers
            bar.update(1000)
            bar.refresh()
            shown = terminal.getvalue().split("\r")[-1].rstrip()
            assert shown.startswith("return 123.4")
            assert len(shown) <= columns
            assert ("steps/s" in shown) == (columns > 60)


def test_a_run_is_named_after_what_was_changed() -> None:
    def name(kind: Any = PPOArgs, **given: Any) -> str:
        return run_name(kind(**given), "ppo")

    assert name() == name(seed=3, env_id="Acrobot-v1", log_dir="x", devices="1", vectorization="sync") == "ppo"
    assert name(num_envs=16, norm_obs=True, clip_vloss=False) == "ppo_num-envs=16_norm-obs_no-clip-vloss"
    assert name(hidden_sizes=(32, 16), env_kwargs='{"a": [1]}') == "ppo_env-kwargs=a-1_hidden-sizes=32-16"
    assert name(hidden_sizes=()) == "ppo_hidden-sizes=none"
    assert name(learning_rate=1e-3, exp_name="mine") == "mine"
    preset = {"preset": "mujoco", **PRESETS["mujoco"]}
    assert name(**preset) == "ppo_preset=mujoco"
    assert name(**preset | {"num_envs": 4}) == "ppo_num-envs=4_preset=mujoco"  # though it is the default without preset
    tuned = {**preset_values(PPOArgs, "tuned", PRESETS, "CartPole-v1"), "preset": "tuned"}
    assert name(**tuned) == "ppo_preset=tuned"
    assert name(PPODecoupledArgs, max_lag=0) == "ppo_decoupled_max-lag=0"
    many = {
        "total_timesteps": 999_936,
        "num_envs": 31,
        "num_steps": 1024,
        "num_minibatches": 8,
        "learning_rate": 1.0e-3,
    }
    more = name(**many, gamma=0.999, gae_lambda=0.9, clip_coef=0.3, update_epochs=3, vf_coef=1.0)
    assert re.fullmatch(r"ppo_num-envs=31_.*_and-\d-more", more)
    assert len(more) < 120


def test_tensorboard_compares_runs_by_arguments_and_last_metrics(finished: Finished) -> None:
    """As its HParams tab asks: columns, a row for each run, and whether it has ended well."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    logs = finished.folder.parents[2]
    other = call(main, "--total-timesteps", 512, "--learning-rate", 1e-3, "--log-dir", logs)
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(logs))
    runs.Reload()
    context, asked = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(logs)))), RequestContext()
    wanted = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=range(4), include_metrics=True)
    rows = {row.name.split("/")[-1]: row for row in Handler(asked, context, "", wanted).run().session_groups}
    assert rows.keys() == {finished.folder.name, other.folder.name}
    for each, rate in ((finished, 2.5e-4), (other, 1e-3)):
        row = rows[each.folder.name]
        assert row.hparams["learning_rate"].number_value == rate
        assert row.hparams["hidden_sizes"].string_value == "(64, 64)"
        assert row.hparams["clip_vloss"].string_value == "True"
        last = {metric.name.tag: metric.value for metric in row.metric_values}
        assert f"{last['charts/return_mean']:.2f}" == each.result["return_mean"]
        assert [session.status for session in row.sessions] == [api_pb2.STATUS_SUCCESS]
    shutil.rmtree(other.folder)


def test_paths_below_the_current_folder_begin_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that was named by its whole path, or is resumed; in the result line, too."""
    monkeypatch.chdir(tmp_path)
    flags = ["--num-envs", 1, "--total-timesteps", 128]
    first = call(main, *flags, "--log-dir", tmp_path / "logs")
    again = call(main, "--resume", first.checkpoint.absolute())
    relative = call(main, *flags, "--log-dir", "logs")
    from_relative = call(main, "--resume", relative.folder)
    for ended in (first, again, relative, from_relative):
        assert ended.result["checkpoint"].startswith("logs/ppo/")
        assert ended.checkpoint.exists()
        assert "writing to logs/ppo/" in ended.err
        assert str(tmp_path) not in ended.err
    assert "nothing to do: 128 of 128 steps are done; to continue: --resume " in again.err
    assert "--total-timesteps 256" in again.err
    relative = first.folder
    longer = call(main, "--resume", relative, "--total-timesteps", 256)
    assert longer.result["checkpoint"] == f"{relative}/checkpoints/step_000000000256.ckpt"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("{0}/a", "a"), ("cannot read {0}/a/b: no", "cannot read a/b: no"), ("{0}", "{0}"), ("{0}2/a", "{0}2/a"),
     ("/x{0}/a", "/x{0}/a"), ("'{0}/a'", "'a'"), ("../a", "../a")],
)  # fmt: skip
def test_texts_show_paths_from_here(text: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(text.format(tmp_path)) == shown.format(tmp_path)


def test_csv_logger_writes_a_row_for_each_entry_and_two_runs_of_a_second_have_two_folders(tmp_path: Path) -> None:
    flags = ["--logger", "csv", "--total-timesteps", 1024, "--log-every", 512, "--log-dir", tmp_path]
    first, second = call(main, *flags), call(main, *flags)
    assert first.folder != second.folder
    for finished in (first, second):
        assert not list(finished.folder.glob("events*"))
        with (finished.folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [512, 1024]
        assert rows[0].keys() >= TAGS - {"charts/episodic_return", "charts/episodic_length"}


def test_a_budget_of_no_whole_iterations_is_rounded_down_and_said_to_be(tmp_path: Path) -> None:
    flags = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--log-dir", tmp_path]
    rounded = call(main, *flags, "--total-timesteps", 100)
    assert rounded.result["steps"] == "96"
    text = "--total-timesteps 100 is rounded down to 96, whole iterations of 32 steps"
    assert rounded.err.splitlines().count(text) == 1
    assert "is rounded down" not in call(main, *flags, "--total-timesteps", 64).err
    more = call(main, "--resume", rounded.folder, "--total-timesteps", 200, "--num-envs", 4)
    assert more.result["steps"] == "160"
    assert "--total-timesteps 200 is rounded down to 160, whole iterations of 64 steps" in more.err


def test_without_save_model_no_checkpoint_is_written(tmp_path: Path) -> None:
    finished = call(main, "--no-save-model", "--total-timesteps", 512, "--log-dir", tmp_path)
    assert finished.result["checkpoint"] == "None"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_and_biases_work_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--track", "--total-timesteps", 1024, "--log-every", 512, "--log-dir", tmp_path / "logs"]
    ended = run(*FORKED, PPO, *flags, variables=variables)
    assert ended.code == 0, ended.report()
    folder = run_folder(tmp_path / "logs")
    assert list(folder.glob("wandb/offline-run-*/*.wandb")), list(folder.rglob("*"))
    assert not list(folder.glob("events*"))


def test_metrics_without_a_name_are_refused() -> None:
    """However many updates there are: three of 4 numbers could pass for four of 3."""
    run = BareRun(PPOArgs())
    run.add_metrics(("a", "b", "c"), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="4 metrics have 3 names: a, b, c"):
        run.add_metrics(("a", "b", "c"), torch.zeros(3, 4))


@pytest.mark.parametrize(("limit", "told"), [(16, True), (33, False)])
def test_an_environment_whose_episodes_never_end_is_told_of_once(
    limit: int, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remarks, "LONG_EPISODE", limit)
    flags = ["--num-steps", 8, "--num-envs", 2, "--total-timesteps", 64, "--log-every", 16, "--log-dir", tmp_path]
    finished = call(main, "--env-id", "Pendulum-v1", *flags)
    assert finished.err.count("no episode has ended in") == told
    assert ("no episode has ended in 16 steps: does the environment need max_episode_steps" in finished.err) == told
