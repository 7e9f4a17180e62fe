"""Numbers that environments tell at the ends of episodes: charts, evaluations, and what was never told."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.algos.sac import sac
from fabricrl.utils.metric import EpisodeStatistics
from tests.conftest import on_ranks
from tests.process import call, logged, run_team

PPO = ["--num-envs", 4, "--num-steps", 32, "--total-timesteps", 512, "--hidden-sizes", 8]
SAC = ["--num-envs", 4, "--total-timesteps", 96, "--learning-starts", 40, "--batch-size", 8, "--hidden-sizes", 8]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("main", "flags"), [(ppo.main, PPO), (sac.main, SAC)], ids=["ppo", "sac"])
def test_means_over_the_episodes_are_charts_and_stand_in_evaluations(
    main: Callable[[], int], flags: list, vectorization: str, tmp_path: Path
) -> None:
    """An environment of Dicey has one bias for ever, and all have episodes of six steps: each counts alike."""
    kwargs = {"continuous": main is sac.main, "torch_too": False}
    env = ["--env-id", "tests.envs:Dicey-v0", "--env-kwargs", json.dumps(kwargs), "--vectorization", vectorization]
    env += ["--info-keys", "bias", "text", "--log-every", 48, "--eval-every", 48, *flags]
    run = call(main, *env, "--log-dir", tmp_path)
    events = logged(run.folder)
    assert events["charts/is_success"][-1][1] * 4 == pytest.approx(round(events["charts/is_success"][-1][1] * 4))
    assert 0 < events["charts/bias"][-1][1] < 1  # and nothing of the steps before the last, which tell −10⁹
    assert 0 < events["eval/bias_mean"][-1][1] < 1
    assert "charts/text" not in events
    warning = "warning: --info-keys text: no such number was in the infos at the end of "
    assert run.err.count(warning) == 1
    shown = call(evaluate.main, run.checkpoint, "--episodes", 6, "--json")
    found = json.loads(shown.out)["greedy"]
    assert 0 < found["bias_mean"] < 1
    assert found["is_success_mean"] in np.arange(7) / 6
    assert "text_mean" not in found
    table = call(evaluate.main, run.checkpoint, "--episodes", 6).out
    assert re.search(r"  is_success [01]\.\d\d  bias 0\.\d\d$", table.splitlines()[1])


def test_environments_that_tell_nothing_have_no_chart_and_no_warning(tmp_path: Path) -> None:
    run = call(ppo.main, *PPO, "--log-dir", tmp_path)
    assert not [tag for tag in logged(run.folder) if "is_success" in tag]
    assert "info-keys" not in run.err


def test_means_are_over_the_episodes_of_all_ranks_that_have_the_number() -> None:
    """Rank 0 ends two episodes, with (1, 5) and (0, nothing), rank 1 one, with (0, nothing): 1/3, and 5."""
    infos = [np.array([[1.0, 5.0], [0.0, np.nan]]), np.array([[0.0, np.nan]])]

    def work(fabric: Any) -> tuple[dict[str, float], set[str]]:
        episodes, dones = EpisodeStatistics(2, ("is_success", "height", "never")), torch.zeros(3, 2, dtype=torch.bool)
        dones[1, 0] = True
        dones[2, 1] = fabric.global_rank == 0
        told = np.pad(infos[fabric.global_rank], ((0, 0), (0, 1)), constant_values=np.nan)
        episodes.update(fabric, torch.ones(3, 2), dones, infos=told)
        return episodes.compute(), episodes.told

    for charts, told in on_ranks(2, work):
        assert charts == {
            "charts/episodic_return": pytest.approx(7 / 3),
            "charts/episodic_length": pytest.approx(7 / 3),
            "charts/is_success": pytest.approx(1 / 3),
            "charts/height": 5.0,
        }
        assert told == {"is_success", "height"}


def test_ranks_and_their_evaluations_agree_on_what_was_told(tmp_path: Path) -> None:
    flags = ["--env-id", "tests.envs:Dicey-v0", *PPO, "--eval-every", 256, "--info-keys", "bias", "nothing"]
    run = run_team("fabricrl.algos.ppo.ppo", *flags, "--log-dir", tmp_path / "logs", folder=tmp_path / "out")
    events = logged(Path(run.result["checkpoint"]).parent.parent)
    assert 0 < events["charts/bias"][-1][1] < 1
    assert 0 < events["eval/bias_mean"][-1][1] < 1
    assert run.printed("err").count("warning: --info-keys nothing") == 1
