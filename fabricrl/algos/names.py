"""Names that tell what a run is: its folder's, the command that starts it, and what makes two runs the same."""

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from fabricrl.algos.args import DecoupledArgs, StandardArgs
from fabricrl.algos.command_line import preset_values
from fabricrl.utils.errors import ConfigError

# Arguments that names of runs leave out
UNNAMED_GROUPS = ("run, logging and checkpoints", "hardware and launching")
UNNAMED = {
    "env_id", "seed", "seeds", "jobs", "vectorization", "check_spaces", "capture_video", "video_every", "timeout",
    "eval_every", "eval_episodes", "stop_at_return",
}  # fmt: skip
MOST_NAMED = 100  # letters: names of files may have 255


def script_name(args: StandardArgs, algo: str) -> str:
    """The script that takes these arguments: the algorithm, or its decoupled twin."""
    return algo + "_decoupled" * isinstance(args, DecoupledArgs)


def run_name(args: StandardArgs, algo: str) -> str:
    """The name that was given, or the script's with what was changed: `ppo_num-envs=16_norm-obs`."""
    if args.exp_name:
        return args.exp_name
    name, changed = script_name(args, algo), _changed(args)
    for index, change in enumerate(changed):
        if len(name) + len(change) > MOST_NAMED:
            return f"{name}_and-{len(changed) - index}-more"
        name += f"_{change}"
    return name


def command(args: StandardArgs, algo: str) -> str:
    """The command line that trains with these arguments; what concerns one's own disk and accounts is left out."""
    words = ["fabricrl", script_name(args, algo).replace("_", "-")]
    words += ["--env-id", args.env_id]
    for name, value in _different(args, set(UNNAMED_GROUPS[:1]), {"env_id", "seeds", "jobs", "node_rank"}):
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def identity(kind: type[StandardArgs], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, as JSON has them: those that its name comes from, seed and `exp_name`.

    They are the arguments of environment and algorithm, and whether the script is the decoupled one. How a run is
    watched, and where it computes, is no part of it.
    Arguments that `values` lack, as they are of an earlier version, have their defaults.
    """
    found, group = {}, ""
    for field in dataclasses.fields(kind):
        group = field.metadata["group"] or group
        named = group not in UNNAMED_GROUPS and field.name not in UNNAMED
        if named or field.name in ("env_id", "seed", "exp_name"):
            found[field.name] = values.get(field.name, field.default)
    return json.loads(json.dumps(found | {"is_decoupled": "max_lag" in values}))


def _different(args: StandardArgs, groups: set[str], names: set[str]) -> Iterator[tuple[str, Any]]:
    """Arguments that differ from the defaults, or from those of the preset, save some groups and names."""
    preset: dict[str, Any] = {}
    with contextlib.suppress(ConfigError):
        preset = preset_values(type(args), getattr(args, "preset", "default"), args.presets, args.env_id)
    group = ""
    for field in dataclasses.fields(args):
        group = field.metadata["group"] or group
        value = getattr(args, field.name)
        default = preset.get(field.name, field.default)
        if group not in groups and field.name not in names and value != default:
            yield field.name, value


def _changed(args: StandardArgs) -> list[str]:
    """Arguments of environment and algorithm that differ from the defaults, in the names of runs."""
    told = []
    for field, value in _different(args, set(UNNAMED_GROUPS), UNNAMED):
        name = field.replace("_", "-")
        if isinstance(value, bool):
            told.append(name if value else f"no-{name}")
        else:
            text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
            told.append(f"{name}={re.sub(r'[^A-Za-z0-9.+]+', '-', text).strip('-') or 'none'}")
    return told
