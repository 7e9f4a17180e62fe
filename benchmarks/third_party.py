r"""Builds environments of other packages, and trains a little on each: the table in docs/environments.md.

    pip install -e '.[box2d,mujoco]' 'mujoco<3.12' minigrid highway-env gymnasium-robotics 'shimmy[dm-control]' \
                panda-gym
    python benchmarks/third_party.py
    python benchmarks/third_party.py --only minigrid

A package that is not installed is a row that says so. The exit code is 1 if a run has failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
ON_POLICY = ["--num-envs", "2", "--num-steps", "128", "--total-timesteps", "512"]
OFF_POLICY = ["--learning-starts", "256", "--total-timesteps", "300"]
SCRIPTS = {
    "ppo": ("ppo/ppo.py", ON_POLICY),
    "ppo_recurrent": ("ppo_recurrent/ppo_recurrent.py", ON_POLICY),
    "sac": ("sac/sac.py", OFF_POLICY),
    "droq": ("droq/droq.py", OFF_POLICY),
}
# Package, environment, script, further arguments
RUNS = [
    ("minigrid", "minigrid:MiniGrid-Empty-8x8-v0", "ppo", []),
    ("minigrid", "minigrid:MiniGrid-DoorKey-5x5-v0", "ppo_recurrent", ["--obs-keys", "image"]),
    ("highway-env", "highway_env:highway-v0", "ppo", []),
    ("highway-env", "highway_env:parking-v0", "sac", []),
    ("gymnasium-robotics", "gymnasium_robotics:FetchReach-v4", "sac", []),
    ("gymnasium-robotics", "gymnasium_robotics:PointMaze_UMaze-v3", "ppo", ["--vectorization", "async"]),
    ("shimmy", "shimmy:dm_control/cartpole-balance-v0", "ppo", []),
    ("shimmy", "shimmy:dm_control/walker-walk-v0", "droq", []),
    ("panda-gym", "panda_gym:PandaReach-v3", "sac", []),
    ("panda-gym", "panda_gym:PandaPush-v3", "ppo", ["--vectorization", "async"]),
    ("box2d", "CarRacing-v3", "ppo", ["--grayscale", "--resize", "64", "--frame-stack", "4"]),
    ("box2d", "CarRacing-v3", "ppo_recurrent", ["--env-kwargs", '{"continuous": false}']),
]


def version(package: str) -> str | None:
    """That of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def train(env_id: str, script: str, more: list[str], minutes: float) -> tuple[bool, str]:
    """Trains for some hundred steps: whether that went well, and steps per second, or what was said."""
    file, flags = SCRIPTS[script]
    command = [sys.executable, str(ROOT / "fabricrl/algos" / file), "--env-id", env_id, *flags, *more]
    with tempfile.TemporaryDirectory() as logs:
        try:
            done = subprocess.run(
                [*command, "--log-dir", logs, "--num-threads", "1"],
                cwd=logs,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=60 * minutes,
            )
        except subprocess.TimeoutExpired:
            return False, f"still running after {minutes:g} minutes"
    result = re.search(r"^result steps=(\d+) sps=(\d+)", done.stdout, re.MULTILINE)
    if done.returncode == 0 and result:
        return True, result[2]
    errors = re.findall(r"^error: (.*)", done.stderr, re.MULTILINE) or done.stderr.splitlines()[-1:]
    return False, f"exit code {done.returncode}: {' '.join(errors)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="the package to try")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of a run (default: %(default)s)")
    args = parser.parse_args()
    failures = 0
    print("| package | `--env-id` | script, arguments | steps per second |")
    print("|-|-|-|-|")
    for package, env_id, script, more in RUNS:
        if args.only not in (None, package):
            continue
        name = "gymnasium" if package == "box2d" else package
        found = version(name)
        good, said = (True, "not installed") if found is None else train(env_id, script, more, args.minutes)
        failures += not good
        words = " ".join(f"'{word}'" if word.startswith("{") else word for word in more)
        print(f"| {name} {found or ''} | `{env_id}` | {script}{f' `{words}`' if words else ''} | {said} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
