#!/usr/bin/env bash
# The tests as other processors would run them, one variant after another, each with a log of its own.
#   PYTHON=.venv/bin/python tests/portable.sh [VARIANT…]      all variants, or those named; PYTEST_ARGS is handed on
#   LOGS=DIR                                                   where the logs go (runs/portable)
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A variants=(
    [native]="OMP_NUM_THREADS=1"
    [native-2-threads]="OMP_NUM_THREADS=2"
    [avx2]="OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    [avx2-2-threads]="OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    [default]="OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2"
    [seed-1]="OMP_NUM_THREADS=1 SEED=1"
    [seed-2]="OMP_NUM_THREADS=1 SEED=2"
)
order=(native native-2-threads avx2 avx2-2-threads default seed-1 seed-2)
[ $# -gt 0 ] && order=("$@")

logs=${LOGS:-runs/portable}
mkdir -p "$logs"
failed=()
for variant in "${order[@]}"; do
    if [ -z "${variants[$variant]+known}" ]; then
        echo "unknown variant '$variant'; use ${!variants[*]}" >&2
        exit 2
    fi
    seed=$(sed -n 's/.*SEED=\([0-9]*\).*/--hypothesis-seed=\1/p' <<<"${variants[$variant]}")
    # torch.compile's cache does not tell variants apart: kernels of one, read by another, give wrong sums.
    # shellcheck disable=SC2086
    if env TORCHINDUCTOR_CACHE_DIR="$PWD/$logs/inductor-$variant" ${variants[$variant]} "${PYTHON:-python3}" -m pytest -n 2 --dist loadfile --no-loadscope-reorder $seed ${PYTEST_ARGS:-} >"$logs/$variant.log" 2>&1; then
        echo "$variant: $(tail -1 "$logs/$variant.log")"
    else
        failed+=("$variant")
        echo "$variant: FAILED, see $logs/$variant.log"
        grep '^\(FAILED\|ERROR\)' "$logs/$variant.log"
    fi
done
[ ${#failed[@]} -eq 0 ]
