#!/usr/bin/env bash
# Build, test and measure on a GPU: benchmarks/gpu.sh [folder of results, default out/gpu]
#
# Wants: nvcc, and a python3 that has a CUDA build of torch, triton, transformers, pytest, pytest-benchmark, pytest-timeout, pybind11, ninja. No network.
# Leaves in the folder: steps.csv (exit code and seconds of each step), log.txt (what each printed), gpu.csv (rows), tables.md.
# Every step has a time limit, and all together $LIMIT seconds (default 535). A step that fails keeps none from following; the exit
# status is 1 if any did. The most telling come first. A rerun adds rows. To keep them: copy gpu.csv to benchmarks/data/.
# Outside a checkout, RECONTROL_COMMIT names the commit in the rows.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-out/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-535}
venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
log=$out/log.txt
steps=$out/steps.csv
rows=$out/gpu.csv
failed=()
: >"$log"
echo "step,exit_code,seconds" >"$steps"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET
# ninja may be there for python3 alone.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
export PATH

# step NAME LIMIT COMMAND...: interrupted at its limit, so that Python can say where it was, and killed ten seconds later.
step() {
  local name=$1 limit=$2 start=$SECONDS code=124
  shift 2
  local left=$((LIMIT - SECONDS))
  ((limit > left)) && limit=$left
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  if ((limit >= 5)); then
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/step.txt" 2>&1
    code=$?
    cat "$out/step.txt" >>"$log"
    tail -n 6 "$out/step.txt" | cut -c -300
  else
    echo "not begun: $LIMIT seconds are over" | tee -a "$log"
  fi
  rm -f "$out/step.txt"
  ((code == 0)) || failed+=("$name")
  echo "$name,$code,$((SECONDS - start))" >>"$steps"
  printf -- '----- %s: exit code %s, %s s\n\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$log"
}

# A virtual environment on top of python3's packages, also where python3 is in one itself: its own site-packages are added by name.
build() {
  "$PYTHON" -m venv --without-pip "$venv" || return
  "$PYTHON" -c 'import sys; print("import site;", *(f"site.addsitedir({p!r});" for p in sys.path if p.endswith(("site-packages", "dist-packages"))))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth" || return
  # For this GPU alone, which takes a third of the time.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$venv/bin/python" -c 'import torch
if torch.cuda.is_available(): print("{}.{}".format(*torch.cuda.get_device_capability()) + ("a" if torch.cuda.get_device_capability()[0] >= 9 else ""))')}
  export TORCH_CUDA_ARCH_LIST
  echo "for compute capability ${TORCH_CUDA_ARCH_LIST:-of no GPU}"
  "$venv/bin/python" -m pip install --no-build-isolation --no-deps --disable-pip-version-check -e . || return
  "$venv/bin/python" -c 'import json, recontrol; print(json.dumps(recontrol.backend_info(), indent=1))'
}

surroundings() {
  nvidia-smi
  nvcc --version
  "$PYTHON" -c 'import sys, torch, transformers, triton; print(sys.version, torch.__version__, transformers.__version__, triton.__version__, torch.cuda.is_available())'
}

sanitized() {
  # Without torch's own cache of memory, so that a read beyond a tensor is one beyond an allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-regex "kns=$2" \
    "$python" -m benchmarks.gpu.small_ascents --backend "$3"
}

export -f build surroundings sanitized
export PYTHON venv
python=$venv/bin/python
export python
# By name, because other files of tests may want packages that are not here.
mapfile -t gpu_tests < <(grep -lE 'mark\.gpu\b' tests/test_*.py)

parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 4)

step surroundings 60 bash -c surroundings
step build 180 bash -c build
[[ -x $python ]] || python=$PYTHON
step tests-gpu 150 "$python" -m pytest -m gpu -q -p no:cacheprovider "${parallel[@]}" "${gpu_tests[@]}"
step tests-triton 90 "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests/test_triton_ascend.py tests/test_triton_training.py
step ascend 150 "$python" -m benchmarks.gpu ascend --seconds 130 --rows "$rows"
step decode 90 "$python" -m benchmarks.gpu decode --rows "$rows"
step training 45 "$python" -m benchmarks.gpu training --rows "$rows"
step memcheck 60 bash -c 'sanitized memcheck recontrol cuda'
step racecheck 60 bash -c 'sanitized racecheck recontrol cuda'
step tests-ascend 60 "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests/test_ascend.py tests/test_benchmarks_gpu.py
step compiled 200 "$python" -m benchmarks.gpu compiled --rows "$rows"
if [[ -f $rows ]]; then
  "$python" -m benchmarks.table "$rows" | tee "$out/tables.md"
fi

cat "$steps"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}; see $log"
  exit 1
fi
