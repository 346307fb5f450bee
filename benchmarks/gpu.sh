#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of less than nine minutes: build from source, GPU tests, compute-sanitizer,
# benchmarks. Goes on past a part that fails, prints a table last, and exits with 1 if any part failed.
# Usage: benchmarks/gpu.sh [FOLDER]     logs and results.json go to FOLDER, runs/gpu by default.
# Needs nvcc, g++ and Python with torch, triton, numpy, pybind11, setuptools, ninja, pytest, pytest-benchmark, hypothesis; no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/gpu}")
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
deadline=520 reserve=115 # seconds in all, and of them for the benchmarks

# part NAME SECONDS COMMAND...: its output goes to a log, of which the end is shown if it fails.
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0 left=$((deadline - reserve - SECONDS))
    shift 2
    ((limit > left)) && limit=$((left > 1 ? left : 1))
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    if ((status == 0)); then
        printf '%-12s ok, %d s: %s\n' "$name" $((SECONDS - begin)) "$(tail -n 1 "$out/$name.log")"
    else
        failed+=("$name")
        printf '%-12s FAILED (%d) after %d s\n' "$name" "$status" $((SECONDS - begin))
        grep -E "^(FAILED|ERROR)|Error|error:|========= (Invalid|Race|Error)" "$out/$name.log" | sort | uniq -c | sort -rn | head -30
        tail -n 25 "$out/$name.log"
    fi
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>"$out/device.log") || {
    echo "benchmarks/gpu.sh: no usable CUDA device: $(tail -n 1 "$out/device.log")"
    exit 2
}
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu --format=csv,noheader

part build 120 env MMFAST_CUDA=1 MMFAST_NATIVE=1 MMFAST_CUDA_ARCHS="$capability" "$python" setup.py build_ext --inplace
part info 30 "$python" -m mmfast info
tests=("$python" -m pytest -p no:cacheprovider -q --tb=short)
part gpu 120 "${tests[@]}" python_tests/test_{gpu,backends,augment}.py
part loss 120 "${tests[@]}" python_tests/test_{barlow_twins,products}.py
part triton 90 "${tests[@]}" python_tests/test_triton_{augment,barlow_twins}.py
cases='(loss_and_gradients and float32 and (33 or 600) or views_are and float32) and cuda-cuda'
check=(compute-sanitizer --error-exitcode 9 --print-limit 20)
part memcheck 60 "${check[@]}" --tool memcheck "${tests[@]}" python_tests/test_gpu.py -k "$cases"
part racecheck 60 "${check[@]}" --tool racecheck "${tests[@]}" python_tests/test_gpu.py -k "$cases"
reserve=0
part benchmarks 150 "$python" benchmarks/gpu.py --out "$out/results.json" --seconds $((deadline - SECONDS - 25))
cat "$out/benchmarks.log"
((${#failed[@]} == 0)) || echo "failed: ${failed[*]}"
exit $((${#failed[@]} > 0))
