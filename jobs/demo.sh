#!/usr/bin/env bash
# Sets up this checkout and runs the shipped model: bash jobs/demo.sh [RANKS]
#
# RANKS: 16 unless given, which is one expert of each layer per rank; any number from 1 to 64 works.
# Needs Python >= 3.10 with venv and pip, and a package index; no MPI, no compiler, no GPU.
# Settings: see jobs/common.sh (HPCMOE_MPI, HPCMOE_VENV, HPCMOE_PYTHON), and
#   OUT    folder for the generated text and the report (hpcmoe-out/demo)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. jobs/common.sh

RANKS=${1:-16}
OUT=${OUT:-hpcmoe-out/demo}
case $RANKS in '' | *[!0-9]* | 0*) hm_die "usage: bash jobs/demo.sh [RANKS], not RANKS = '$RANKS'" ;; esac

hm_setup text,cpu
hm_threads "$RANKS"
hm_checked "$OUT" hm_run "$RANKS" "$HM_PYTHON" -m hpcmoe run inputs/demo.toml --set output.dir="$OUT" --set output.show_text=true
