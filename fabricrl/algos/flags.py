"""Names of flags: of an argument, and all that a script takes."""

import dataclasses
import importlib
import re
from pathlib import Path


def flag_of(name: str) -> str:
    """The flag of an argument: `--num-envs` of `num_envs`."""
    return f"--{name.replace('_', '-')}"


def flags_of(script: Path) -> list[str]:
    """The flags that an algorithm's script takes: those of what it calls `parse` with, out of the args.py beside it."""
    name = re.search(r"\bparse\((\w+), ", script.read_text(encoding="utf-8"))
    assert name is not None, f"{script} calls no parse"
    kind = getattr(importlib.import_module(f"fabricrl.algos.{script.parent.name}.args"), name[1])
    fields = {flag_of(field.name): field.type for field in dataclasses.fields(kind)}
    return [*fields, *(f"--no-{flag[2:]}" for flag, type_ in fields.items() if type_ is bool)]
