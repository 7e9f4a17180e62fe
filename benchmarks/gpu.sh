#!/usr/bin/env bash
# All that needs a GPU, in one call of at most eight minutes: the tests on CUDA, and our speed beside the sketches.
#
#     bash benchmarks/gpu.sh          prints a table, and writes gpu-tests.txt, speed.csv and speed.md into $OUT
#     bash benchmarks/gpu.sh --dry    the same commands on the CPU, as far as they go: tests skip, runs are short
#
# It takes the PyTorch that python3 (or $PYTHON) has, and puts what is missing beside it, into .venv-gpu. Where nothing
# can be fetched, have the wheels of these packages in .wheels (or $WHEELS):
#
#     pip download --dest .wheels --only-binary :all: --python-version 3.12 gymnasium pygame-ce mujoco tyro ...
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results} wheels=${WHEELS:-.wheels} python=.venv-gpu/bin/python
dry=$([ "${1:-}" = --dry ] && echo yes || true)
deadline=$((SECONDS + 470))

# What is left of the eight minutes, at most $1 seconds of it
within() { local left=$((deadline - SECONDS)) && echo $((left < 1 ? 1 : left < $1 ? left : $1)); }

if [ ! -x $python ]; then
    "${PYTHON:-python3}" -m venv .venv-gpu
    # What python3 has is there already, also where it belongs to a virtual environment itself
    "${PYTHON:-python3}" -c 'import site, sysconfig; print(sysconfig.get_path("purelib"), *site.getsitepackages(), sep="\n")' \
        >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
fi
$python - <<'END' >.venv-gpu/packages.txt
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + project["optional-dependencies"]["mujoco"] + ["pytest", "pytest-xdist"]
print(*(package for package in needed if not package.startswith(("torch", "moviepy"))), sep="\n")
END
source=$([ -d "$wheels" ] && echo "--no-index --find-links $wheels" || true)
# shellcheck disable=SC2086
timeout "$(within 150)" $python -m pip install --quiet $source --requirement .venv-gpu/packages.txt
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
$python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
mkdir -p "$out"

echo "--- tests: $((deadline - SECONDS)) s are left"
timeout --signal INT --kill-after 10 "$(within 180)" $python -m pytest -q -n 6 --durations 5 tests/test_cuda.py 2>&1 |
    tail -n 40 | tee "$out/gpu-tests.txt" || echo "the tests failed, or took more than 180 s"

# Each by itself, the ones that were asked for first: what is over when time is has been printed and written
for name in "sac" "ppo" "droq" "recurrent ppo" "sac, compiled" "ppo, compiled" "droq, compiled" "recurrent ppo, compiled"; do
    echo "--- $name: $((deadline - SECONDS)) s are left"
    flags=(--gpu-task "$name" --repetitions 1 --out "$out")
    [ -z "$dry" ] || flags+=(--no-sketches --total-timesteps 4096 "--ours-args=--accelerator cpu --learning-starts 3000")
    [ -z "$dry" ] || [[ $name != *ppo* ]] || flags=("${flags[@]/ --learning-starts 3000/}")
    timeout "$(within 120)" $python benchmarks/speed.py "${flags[@]}" || echo "$name: failed, missed its bar, or was out of time"
done
echo "--- environments of tensors: $((deadline - SECONDS)) s are left"
flags=(--tensors-gpu --repetitions 1 --out "$out")
[ -z "$dry" ] || flags=(--tensors --repetitions 1 --out "$out" --total-timesteps 16384)
timeout "$(within 120)" $python benchmarks/backends.py "${flags[@]}" || echo "tensors: failed, missed its bar, or was out of time"
echo "--- all in $SECONDS s"
grep -h '^| gpu-' "$out/speed.md" || true
