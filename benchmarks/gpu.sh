#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of less than ten minutes: build from source, GPU tests, benchmarks, compute-sanitizer,
# Triton's tests. Goes on past a part that fails, prints a line for each and the table of the benchmarks last, and exits with 1 if any
# part failed.
# What failed is shown at the end, where a cut log still has it.
# Usage: benchmarks/gpu.sh [FOLDER [PART...]]
#     logs and results.json go to FOLDER, runs/gpu by default. Without PARTs all are run, in this order:
#     build info gpu loss benchmarks memcheck racecheck synccheck initcheck triton similarity
# Needs nvcc, g++ and Python with torch, triton, numpy, pybind11, setuptools, ninja, pytest, pytest-benchmark, hypothesis; no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/gpu}")
shift
wanted=" $* "
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
deadline=570 # seconds in all

asked() { [[ $wanted == *" $1 "* || -z ${wanted// /} ]]; }

# part NAME SECONDS COMMAND...: its output goes to a log, of which the end is shown if it fails.
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0 left=$((deadline - SECONDS))
    shift 2
    asked "$name" || return
    if ((left < 10)); then
        printf '%-12s skipped: the time is over; benchmarks/gpu.sh %s %s runs it alone\n' "$name" "$out" "$name"
        return
    fi
    ((limit > left)) && limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    if ((status == 0)); then
        printf '%-12s ok, %d s: %s\n' "$name" $((SECONDS - begin)) "$(tail -n 1 "$out/$name.log")"
    else
        failed+=("$name")
        printf '%-12s FAILED (%d) after %d s\n' "$name" "$status" $((SECONDS - begin))
    fi
}

# What the log of a part says of its failure.
explain() {
    printf '\n--- %s\n' "$1"
    grep -E "^(FAILED|ERROR)|Error|error:|========= (Invalid|Race|Error|Barrier|Uninit)|^  File .*python_tests" "$out/$1.log" |
        sort | uniq -c | sort -rn | head -20
    tail -n 15 "$out/$1.log"
}

# sanitizer NAME COMMAND...: a part with a tool of compute-sanitizer.
sanitizer() {
    if command -v compute-sanitizer >/dev/null; then
        part "$1" 60 "${@:2}"
    elif asked "$1"; then
        printf '%-12s skipped: compute-sanitizer is not on PATH; it comes with the CUDA toolkit\n' "$1"
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
# Also the cases that take turns elsewhere; in eight processes where pytest-xdist is there.
# A test that takes a minute says where it is.
every=(env MMFAST_ROTATION=all OMP_NUM_THREADS=2 "${tests[@]}" -W ignore -o faulthandler_timeout=60)
"$python" -c 'import xdist' 2>/dev/null && every+=(-n 8)
part gpu 150 "${every[@]}" python_tests/{test_gpu,test_gpu_similarity,test_backends,ops/test_augment}.py
part loss 90 "${every[@]}" python_tests/ops/test_{barlow_twins,products}.py
part benchmarks 160 "$python" -W ignore benchmarks/gpu.py --out "$out/results.json" --seconds 130

cases='(loss_and_gradients and float32 and (33 or 600) or views_are and float32) and cuda-cuda'
watched=("${tests[@]}" python_tests/test_gpu.py -k "$cases")
# PyTorch's allocator cuts large blocks into tensors, and what runs from one into the next would look in order.
alone=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
check=(compute-sanitizer --error-exitcode 9 --print-limit 20)
ours=(--kernel-regex kns=mmfast)
sanitizer memcheck "${alone[@]}" "${check[@]}" --tool memcheck "${ours[@]}" "${watched[@]}"
sanitizer racecheck "${check[@]}" --tool racecheck "${ours[@]}" "${watched[@]}"
sanitizer synccheck "${check[@]}" --tool synccheck "${ours[@]}" "${watched[@]}"
# What PyTorch's kernels write counts as written only where they are watched, too; but only reads of ours are judged.
sanitizer initcheck "${alone[@]}" bash -c '"$@" | tee "$0"; ! grep -A 2 Uninitialized "$0" | grep mmfast' \
    "$out/initcheck.all" compute-sanitizer --print-limit 1000 --tool initcheck "${watched[@]}"
# Last, for it is the longest: more than a hundred kernels are compiled.
part triton 240 "${every[@]}" python_tests/triton/test_{augment,barlow_twins}.py
part similarity 240 "${every[@]}" python_tests/triton/test_similarity.py

[[ -e $out/benchmarks.log ]] && asked benchmarks && cat "$out/benchmarks.log"
for name in "${failed[@]}"; do explain "$name"; done
((${#failed[@]} == 0)) || echo "failed: ${failed[*]}"
exit $((${#failed[@]} > 0))
