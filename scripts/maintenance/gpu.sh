#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that may have no network.
#
#   PYTHON=python3 bash scripts/maintenance/gpu.sh wheels   with a network: fill .gpu-wheels, under 50 MiB
#   PYTHON=python3 bash scripts/maintenance/gpu.sh          with a GPU: tests/gpu, then bench_gpu.py; under nine minutes
#
# The machine brings an interpreter with torch (built for its GPU), numpy and pip. What it lacks is installed from
# .gpu-wheels into .gpu-packages, which stands before the interpreter's own packages; neither is changed by it.
# The wheels are for Linux on x86-64 and Python 3.12; GPU_PYTHON=3.11 downloads those for another Python.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${GPU_WHEELS:-.gpu-wheels}
PACKAGES=${GPU_PACKAGES:-.gpu-packages}
REQUIREMENTS=scripts/maintenance/gpu_requirements.txt
MOST_KIB=51200
TESTS_SECONDS=300
BENCH_SECONDS=210

stop() {
  echo "make gpu: $1" >&2
  exit 1
}

if [ "${1:-}" = wheels ]; then
  mkdir -p "$WHEELS"
  rm -f "$WHEELS"/*.whl
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --implementation cp --python-version "${GPU_PYTHON:-3.12}" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$WHEELS" --requirement "$REQUIREMENTS" || stop "the wheels could not be downloaded; see above"
  kib=$(du -sk "$WHEELS" | cut -f1)
  echo "$WHEELS: $(ls "$WHEELS" | wc -l) files, $((kib / 1024)) MiB, for Python ${GPU_PYTHON:-3.12}"
  [ "$kib" -le "$MOST_KIB" ] || stop "$WHEELS has $((kib / 1024)) MiB, and may have $((MOST_KIB / 1024))"
  exit 0
fi

"$PYTHON" -c "import numpy, torch" 2>/dev/null ||
  stop "$PYTHON has no torch and numpy. Name the interpreter that has them: make gpu PYTHON=/path/to/python"
if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
  rm -rf "$PACKAGES"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$WHEELS" \
    --target "$PACKAGES" --requirement "$REQUIREMENTS" ||
    stop "$WHEELS does not fit this interpreter ($("$PYTHON" --version)). Download it again: make gpu-wheels GPU_PYTHON=3.x"
else
  echo "make gpu: there is no $WHEELS, so the packages of $PYTHON itself are used"
  PACKAGES=
fi
export PYTHONPATH="src${PACKAGES:+:$PACKAGES}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
"$PYTHON" -c "import engram_hf, pytest" ||
  stop "the package or pytest does not import. Run 'make gpu-wheels' where there is a network, and bring $WHEELS along"
"$PYTHON" - <<'PY'
import platform

import torch
import transformers


cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
print(f"GPUs: {', '.join(cards) or 'none'}", flush=True)
PY

undone=()
started=$SECONDS
timeout "$TESTS_SECONDS" "$PYTHON" -m pytest tests/gpu --durations=5
case $? in
  0) ;;
  124) undone+=("tests/gpu did not end within $TESTS_SECONDS seconds") ;;
  *) undone+=("tests/gpu failed") ;;
esac
echo "tests/gpu took $((SECONDS - started)) s"

started=$SECONDS
if "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  # It plans its rounds itself; the limit is for a run that hangs.
  timeout $((BENCH_SECONDS + 25)) "$PYTHON" scripts/benchmarks/bench_gpu.py --seconds "$BENCH_SECONDS" ||
    undone+=("bench_gpu.py failed, or did not end within $((BENCH_SECONDS + 25)) seconds")
else
  undone+=("nothing that needs a GPU: torch finds none here, so these tests were left out and nothing was measured")
  "$PYTHON" scripts/benchmarks/bench_gpu.py --sizes tiny --rounds 1 --results "$(mktemp -d)" ||
    undone+=("bench_gpu.py --sizes tiny failed, which runs anywhere")
fi
echo "bench_gpu.py took $((SECONDS - started)) s"
[ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ] ||
  echo "make gpu: not proved here: layers on two GPUs, and FSDP2 over two ranks, which need two"
[ ${#undone[@]} -eq 0 ] || {
  printf 'make gpu: not done: %s\n' "${undone[@]}" >&2
  exit 1
}
echo "make gpu: done"
