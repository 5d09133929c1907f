#!/usr/bin/env bash
# Is a wheel complete, and does it work where there is no compiler? tests/wheel_smoke.sh PYTHON WHEEL
# PYTHON has torch and pip. Its packages are lent to a new environment that gets the wheel and nothing else.
set -euo pipefail
python=$1 wheel=$(realpath "$2") checkout=$(realpath "$(dirname "$0")/..")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Every Python file of the checkout's package, and no other.
if ! diff <(cd "$checkout" && find lil_ops -name '*.py' | sort) \
          <("$python" -m zipfile --list "$wheel" | grep -oE '^lil_ops/\S+\.py\b' | sort); then
  echo "$wheel: what it holds (>) is not what the checkout has (<)" >&2
  exit 1
fi

"$python" -m venv --without-pip "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A path that a .pth file adds is searched last, and .pth files inside it (an editable lil_ops) are not read.
"$python" -c 'import site; print("\n".join(site.getsitepackages()))' > "$site/lent.pth"
"$python" -m pip --python "$scratch/venv/bin/python" install --quiet --no-deps --no-index "$wheel"

cd "$scratch"
env -i PATH="$scratch/venv/bin" HOME="$scratch" python - "$site" <<'EOF'
import shutil
import sys
from pathlib import Path

import torch

import lil_ops

assert not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja")))
package = Path(lil_ops.__file__).parent
assert package.is_relative_to(sys.argv[1]), package
built_with_cuda = lil_ops.build_info()["cuda_version"] is not None
assert (package / "liblil_cuda.so").exists() == built_with_cuda
scores, seq_lens = torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]), torch.tensor([32], dtype=torch.int32)
pages, counts = lil_ops.select_pages(scores, seq_lens, page_size=8, budget=24)
assert pages.tolist() == [[[0, 2, 3]]] and counts.tolist() == [[3]]
print(lil_ops.build_info())
EOF
