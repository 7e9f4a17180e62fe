"""Writes the tables of arguments into the documentation's pages, from the code, and description.md from README.md.

    python docs/generate.py            rewrites them
    python docs/generate.py --check    fails if one of them is not what it should be

A table stands between `<!-- arguments: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. `<!-- presets -->` and
`<!-- tuned -->` begin tables of presets. description.md is what package indexes show, where links into this repository
lead nowhere: see `description`.
"""

import dataclasses
import re
import sys
import tomllib
from pathlib import Path

from fabricrl.algos.args import DecoupledArgs, StandardArgs
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.off_policy.args import EntropyArgs
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.sac.args import SACArgs

DOCS = Path(__file__).parent
# Name -> the arguments of a table, and those that another table has already
TABLES: dict[str, tuple[type, type | None]] = {
    "standard": (StandardArgs, None),
    "ppo": (PPOArgs, StandardArgs),
    "ppo_recurrent": (RecurrentPPOArgs, PPOArgs),
    "sac": (SACArgs, StandardArgs),
    "droq": (DroQArgs, EntropyArgs),
    "decoupled": (DecoupledArgs, None),
}
ALGORITHMS = {"ppo": "PPO", "ppo_recurrent": "recurrent PPO", "sac": "SAC", "droq": "DroQ"}
MARKED = re.compile(r"(<!-- (arguments|presets|tuned)(?:: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def shown(value: object) -> str:
    """A default as it would be typed."""
    if value is None or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def own_fields(kind: type, base: type | None) -> list[dataclasses.Field]:
    """The fields that `base` does not have, or has with another default or help."""
    others = {field.name: field for field in dataclasses.fields(base)} if base else {}

    def is_new(field: dataclasses.Field) -> bool:
        other = others.get(field.name)
        return other is None or (other.default, other.metadata["help"]) != (field.default, field.metadata["help"])

    return [field for field in dataclasses.fields(kind) if is_new(field)]


def arguments(kind: type, base: type | None) -> str:
    """A Markdown table: argument, default, meaning. A star marks those that only `--help-all` lists."""
    lines = ["| argument | default | meaning |", "|-|-|-|"]
    for field in own_fields(kind, base):
        flag, star = f"`--{field.name.replace('_', '-')}`", " *" if field.metadata["advanced"] else ""
        meaning = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| {flag}{star} | {shown(field.default)} | {meaning} |")
    return "\n".join(lines)


def presets() -> str:
    """A Markdown table of what each preset changes."""
    names = [name for name in PRESETS if PRESETS[name]]
    changed = list(dict.fromkeys(key for name in names for key in PRESETS[name]))
    defaults = {field.name: field.default for field in dataclasses.fields(PPOArgs)}
    lines = [f"| argument | `classic` | {' | '.join(f'`{name}`' for name in names)} |", "|-" * (len(names) + 2) + "|"]
    for key in changed:
        values = [shown(PRESETS[name].get(key, defaults[key])) for name in names]
        lines.append(f"| `--{key.replace('_', '-')}` | {shown(defaults[key])} | {' | '.join(values)} |")
    return "\n".join(lines)


def tuned() -> str:
    """A Markdown table of the environments in each presets.toml, with the steps of their runs."""
    folder = DOCS.parent / "fabricrl/algos"
    steps = {
        algo: {env: settings["total_timesteps"] for env, settings in tomllib.loads(path.read_text()).items()}
        for algo in ALGORITHMS
        if (path := folder / algo / "presets.toml").exists()
    }
    lines = [f"| environment | {' | '.join(ALGORITHMS[algo] for algo in steps)} |", "|-" * (len(steps) + 1) + "|"]
    for env in sorted(set().union(*steps.values())):
        cells = [f"{of[env]:_}".replace("_", " ") if env in of else "–" for of in steps.values()]
        lines.append(f"| `{env}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def generated(page: str) -> str:
    """A page with its tables as the code says."""

    def table(match: re.Match[str]) -> str:
        start, what, name, end = match.groups()
        content = arguments(*TABLES[name]) if name else {"presets": presets, "tuned": tuned}[what]()
        return f"{start}\n{content}\n\n{end}"

    return MARKED.sub(table, page)


def description(readme: str, repository: str | None) -> str:
    """The README without pictures, its links into this repository led to the one on the web, or as plain text."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target.startswith("http"):
            return match[0]
        return f"[{text}]({repository}/blob/main/{target})" if repository else text

    without_pictures = re.sub(r"^!\[.*?\]\(.*?\)\n\n", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\(([^)]*)\)", link, without_pictures)


def main() -> int:
    pages = {path: path.read_text() for path in DOCS.rglob("*.md")}
    wanted = {path: generated(text) for path, text in pages.items()}
    urls = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"].get("urls", {})
    wanted[DOCS / "description.md"] = description((DOCS.parent / "README.md").read_text(), urls.get("Repository"))
    stale = [path for path, text in wanted.items() if pages.get(path) != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
