#!/usr/bin/env bash
# All that needs a GPU; each part is one call of at most eight minutes on a bare machine with one GPU.
#
#     bash benchmarks/gpu.sh                 the tests on CUDA, and the speed of updates beside the sketches of them
#     bash benchmarks/gpu.sh environments    environments of tensors, Pong, and rejax beside ours if it can be installed
#     bash benchmarks/gpu.sh pong            three seeds of Pong, until each plays to 19: called again, they go on
#     bash benchmarks/gpu.sh [PART] --dry    the same commands on the CPU, as far as they go: tests skip, runs are short
#
# Prints a table, and writes it to gpu.md in $OUT (benchmarks/results), beside speed.csv, speed.md and gpu-tests.txt.
# Exit code 1, when all has run: something in the table is red. A dry run writes to a temporary folder.
#
# It takes the PyTorch that python3 (or $PYTHON) has, and puts what is missing beside it, into .venv-gpu. Where nothing
# can be fetched, have the wheels of these packages in .wheels (or $WHEELS):
#
#     pip download --dest .wheels --only-binary :all: --python-version 3.12 gymnasium mujoco ale-py tyro ...
set -euo pipefail
cd "$(dirname "$0")/.."
part=updates dry=
for word in "$@"; do
    case $word in
        environments | pong) part=$word ;;
        --dry) dry=--dry ;;
        *) echo "error: $word is not environments, pong or --dry" >&2 && exit 2 ;;
    esac
done
out=${OUT:-$([ -z "$dry" ] && echo benchmarks/results || mktemp -d)} wheels=${WHEELS:-.wheels}
python=.venv-gpu/bin/python peers=.venv-gpu/peers/bin/python deadline=$((SECONDS + 460))

# What is left of the eight minutes, at most $1 seconds of it
within() { local left=$((deadline - SECONDS)) && echo $((left < 1 ? 1 : left < $1 ? left : $1)); }

# Our packages, and those of the extra $1; PyTorch is there, and nothing here makes videos
packages() {
    $python - "$@" <<'END'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + [name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]]
print(*(package for package in needed if not package.startswith(("torch", "moviepy"))), sep="\n")
END
}

# Installs the packages that standard input lists, for the Python $1
install() {
    local source=()
    [ ! -d "$wheels" ] || source=(--no-index --find-links "$wheels")
    timeout "$(within 150)" "$1" -m pip install --quiet "${source[@]}" --requirement /dev/stdin
}

# A line of the table: red, green or grey; what; a figure; why
add() { echo "| $1 | $2 | $3 | | | | $4 |" >>"$out/gpu.md"; }

# Runs $3… for at most $2 seconds. The table gets the rows that it prints, or says what came of $1
check() {
    local name=$1 limit code=0 started=$SECONDS
    limit=$(within "$2") log=$(mktemp) took=0
    shift 2
    if [ "$limit" -lt 10 ]; then
        add red "$name" "" "no time was left"
        return
    fi
    echo "--- $name: at most $limit s"
    timeout --signal "${stop:-INT}" --kill-after 15 "$limit" "$@" 2>&1 | tee "$log" || code=$?
    took=$((SECONDS - started))
    sed -n 's/^| gpu-.*MISSED/| red &/p; s/^| gpu-/| green &/p' "$log" >>"$out/gpu.md"
    case $code in
        0) grep -q '^| gpu-' "$log" || add green "$name" "$took s" "" ;;
        124 | 137) add red "$name" "$took s" "out of time" ;;
        *) grep -q '^| gpu-.*MISSED' "$log" || add red "$name" "$took s" "failed with exit code $code" ;;
    esac
}

