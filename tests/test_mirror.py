"""Scripts tell their algorithm, and twins mirror: figures of every script under fabricrl/algos, and their limits.

    python tests/test_mirror.py          the figures, those beyond their limits with a !
    python tests/test_mirror.py --diff   and the lines of each main() that its twins lack

A line of code is one that holds more than a comment, a docstring or a part of them.

main      lines of `main()`, or of a twin's `player()`, from `def` on, with comments and blank lines
modules   modules of ours that are imported from
names     names of ours that are imported
algorithm share of the lines of code, imports aside, that are no set-up: neither in `main()`, `player()` or `trainer()`
          before their loop, nor outside functions, nor behind `# 4. Log`
longest   lines of code of the longest function besides, and its name
nesting   most statements (`for`, `while`, `if`, `with`, `try`) that stand within each other in a function
mirror    share of the lines of code of `main()` that stand, in order, in `player()`: the longest common subsequence, so
          that no line counts twice. A line that differs in one word is another line
twins     the same, with those of the others that stand, in order, in `trainer()`, who does what the player leaves out
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Container
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ALGOS = Path(__file__).parent.parent / "fabricrl/algos"
SCRIPTS = {path.stem: path for path in sorted(ALGOS.glob("*/*.py")) if "run_script(main)" in path.read_text()}
TWINS = [name for name in SCRIPTS if name.endswith("_decoupled")]
COUPLED = [name for name in SCRIPTS if name not in TWINS]
MOST = {"main": 60, "modules": 8, "names": 22, "longest": 50, "nesting": 4}
LEAST = {"algorithm": 2 / 3, "mirror": 0.75, "twins": 0.85}
TWIN = {"modules": 10, "names": 30, "lines": 200}  # the most of a decoupled script
LETTER = re.compile(r"(?<![A-Za-z-])[A-Z](?![A-Za-z-])")
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in found}


def code(source: str) -> dict[int, str]:
    """Line number → line of code, stripped, without docstrings, comments and blank lines."""
    lines = dict(enumerate(source.splitlines(), 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row] = lines[row][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines |= dict.fromkeys(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1), "")
    return {number: line.strip() for number, line in lines.items() if line.strip()}


def body(source: str, name: str) -> list[str]:
    """The lines of code of a function, without its signature."""
    node = functions(ast.parse(source))[name]
    first = node.body[ast.get_docstring(node) is not None].lineno
    return [line for number, line in code(source).items() if first <= number <= (node.end_lineno or 0)]


def depth(node: ast.AST) -> int:
    """Depth of nested statements below a node; `elif` is no deeper than `if`."""
    below = [(child, depth(child)) for child in ast.iter_child_nodes(node)]
    chained = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    return max((d + isinstance(c, BLOCKS) - (c in chained and isinstance(c, ast.If)) for c, d in below), default=0)


@dataclass
class Figures:
    """Measures of a script."""

    main: int
    modules: int
    names: int
    algorithm: float
    longest: int
    longest_name: str
    nesting: int
    mirror: float | None
    twins: float | None


def set_up(source: str) -> set[int]:
    """The numbers of the lines that no algorithm needs."""
    tree, lines = ast.parse(source), source.splitlines()
    inside = [range(node.lineno, (node.end_lineno or 0) + 1) for node in tree.body if isinstance(node, ast.FunctionDef)]
    found = set(range(1, len(lines) + 1)) - {number for numbers in inside for number in numbers}
    for name, node in functions(tree).items():
        if name in ("main", "player", "trainer"):
            loops = [loop for loop in ast.walk(node) if isinstance(loop, ast.For | ast.While)]
            whole = range(node.lineno, (node.end_lineno or 0) + 1)
            loop = max(loops, key=lambda loop: (loop.end_lineno or 0) - loop.lineno, default=None)
            told = range(loop.lineno, (loop.end_lineno or 0) + 1) if loop else range(0)
            headings = [number for number in told if lines[number - 1].strip().startswith("# 4. Log")]
            found |= set(whole) - set(range(told.start, headings[0] if headings else told.stop))
    return found


def figures(name: str) -> Figures:
    source = SCRIPTS[name].read_text()
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    own = [node for node in imports if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fabricrl")]
    imported = {number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)}
    counted = code(source).keys() - imported
    whole = functions(tree)["player" if name in TWINS else "main"]
    others = {
        other: len(body(source, other)) for other in functions(tree) if other not in ("main", "player", "trainer")
    }
    longest = max(others, key=lambda other: others[other], default="")
    lines, player, trainer = mirrored(name) if name in TWINS else ([], [], [])
    return Figures(
        main=(whole.end_lineno or 0) - whole.lineno + 1,
        modules=len({node.module for node in own}),
        names=sum(len(node.names) for node in own),
        algorithm=len(counted - set_up(source)) / len(counted),
        longest=others.get(longest, 0),
        longest_name=longest,
        nesting=max(depth(node) for node in functions(tree).values()),
        mirror=len(player) / len(lines) if lines else None,
        twins=len(player + trainer) / len(lines) if lines else None,
    )


def common(first: list[str], second: list[str]) -> list[str]:
    """The longest common subsequence, by the textbook's table."""
    table: list[list[int]] = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) - 1, -1, -1):
        for j in range(len(second) - 1, -1, -1):
            longer = max(table[i + 1][j], table[i][j + 1])
            table[i][j] = table[i + 1][j + 1] + 1 if first[i] == second[j] else longer
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            found.append(first[i])
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def mirrored(twin: str) -> tuple[list[str], list[str], list[str]]:
    """The lines of a coupled `main()`, those that stand in its twin's `player()`, and others that do in `trainer()`."""
    main = body(SCRIPTS[twin.removesuffix("_decoupled")].read_text(), "main")
    player, trainer = (body(SCRIPTS[twin].read_text(), name) for name in ("player", "trainer"))
    both = common(main, player)
    return main, both, common(without(main, both), trainer)


