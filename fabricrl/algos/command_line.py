"""Reads a command line: flags, presets and the arguments of a run that is resumed."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fabricrl.algos.args import AUTO, DecoupledArgs, StandardArgs
from fabricrl.algos.flags import flag_of
from fabricrl.utils.checkpoint import load_checkpoint, reading
from fabricrl.utils.errors import CheckpointError, ConfigError, require
from fabricrl.utils.spelling import others_call_so

Args = TypeVar("Args", bound=StandardArgs)
REGISTRY = ConstructorRegistry()


def parse(kind: type[Args], algo: str, presets: dict[str, dict[str, Any]] | None = None) -> Args:
    """The arguments of a command line: flags given win over `--resume`'s, those over `--preset`'s, those over defaults.

    With `--seeds` the process does not come back: it runs its own command once a seed, and compares the runs.

    Raises:
        ConfigError: an unknown flag, or a value that is not allowed.
        CheckpointError: `--resume` names something that cannot be resumed.
    """
    defaults: dict[str, Any] = {}
    preset = _early("--preset")
    if (resume := _early("--resume")) not in (None, AUTO):
        if preset is not None:
            raise ConfigError(f"--preset {preset} cannot be used with --resume: a resumed run keeps its own arguments")
        require(bool(resume), "resume", "empty", "a checkpoint or a run folder")
        defaults = _inherited(kind, *load_checkpoint(str(resume), algo))
    elif preset is not None:
        defaults = {
            "preset": preset,
            **preset_values(kind, preset, presets or {"default": {}}, _early("--env-id") or kind.env_id),
        }
    args = kind(**_parse_flags(kind, defaults))
    if resume not in (None, AUTO) and hasattr(args, "frame_stack"):
        frames = defaults.get("frame_stack", 1)
        allowed = f"{frames}, as in the checkpoint: its networks take that many frames"
        require(args.frame_stack == frames, "frame_stack", args.frame_stack, allowed)
    args.check_machine()
    if args.seeds > 1:
        from fabricrl.sweep import run_seeds  # the commands around the scripts import what scripts do without

        sys.exit(run_seeds(args.seed, args.seeds, args.jobs, args.log_dir))
    return args


def preset_values(
    kind: type[StandardArgs], name: str, presets: dict[str, dict[str, Any]], env_id: str
) -> dict[str, Any]:
    """The defaults of a preset; `tuned` looks into the algorithm's presets.toml for the environment.

    Raises:
        ConfigError: there is no such preset, or none for the environment.
    """
    if name != "tuned":
        require(name in presets, "preset", name, f"one of {', '.join([*presets, 'tuned'])}")
        return presets[name]
    if env_id.startswith("ALE/") and "atari" in presets:
        return presets["atari"] | {"env_id": env_id}
    path = Path(sys.modules[kind.__module__].__file__ or "").with_name("presets.toml")
    tuned = tomllib.loads(path.read_text()) if path.exists() else {}
    family = re.sub(r"-v\d+$", "", env_id)
    if family not in tuned:
        others = f"there are some for {', '.join(sorted(tuned))}" if tuned else "the algorithm has none"
        raise ConfigError(f"--preset tuned has no settings for {env_id}; {others}")
    settings = {field: tuple(value) if isinstance(value, list) else value for field, value in tuned[family].items()}
    return settings | {"env_id": env_id}


def _inherited(kind: type[StandardArgs], state: dict[str, Any], found: Path) -> dict[str, Any]:
    """The arguments of a checkpoint that a run which goes on from it has.

    Raises:
        CheckpointError: one is unknown, of another type, or not allowed, also beside the others.
    """
    older = {"player_device": "auto"} if state["args"].get("player_device", "") is None else {}  # its name was None
    stored, own = state["args"] | older, {field.name for field in dataclasses.fields(kind)}
    twins = {field.name for field in dataclasses.fields(DecoupledArgs)}  # of the decoupled script, perhaps
    if unknown := sorted(stored.keys() - own - twins):
        raise CheckpointError(f"{found} has an argument that {state['algo']} does not know: {unknown[0]!r}")
    with reading(found):
        kind(**{name: value for name, value in stored.items() if name in own})
    inherited = own - _not_resumed()
    if ("max_lag" in stored) != issubclass(kind, DecoupledArgs):
        inherited -= {"devices", "num_nodes", "exp_name"}  # one rank more plays there, or here
    return {name: value for name, value in stored.items() if name in inherited}


def _early(flag: str) -> str | None:
    """Value given for a flag that the defaults of others depend on."""
    words = sys.argv[1:]
    given = [after for word, after in itertools.pairwise(words) if _is_flag(word, flag)]
    given += [
        value for name, equals, value in (word.partition("=") for word in words) if equals and _is_flag(name, flag)
    ]
    return given[-1] if given and given[-1] != "None" else None


def _is_flag(word: str, flag: str) -> bool:
    """Tells if a word is this flag, as people write it: `--num_envs`, too."""
    return word.replace("_", "-") == flag


def is_given(name: str) -> bool:
    """Tells if an argument stands on the command line."""
    return _early(flag_of(name)) is not None


def _not_resumed() -> set[str]:
    """Arguments that say where this process stands, not what the run is; another launcher brings its own."""
    if "LT_CLI_USED" in os.environ:
        choices = {"accelerator", "cuda", "devices", "strategy", "num_nodes", "precision"}
    else:
        choices = {"devices", "num_nodes"} if "TORCHELASTIC_RUN_ID" in os.environ else set()
    return {"resume", "seeds", "jobs", "node_rank", "main_address", "main_port", "allow_empty_buffer"} | choices


def _parse_flags(kind: type[StandardArgs], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. tyro draws a box of help for each nested dataclass, so each section becomes one."""
    sections = _sections(kind, defaults)
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    words = sys.argv[1:]
    if "--help-all" in words:
        words = ["--help"]
    elif "--help" in words or "-h" in words:
        words, sections = ["--help"], _sections(kind, defaults, advanced=False)
        description += "\n\nThese are the arguments that people change; --help-all lists all."
    boxes = []
    for title, fields in sections.items():
        box = dataclasses.make_dataclass(_name(title), fields, frozen=True)
        box.__doc__ = ""  # tyro would print the one that is made up
        settings = tyro.conf.arg(name=title), tyro.conf.OmitArgPrefixes
        boxes.append((_name(title), Annotated[box, *settings], dataclasses.field(default=box())))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = dataclasses.make_dataclass("Arguments", boxes, frozen=True)
            parsed: Any = tyro.cli(arguments, args=words, description=description, registry=REGISTRY)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        _complain(errors.getvalue(), kind)
    boxed = {name: getattr(parsed, _name(title)) for title, fields in sections.items() for name, *_ in fields}
    return {name: getattr(box, name) for name, box in boxed.items()}


