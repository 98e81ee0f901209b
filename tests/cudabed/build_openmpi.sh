#!/usr/bin/env bash
# Builds a CUDA-aware Open MPI for the tests: bash tests/cudabed/build_openmpi.sh FOLDER TARBALL
#
# TARBALL is a release of Open MPI 5. FOLDER becomes a tree with env.sh: export HPCMOE_TEST_CUDA_OPENMPI=FOLDER.
# Needs a C and C++ compiler, make, perl, and cuda.h under $CUDA_HOME [/usr/local/cuda]; no GPU, no driver.
# Takes 10 to 40 minutes on two cores (JOBS=2).
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd) tarball=$(realpath "$2")
: "${CUDA_HOME:=/usr/local/cuda}" "${JOBS:=2}"
for tool in make perl cc c++; do command -v "$tool" > /dev/null || { echo "missing: $tool" >&2; exit 1; }; done
[ -f "$CUDA_HOME/include/cuda.h" ] || { echo "no cuda.h in $CUDA_HOME/include: set CUDA_HOME" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir source build driver
tar -xf "$tarball" -C source --strip-components=1

# The linker wants a libcuda with every name; at run time the driver's own is loaded, or none where there is none.
echo '#include <cuda.h>' | cc -E -P -I"$CUDA_HOME/include" - | grep -oE '^ *CUresult +cu[A-Z][A-Za-z0-9_]*' |
  awk '{print $2; sub(/_v[0-9]+$/, "", $2); print $2}' | sort -u |
  awk '{print "int " $1 "(void) { return 999; }"}' > driver/cuda.c
cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o driver/libcuda.so driver/cuda.c
ln -s libcuda.so driver/libcuda.so.1

# quietly NAME COMMAND...: its output only if it fails
quietly() { "${@:2}" > "$work/$1.log" 2>&1 || { tail -n 40 "$work/$1.log" >&2; exit 1; }; }
cd build
export LD_LIBRARY_PATH="$work/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" # configure starts programs that it linked
# The parts that need the driver are modules of their own, so that the rest runs without. From --disable-cuda
# on it is about the hwloc inside, which must not come to need libraries of the toolkit.
quietly configure ../source/configure --prefix="$prefix" --with-cuda="$CUDA_HOME" --with-cuda-libdir="$work/driver" \
  --enable-mca-dso=accelerator-cuda,btl-smcuda,rcache-gpusm,rcache-rgpusm,coll-cuda \
  --with-libevent=internal --with-hwloc=internal --with-pmix=internal --with-prrte=internal \
  --without-ucx --without-ofi --without-libnl --disable-io-romio --enable-mpi-fortran=no --disable-oshmem --disable-sphinx \
  --disable-cuda --disable-nvml --disable-opencl --disable-libxml2 --disable-pci --disable-gl
grep -q '^CUDA support: yes' "$work/configure.log" || { echo "configure left CUDA out" >&2; exit 1; }
quietly make make -j "$JOBS"
quietly install make install
echo 'mca_base_component_show_load_errors = 0' >> "$prefix/etc/openmpi-mca-params.conf"
cat > "$prefix/env.sh" << 'ENV'
# Source this file to use the Open MPI that it lies in.
OPAL_PREFIX=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export OPAL_PREFIX PMIX_PREFIX=$OPAL_PREFIX PRTE_PREFIX=$OPAL_PREFIX
export PATH="$OPAL_PREFIX/bin:$PATH" LD_LIBRARY_PATH="$OPAL_PREFIX/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# mpi4py's wheels: load this library and no other.
export MPI4PY_LIBMPI="$OPAL_PREFIX/lib/libmpi.so.40"
ENV
echo "built: export HPCMOE_TEST_CUDA_OPENMPI=$prefix"
