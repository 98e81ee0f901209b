#!/usr/bin/env bash
# Makes the Python environment of this checkout, and says where: bash jobs/setup.sh [EXTRA]
# EXTRA: cuda12 or cuda13 for GPUs (docs/gpu.md), plot for pictures.
# For machines whose compute nodes have no network: run it once on the login node.
# Settings: see jobs/common.sh (HPCMOE_MPI, HPCMOE_VENV, HPCMOE_PYTHON).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. jobs/common.sh

case ${1:-} in '' | cuda12 | cuda13 | plot) ;; *) hm_die "usage: bash jobs/setup.sh [cuda12 | cuda13 | plot], not '$1'" ;; esac
hm_setup "text,cpu${1:+,$1}"
echo "$HM_VENV ($(hm_vendor)); activate it with: . $HM_VENV/bin/activate"
