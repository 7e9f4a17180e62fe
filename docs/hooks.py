"""A hook of MkDocs: plots stay in benchmarks/results, and the site has a copy of them under results/."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PLOT = re.compile(r"\((?:\.\./)+benchmarks/results/([\w.-]+\.png)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the plots to the files of the site."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points the pages' links to the copies."""
    folder = posixpath.dirname(page.file.src_uri)
    return PLOT.sub(lambda match: f"({posixpath.relpath(f'results/{match[1]}', folder or '.')})", markdown)
