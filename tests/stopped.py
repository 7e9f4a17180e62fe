"""A script that signals itself in the iteration that STOPPED_IN names, by SIGTERM or the signal STOPPED_BY.

Its arguments begin with the script's name: `tests.stopped fabricrl.algos.ppo.ppo --num-envs 4`.
"""

import importlib
import os
import signal
import sys

from tests.process import stopped_in


def main() -> int:
    script = importlib.import_module(sys.argv.pop(1))
    if (iterations := int(os.environ.get("STOPPED_IN", "0"))) == 0:
        return script.main()
    with stopped_in(iterations, int(os.environ.get("STOPPED_BY", signal.SIGTERM))):
        return script.main()