def _name(title: str) -> str:
    """A section's title as the name of a dataclass."""
    return re.sub(r"\W+", "_", title)


@REGISTRY.primitive_rule
def _integers(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Makes tyro read integers as people write them: 1e6, too."""
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_integer,
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


def _integer(words: Sequence[str]) -> int:
    """Raises ValueError unless it is whole."""
    (word,) = words
    with contextlib.suppress(ValueError):
        return int(word)
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        raise ValueError(f"{word} is not a whole number")
    return int(number)


def _sections(kind: type[StandardArgs], defaults: dict[str, Any], advanced: bool = True) -> dict[str, list[tuple]]:
    """Title → fields (name, type, default): the environment, then what the algorithm adds, then the rest.

    `advanced`: with those that people rarely change.
    """
    sections: dict[str, list[tuple]] = {}
    title = ""
    for field in dataclasses.fields(kind):
        about: Any = field.metadata or {"group": "", "advanced": False, "help": ""}  # a field that `arg` has not made
        title = about["group"] or title
        if about["advanced"] and not advanced:
            continue
        kind_and_help = Annotated[field.type, tyro.conf.arg(help=about["help"])]  # type: ignore[name-defined]
        default = dataclasses.field(default=defaults.get(field.name, field.default))
        sections.setdefault(title, []).append((field.name, kind_and_help, default))
    standard = [f.metadata["group"] for f in dataclasses.fields(StandardArgs) if f.metadata.get("group")]
    rank = {title: len(sections) + i if i else -1 for i, title in enumerate(standard)}
    return dict(sorted(sections.items(), key=lambda item: rank.get(item[0], 0)))


def _complain(text: str, kind: type[StandardArgs]) -> NoReturn:
    """Raises ConfigError with one line out of tyro's box: the argument, what was given, and what is allowed."""
    boxed = "╭" in text  # elsewhere, on terminals without such characters, a title and a rule come first
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    lines = lines if boxed else lines[2:]
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}]
    head = " ".join(lines[: rules[0] if rules else len(lines)])
    meant = [lines[i + 1].split(" ")[0].rstrip(",") for i, line in enumerate(lines[:-1]) if "Perhaps you meant" in line]
    if unknown := re.match(r"Unrecognized options: (\S+?),?(?:\s|$)", head):
        raise ConfigError(_unknown(unknown[1], kind, meant))
    if found := re.search(r"(?:Error parsing |argument ')(--[\w-]+)", head):
        (field,) = (field for field in dataclasses.fields(kind) if _is_flag(found[1], flag_of(field.name)))
        raise ConfigError(f"{found[1]} {_given(found[1])}: it must be {_allowed(field.type)}")
    raise ConfigError(f"{head}; see --help")


def _unknown(word: str, kind: type[StandardArgs], meant: list[str]) -> str:
    """Says that a word is not an argument, and which was: one that others call so, or that tyro thinks was `meant`."""
    flags = {flag_of(field.name): field.type for field in dataclasses.fields(kind)}
    before = next((w for w, after in itertools.pairwise(sys.argv[1:]) if after == word), "").replace("_", "-")
    switch = next((flag for flag in flags if flag == before or f"{flag}={word}" in sys.argv), "")
    if flags.get(switch) is bool:
        return f"{switch} takes no value, and has {word}: write {switch} or --no-{switch[2:]}"
    if not word.startswith("-"):
        return f"{word} is neither an argument nor the value of one; see --help"
    word = word.partition("=")[0]
    like = word.replace("_", "-")
    ours = others_call_so(like, flags) or meant or difflib.get_close_matches(like, flags, n=1)
    hint = f"did you mean {' or '.join(ours)}?" if ours else "--help-all lists those there are"
    return f"{word} is not an argument; {hint}"


def _given(flag: str) -> str:
    """Says what the command line gives for a flag."""
    words = sys.argv[1:]
    (*_, at) = (i for i, word in enumerate(words) if _is_flag(word.partition("=")[0], flag))
    values = [words[at].partition("=")[2]] if "=" in words[at] else []
    values += itertools.takewhile(lambda word: not word.startswith("--"), words[at + 1 :])
    return f"is {' '.join(values)}" if values else "has no value"


def _allowed(kind: Any) -> str:
    """Says which values an argument of this type takes."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"{'whole numbers' if get_args(kind)[0] is int else 'words'} with spaces between them"
    if others := [other for other in get_args(kind) if other is not NoneType]:
        return f"{_allowed(others[0])}, or None"
    return {int: "a whole number", float: "a number"}.get(kind, "a word")
