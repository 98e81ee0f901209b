#!/usr/bin/env bash
# Makes the Python environment of this checkout, and says where: bash jobs/setup.sh
# For machines whose compute nodes have no network: run it once on the login node.
# Settings: see jobs/common.sh (HPCMOE_MPI, HPCMOE_VENV, HPCMOE_PYTHON).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. jobs/common.sh

hm_setup text,cpu
echo "$HM_VENV ($(hm_vendor)); activate it with: . $HM_VENV/bin/activate"
