#!/usr/bin/env bash
# A job on one machine, or on the nodes that mpiexec knows of: [VARIABLE=value ...] bash jobs/mpirun.sh [hpcmoe options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. jobs/common.sh

JOB=${JOB:-inputs/demo.toml}   # what to run
OUT=${OUT:-hpcmoe-out/mpirun}  # folder for outputs and report.json
RANKS=${RANKS:-16}             # dp x pp x ep
LAYOUT=${LAYOUT:-}             # such as "pp=1 ep=16"; empty: chosen for RANKS

hm_setup text,cpu
hm_threads "$RANKS"
options=(--set output.dir="$OUT")
for part in $LAYOUT; do options+=(--set "layout.$part"); done

hm_checked "$OUT" hm_run "$RANKS" "$HM_PYTHON" -m hpcmoe run "$JOB" "${options[@]}" "$@"
