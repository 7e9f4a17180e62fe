"""A script that signals itself in the iteration that STOPPED_IN names: `tests.stopped script arguments`."""

import importlib
import os
import sys

from tests.process import stopped_in


def main() -> int:
    script = importlib.import_module(sys.argv.pop(1))
    if (iterations := int(os.environ.get("STOPPED_IN", "0"))) == 0:
        return script.main()
    with stopped_in(iterations):
        return script.main()
