# make demo | make test : each makes .venv, installs and runs. Everything else is for developers.
#
# A torch with CUDA that PYTHON already has is used as it is; otherwise TORCH is installed into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct/model.gguf
NATIVE := $(shell find csrc CMakeLists.txt setup.py pyproject.toml -type f 2>/dev/null)
PROMPT := How does a bill become a law in the United States? Explain every step.

.PHONY: demo test test-gpu sanitize-gpu bench bench-gpu lint format cuda-report wheel wheel-test models clean

demo: $(VENV)/.built $(MODEL)
	$(BIN)/lil-ops generate --model models/SmolLM2-135M-Instruct --policy quest --budget 256 --guardian --interval 64 --threshold 5 --max-new-tokens 1024 "$(PROMPT)"

# In two processes, whose threads do not spin while they wait: they share the processors.
test: $(VENV)/.built $(MODEL)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal tests

# On a machine with a GPU whose PYTHON has a CUDA torch: the same tests, with device="cuda" as well.
test-gpu:
	$(PYTHON) bench/gpu.py test

# Some of them under compute-sanitizer.
sanitize-gpu:
	$(PYTHON) bench/gpu.py sanitize

# The CUDA operators beside their peers, and the policies' decisions, as bench/results/*cuda.json and docs/performance.md.
bench-gpu:
	$(PYTHON) bench/gpu.py bench

bench: $(VENV)/.built $(MODEL)
	$(BIN)/python bench/run.py

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# Registers, shared memory, stack and spills of every CUDA kernel; fails where one has any of the last two.
cuda-report: $(VENV)/.built
	$(BIN)/python bench/cuda_report.py

wheel: $(VENV)/.built
	rm -rf dist
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

# The wheel is complete, and works where there is no compiler.
wheel-test: wheel
	tests/wheel_smoke.sh $(BIN)/python dist/*.whl

models: $(MODEL)

$(MODEL): | $(VENV)/.built
	$(BIN)/python examples/fetch_smollm2.py $(dir $(MODEL))

$(VENV)/.created:
	@if $(PYTHON) -c "import torch, sys; sys.exit(torch.version.cuda is None)" 2>/dev/null; then \
	  echo "using the CUDA torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet $(TORCH); \
	fi
	$(BIN)/pip install --quiet "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.12"
	touch $@

$(VENV)/.built: $(VENV)/.created $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lil_ops/*.so