def without(lines: list[str], some: list[str]) -> list[str]:
    """Rest of a sequence without a subsequence."""
    left, taken = [], iter([*some, None])
    wanted = next(taken)
    for line in lines:
        if line == wanted:
            wanted = next(taken)
        else:
            left.append(line)
    return left


def test_every_folder_has_a_script_and_every_script_its_twin() -> None:
    folders = {path.parent.name for path in ALGOS.glob("*/agent.py")}
    assert folders == {SCRIPTS[name].parent.name for name in COUPLED} >= {"ppo", "sac"}
    assert {twin.removesuffix("_decoupled") for twin in TWINS} == set(COUPLED)


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_script_tells_its_algorithm_and_little_else(name: str) -> None:
    found = figures(name)
    assert found.main <= MOST["main"]
    assert found.modules <= MOST["modules"]
    assert found.names <= MOST["names"]
    assert found.algorithm >= LEAST["algorithm"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_long_or_deep(name: str) -> None:
    found = figures(name)
    assert found.longest <= MOST["longest"], found.longest_name
    assert found.nesting <= MOST["nesting"]


@pytest.mark.parametrize("name", TWINS)
def test_three_quarters_of_main_stand_in_order_in_player_and_most_others_in_trainer(name: str) -> None:
    main, player, trainer = mirrored(name)
    assert len(main) >= 25, "main() has been counted wrongly"
    assert len(player) >= LEAST["mirror"] * len(main), f"{len(player)} of {len(main)} lines"
    assert len(player + trainer) >= LEAST["twins"] * len(main), f"{len(player)} + {len(trainer)} of {len(main)} lines"


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_short_and_shares_what_twins_have_in_common(name: str) -> None:
    found = figures(name)
    assert found.main <= MOST["main"]
    assert found.modules <= TWIN["modules"]
    assert found.names <= TWIN["names"]
    assert len(SCRIPTS[name].read_text().splitlines()) <= TWIN["lines"]


@pytest.mark.parametrize("name", TWINS)
def test_headings_stand_in_the_same_order(name: str) -> None:
    """Sections are found by number: `# 3. Update`, and what is done once, by `# --- Counters`."""
    headings = []
    for script, function in ((name.removesuffix("_decoupled"), "main"), (name, "player")):
        source = SCRIPTS[script].read_text()
        node = functions(ast.parse(source))[function]
        lines = [line.strip() for line in source.splitlines()[node.lineno : node.end_lineno]]
        found = [line for line in lines if line.startswith(("# ---", *(f"# {n}. " for n in range(1, 6))))]
        headings.append([line.split(",")[0].replace("Agent and", "Agent") for line in found])
    main, player = headings
    assert len(main) >= 9
    assert [line.split()[:3] for line in main] == [line.split()[:3] for line in player if "Close" not in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_letter_of_a_shape_is_explained(name: str) -> None:
    """In the docstring, or in that of the coupled script."""
    scripts = {SCRIPTS[name], SCRIPTS[name.removesuffix("_decoupled")]}
    legend = {letter for path in scripts for letter in LETTER.findall(ast.get_docstring(ast.parse(path.read_text())))}
    shapes = re.findall(r"\[([A-Z0-9 ,./+*−-]+)\]", SCRIPTS[name].read_text())
    assert {letter for shape in shapes for letter in LETTER.findall(shape)} <= legend


def modules() -> dict[str, ast.Module]:
    """All of ours, by name."""
    package = ALGOS.parent
    paths = {
        ".".join(("fabricrl", *path.relative_to(package).with_suffix("").parts)): path for path in package.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in paths.items()}


def imports(tree: ast.Module, known: Container[str]) -> set[str]:
    """Modules of ours that one imports, also inside of functions."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = [(node.module or "", f"{node.module}.{alias.name}") for node in found for alias in node.names]
    return {whole if whole in known else module for module, whole in names if module.partition(".")[0] == "fabricrl"}


def test_imports_lead_one_way() -> None:
    trees = modules()
    graph = {name: imports(tree, trees) for name, tree in trees.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError
    for name, found in graph.items():
        room = name.split(".")[1:2]
        allowed = {"utils": ["utils"], **{place: [place, "utils"] for place in ("data", "models", "envs")}}
        if room and room[0] in allowed:
            rooms = {other.split(".")[1] for other in found}
            assert rooms <= {*allowed[room[0]]}, name


def test_the_page_on_architecture_names_every_module() -> None:
    page = (ALGOS.parents[1] / "docs/architecture.md").read_text()
    in_folders = ("torch", "simulators")  # which stand there as a whole
    paths = [path for path in ALGOS.parent.rglob("*.py") if path.name != "__init__.py"]
    named = set(re.findall(r"[a-z_]+\.py", page))
    missing = {path.name for path in paths if path.name not in named and path.parent.name not in in_folders}
    assert not missing


def test_order_counts_and_no_line_counts_twice() -> None:
    assert common(list("abcd"), list("badc")) in (["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"])
    assert common(["x", "x", "y"], ["x", "y", "y"]) == ["x", "y"]
    assert common(["x"], ["x "]) == []


EXAMPLE = '''"""Doc."""

import torch

RATE = 1


def update(x):
    """Doc.

    # no comment
    """
    # none
    return x + 1  # one


def main():
    a = "#1"  # one
    for i in range(3):
        if i:
            a = update(a)
        elif a:
            a = 0

        # 4. Log
        print(a)
    return a
'''


def test_counts() -> None:
    assert body(EXAMPLE, "update") == ["return x + 1"]
    assert body(EXAMPLE, "main")[:3] == ['a = "#1"', "for i in range(3):", "if i:"]
    assert depth(functions(ast.parse(EXAMPLE))["main"]) == 2
    told = [line for number, line in code(EXAMPLE).items() if number not in set_up(EXAMPLE)]
    assert told == [
        "def update(x):",
        "return x + 1",
        "for i in range(3):",
        "if i:",
        "a = update(a)",
        "elif a:",
        "a = 0",
    ]


if __name__ == "__main__":
    columns = ("main", "modules", "names", "algorithm", "longest", "nesting", "mirror", "twins")
    print(" " * 16, *(f"{column:>10s}" for column in columns))
    print(f"{'limit':16s}", *(f"{MOST[c]:10d}" if c in MOST else f"{LEAST[c]:10.0%}" for c in columns))
    for script in SCRIPTS:
        row = vars(figures(script))
        cells = []
        for column in columns:
            value = row[column]
            meant = script in COUPLED or column in ("longest", "nesting", "mirror", "twins")
            beyond = value is not None and (value > MOST[column] if column in MOST else value < LEAST[column])
            text = "" if value is None else f"{value:.0%}" if column in LEAST else str(value)
            cells.append(f"{text + '!' * (beyond and meant):>10s}")
        print(f"{script:16s}", *cells, f"  {row['longest_name']}()")
        if script in TWINS and "--diff" in sys.argv:
            whole, player, trainer = mirrored(script)
            print(*(f"    - {line}" for line in without(without(whole, player), trainer)), sep="\n")
