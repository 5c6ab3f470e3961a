#!/usr/bin/env bash
# All that only a GPU can show, in under 9 minutes: tests, errors of memory, step times. Results go to the folder named,
# or to benchmarks/results.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# Needs, beside this package, torch for the GPU with Triton; and pytest, hypothesis, numpy, rich and matplotlib.

set -o pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-benchmarks/results}
mkdir -p "$out"
failed=0
test=(python -m pytest -m gpu -q --no-header --color no)

timeout 150 "${test[@]}" -rfE tests/gpu tests/test_capture.py 2>&1 | tee "$out/gpu-tests.log" || failed=1

if sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer); then
    timeout 90 "$sanitizer" --error-exitcode 1 --target-processes all "${test[@]}" tests/gpu -k "several_steps and float32" \
        2>&1 | tee "$out/gpu-sanitizer.log" || failed=1
else
    echo "no compute-sanitizer here: it comes with the CUDA toolkit" | tee "$out/gpu-sanitizer.log"
fi

timeout 290 python -m benchmarks.step_time --device cuda --rounds 7 --out "$out" || failed=1
exit $failed
