"""Checks of texts that are printed, or read from a command line or a file."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def is_one_line(text: str | Path) -> bool:
    """Tells if a text can be printed in one line: no control characters, no bytes that are no characters."""
    return re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", str(text)) is None


def is_json_object(text: str) -> bool:
    """Tells if a text is a JSON object of harmless size and depth, without duplicate names."""
    try:
        value = json.loads(text, object_pairs_hook=_named_once) if len(text) <= 100_000 else None
    except (ValueError, RecursionError):
        return False
    level, depth = [value], 0
    while level := [part for whole in level for part in _parts(whole)]:
        depth += 1
    return isinstance(value, dict) and depth <= 50


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
