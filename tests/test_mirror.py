"""Twins mirror: at least three quarters of a coupled script's `main()` stand, in order, in its twin's `player()`.

    python tests/test_mirror.py          the share of each pair
    python tests/test_mirror.py --diff   and the lines of main() that player() lacks

Counted are the lines of code of `main()`: without indentation, comments, docstring and blank lines. A line stands in
`player()` if it belongs to the longest common subsequence of both, so that order counts and no line counts twice; the
share is how many of the lines of `main()` do. A line that differs in one word is another line.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ALGOS = Path(__file__).parent.parent / "fabricrl/algos"
TWINS = {"ppo": "ppo/ppo", "sac": "sac/sac"}
SHARE = 0.75


def lines_of(path: Path, function: str) -> list[str]:
    """The lines of code of a function's body, stripped."""
    source = path.read_text()
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    first = node.body[ast.get_docstring(node) is not None]
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.strip() for line in lines[first.lineno - 1 : node.end_lineno] if line.strip()]


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


def mirrored(name: str) -> tuple[list[str], list[str]]:
    """The lines of `main()`, and those of them that stand in `player()`."""
    stem = str(ALGOS / TWINS[name])
    main, player = lines_of(Path(f"{stem}.py"), "main"), lines_of(Path(f"{stem}_decoupled.py"), "player")
    return main, common(main, player)


@pytest.mark.parametrize("name", TWINS)
def test_three_quarters_of_main_stand_in_order_in_player(name: str) -> None:
    main, both = mirrored(name)
    assert len(main) > 60, "main() has been counted wrongly"
    assert len(both) >= SHARE * len(main), f"{len(both)} of {len(main)} lines"


@pytest.mark.parametrize("name", TWINS)
def test_headings_stand_in_the_same_order(name: str) -> None:
    """Sections are found by number: `# 3. Update`, and what is done once, by `# --- Counters`."""
    stem = str(ALGOS / TWINS[name])
    headings = []
    for script, function in (("", "main"), ("_decoupled", "player")):
        source = Path(f"{stem}{script}.py").read_text()
        (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
        lines = [line.strip() for line in source.splitlines()[node.lineno : node.end_lineno]]
        found = [line for line in lines if line.startswith(("# ---", *(f"# {n}. " for n in range(1, 6))))]
        headings.append([line.split(",")[0].replace("Agent and", "Agent") for line in found])
    main, player = headings
    assert len(main) >= 10
    assert [line.split()[:3] for line in main] == [line.split()[:3] for line in player]


def test_order_counts_and_no_line_counts_twice(tmp_path: Path) -> None:
    assert common(list("abcd"), list("badc")) in (["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"])
    assert common(["x", "x", "y"], ["x", "y", "y"]) == ["x", "y"]
    assert common(["x"], ["x "]) == []
    text = 'def main():\n    """Doc.\n\n    # no comment\n    """\n\n    # none\n    a = "#1"  # one\n\n'
    text += "    if a:\n        b()\n"
    (tmp_path / "script.py").write_text(text)
    assert lines_of(tmp_path / "script.py", "main") == ['a = "#1"', "if a:", "b()"]


if __name__ == "__main__":
    for twin in TWINS:
        whole, shared = mirrored(twin)
        print(f"{twin}: {len(shared)} of {len(whole)} lines, {len(shared) / len(whole):.1%}")
        if "--diff" in sys.argv:
            left = list(shared)
            for line in whole:
                if left and left[0] == line:
                    left.pop(0)
                else:
                    print(f"    - {line}")
