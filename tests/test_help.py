"""`--help` shows the arguments that people change, `--help-all` shows all."""

import dataclasses
import re
import sys
from typing import Any

import pytest

from fabricrl.algos.args import StandardArgs
from fabricrl.algos.command_line import parse
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.ppo.args import PRESETS, PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.sac.args import SACArgs, SACDecoupledArgs

KINDS = [PPOArgs, PPODecoupledArgs, RecurrentPPOArgs, SACArgs, SACDecoupledArgs, DroQArgs]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    def call(kind: type[StandardArgs], *line: str) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["script.py", *line])
        with pytest.raises(SystemExit) as ended:
            parse(kind, "ppo", PRESETS)
        assert ended.value.code == 0
        return capsys.readouterr().out

    return call


def flags(text: str) -> set[str]:
    return {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text)}


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_some_thirty_arguments_and_help_all_shows_the_others_too(
    kind: type[StandardArgs], shown: Any
) -> None:
    fields = {field.name: field.metadata["advanced"] for field in dataclasses.fields(kind)}
    brief, full = flags(shown(kind, "--help")), flags(shown(kind, "--help-all"))
    everyday = {name for name, advanced in fields.items() if not advanced}
    assert brief & fields.keys() == everyday
    assert full & fields.keys() == fields.keys()
    assert 28 <= len(everyday) <= 36
    assert "help_all" in brief


def test_help_beside_a_preset_shows_its_defaults(shown: Any) -> None:
    line = next(line for line in shown(PPOArgs, "--preset", "mujoco", "--help").splitlines() if "--num-steps" in line)
    assert "2048" in line


def test_arguments_that_help_leaves_out_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--vf-coef", "0.25"])
    assert parse(PPOArgs, "ppo", PRESETS).vf_coef == 0.25


def test_sections_are_titled_in_words(shown: Any) -> None:
    titles = re.findall(r" ([\w,-]+(?: [\w,-]+)*) options ", shown(PPOArgs, "--help-all"))
    assert {"images and Atari", "rollout and returns"} <= set(titles)
    assert not any("-" in title or "_" in title for title in titles)
