"""One timed run of SBX's SAC, which is DroQ with other arguments, as peer_sb3.py; JAX has its own number of threads."""

import json
import sys

from peer_sb3 import run_off_policy
from sbx import SAC

if __name__ == "__main__":
    run_off_policy(SAC, json.loads(sys.argv[1]))
