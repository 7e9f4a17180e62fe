#!/usr/bin/env bash
# All that needs a GPU, in one call of at most eight minutes: the tests on CUDA, and our speed beside the sketches.
#
#     bash benchmarks/gpu.sh                 prints a table, and writes it to $OUT (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python3 -m venv .venv-gpu
.venv-gpu/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
.venv-gpu/bin/python -m pip install --quiet --editable '.[mujoco]' --group dev
.venv-gpu/bin/python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
timeout 150 .venv-gpu/bin/python -m pytest -q -n 6 tests/test_cuda.py 2>&1 | tail -n 15 | tee "$out/gpu-tests.txt" || true
timeout 300 .venv-gpu/bin/python benchmarks/speed.py --gpu --repetitions 1 --out "$out" || true