# What was asked for first comes first; what is over when time is, is in the table and in speed.csv
updates() {
    local names=("sac" "ppo" "droq" "recurrent ppo") workers=6
    [ -z "$dry" ] && names+=("${names[@]/%/, compiled}") || workers=0
    check "tests on CUDA" 180 $python -m pytest -q -n $workers --durations 5 tests/test_cuda.py
    tail -n 40 "$log" >"$out/gpu-tests.txt"
    [ "$took" -le 120 ] || add red "tests on CUDA" "$took s" "<= 120 s: MISSED"
    for name in "${names[@]}"; do
        check "$name" 120 $python benchmarks/speed.py --gpu-task "$name" --repetitions 1 --out "$out" $dry
    done
}

environments() {
    local command=($python benchmarks/backends.py --repetitions 1 --out "$out" --peer-python $peers $dry --gpu-task)
    for name in tensors-4096 tensors-16384 solved pong pong-64; do
        check $name 150 "${command[@]}" $name
    done
    if [ -z "$dry" ] && install_rejax; then
        check rejax-cartpole 150 "${command[@]}" rejax-cartpole
        check rejax-pendulum 150 "${command[@]}" rejax-pendulum
    else
        add grey rejax "" "not installed, or not on the GPU"
    fi
}

install_rejax() {
    local cuda list=benchmarks/requirements-peers.txt
    cuda=$($python -c 'import torch; print(torch.version.cuda.split(".")[0])') &&
        $python -m venv .venv-gpu/peers &&
        sed -n "s/^jax>/jax[cuda$cuda]>/; /^jax\|^rejax\|^gymnax/p" $list | install $peers &&
        $peers -c 'import jax, rejax; assert jax.default_backend() == "gpu", jax.default_backend()'
}

# All seeds at the same time; a run that is interrupted writes a checkpoint, with which the next call goes on
pong() {
    local stop=USR1 logs=logs/pong flags=(--accelerator cuda --eval-every 400000 --eval-episodes 4 --stop-at-return 19)
    [ -z "$dry" ] || logs=$out/logs flags=(--num-steps 16 --total-timesteps 256)
    for seed in 1 2 3; do
        {
            check "Pong, seed $seed" 420 $python fabricrl/algos/ppo/ppo.py --preset atari --vectorization native \
                --precision bf16-mixed --num-threads 1 --seed $seed --resume auto --log-dir "$logs" "${flags[@]}"
            [ -n "$dry" ] || grep -q 'eval_return_mean=\(19\|2[01]\)\.\|--stop-at-return is reached' "$log" ||
                add red "Pong, seed $seed" "" "not at 19 yet"
        } &
    done
    wait
    [ -z "$dry" ] || return 0
    for run in "$logs"/ppo/*/*; do # folders end with the seed and the time of the start
        seed=${run%_*} && echo "seed_${seed##*_}=$run"
    done | xargs $python benchmarks/curve.py --title ALE/Pong-v5 --out "$out/pong-gpu" || echo "no curves"
}

if [ ! -x $python ]; then
    "${PYTHON:-python3}" -m venv .venv-gpu
    # What python3 has is there already, also where it belongs to a virtual environment itself
    packages=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    folders='import site, sysconfig; print(sysconfig.get_path("purelib"), *site.getsitepackages(), sep="\n")'
    "${PYTHON:-python3}" -c "$folders" >"$packages/outer.pth"
fi
{ packages && printf '%s\n' pytest pytest-xdist; } | install $python
extra=$([ $part = updates ] && echo mujoco || echo atari)
packages "$extra" | install $python || echo "error: packages of the extra $extra are missing: what needs them will fail"
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
$python - $dry <<'END'
import sys, torch

gpu = torch.cuda.is_available()
print(torch.__version__, torch.cuda.get_device_name() if gpu else "no GPU")
sys.exit(0 if gpu or sys.argv[1:] else "error: there is no GPU; --dry tries what a CPU can do")
END

mkdir -p "$out"
printf '%s\n' '| | benchmark | quantity | A | B | compared | bar |' '|-|-|-|-|-|-|-|' >"$out/gpu.md"
$part
echo "--- all in $SECONDS s"
cat "$out/gpu.md"
! grep -q '^| red' "$out/gpu.md"
