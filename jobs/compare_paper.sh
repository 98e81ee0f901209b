#!/usr/bin/env bash
# The paper's baseline on 16 ranks and its proposal on 64, here: [VARIABLE=value ...] bash jobs/compare_paper.sh [hpcmoe options]
#
# The same batch of the shipped model through both layouts, one run after the other, then the two reports side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. jobs/common.sh

OUT=${OUT:-hpcmoe-out/paper}       # folder of the two reports
SEQUENCES=${SEQUENCES:-1024}       # of the batch; the paper's has 1024
WEIGHTS=${WEIGHTS:-inputs/demo/model.h5}

hm_setup text,cpu
options=(--set weights.file="$WEIGHTS" --set throughput.sequences="$SEQUENCES" --quiet)
for run in "baseline 16" "proposal 64"; do
  read -r name ranks <<<"$run"
  hm_say "$name: $ranks ranks"
  OMP_NUM_THREADS=1 hm_checked "$OUT/$name" hm_run "$ranks" "$HM_PYTHON" -m hpcmoe run "inputs/paper_$name.toml" "${options[@]}" \
    --set output.dir="$OUT/$name" "$@"
done
"$HM_PYTHON" -m hpcmoe report "$OUT/baseline/report.json" "$OUT/proposal/report.json"
cat <<TEXT

$(hm_cores) core(s) were shared by 16 ranks and then by 64. What such a run can show: both layouts give the same work to
the program as a cluster would, so rows, bytes, messages and memory per rank are those of the layouts. What it cannot show:
speed. Tokens/s, times and parallel efficiency above are of ranks that wait for a core, and say nothing about GPUs.
TEXT
