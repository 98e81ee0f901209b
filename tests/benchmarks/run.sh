#!/usr/bin/env bash
# Measures the speed of this checkout, side by side with Hugging Face transformers: bash tests/benchmarks/run.sh [options]
#
# Sets up .venv-benchmark (torch and transformers among it, some 1.5 GB) and takes about 15 minutes on two cores, which
# should have nothing else to do. Options: --help. Needs 12 GB of memory and 3 GB of disk. See docs/speed.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. jobs/common.sh

unset HPCMOE_FAIL HPCMOE_DEBUG HPCMOE_RANKS_PER_NODE
hm_make "${HPCMOE_VENV:-$PWD/.venv-benchmark}" "${HPCMOE_MPI:-mpich}" text,cpu,train
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$HM_PYTHON" tests/benchmarks/benchmark.py "$@"
