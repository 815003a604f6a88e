# Two commands: `make demo` and `make test`, and on a machine with an NVIDIA GPU a third, `make gpu`. They set everything
# up first; nothing is done twice.
#
#   PYTHON=python3.12   the interpreter to start from (3.10 or newer)
#   VENV=DIR            where the virtual environment lives
#   SYSTEM=1            use the packages PYTHON already has (torch and the rest) and no network; installs nothing into PYTHON
#                       (`make gpu` does so unless told otherwise, SYSTEM=: the machine has its own build of torch for CUDA)
#   ARGS='...'          arguments for `fastrnn demo`, pytest or bench.gpu, for example ARGS='tests/test_laws.py -x'

PYTHON ?= python3
SYSTEM ?= $(if $(filter gpu,$(MAKECMDGOALS)),1)
VENV ?= $(if $(SYSTEM),.venv-system,.venv)
ARGS ?=
BIN := $(VENV)/bin
EXTENSION := fastrnn/_C.abi3.so
OLDEST_TRITON := build/triton-3.6
SOURCES := $(wildcard csrc/*.c csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(filter-out %.c %.inc,$(SOURCES)) $(wildcard tests/device/*.cu bench/*.cu tests/native/*.cpp tests/native/*.h)
, := ,
NEEDED := torch numpy safetensors tokenizers tqdm pip setuptools pytest pytest_timeout hypothesis

# $(call quiet,NAME,COMMANDS): the output goes to build/NAME.log and is shown only when a command fails.
quiet = mkdir -p build && { { $(2); } > build/$(1).log 2>&1 \
	|| { tail -n 40 build/$(1).log; echo "$(1): failed; the whole output is in build/$(1).log"; exit 1; }; }

.DEFAULT_GOAL := help
.PHONY: help demo test gpu sanitize aot lint format build setup clean distclean

help:
	@echo "make demo       set up, then train a small model and generate from it: fastrnn demo"
	@echo "make test       set up, then run the tests"
	@echo "make gpu        on a machine with an NVIDIA GPU: build, tests, sanitizers, benchmarks, into build/gpu or \$$OUT"
	@echo "make build      set up only: virtual environment in $(VENV), packages, the compiled extension"
	@echo "make sanitize   the kernels and the generation loop under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make aot        the Triton kernels compiled for GPUs that are not there, with the oldest and the newest triton"
	@echo "make lint       ruff and clang-format, changing nothing;  make format lets them change the files"
	@echo "make clean      remove what was built;  make distclean removes the virtual environment too"
	@echo "PYTHON=python3.12 picks the interpreter; SYSTEM=1 uses the packages it already has and no network"

demo: build
	@echo "demo: fastrnn demo $(ARGS)"
	@$(BIN)/fastrnn demo $(ARGS)

test: build
	@echo "test: pytest $(ARGS)"
	@$(BIN)/python -m pytest $(ARGS)

gpu: setup
	@$(BIN)/python -m bench.gpu $(ARGS)

sanitize: build
	@echo "sanitize: compiling and running tests/native (over 10 minutes of processor time)"
	@$(call quiet,sanitize,tests/native/sanitize && tests/native/sanitize_cuda)
	@grep -a ' holds$$\|left out' build/sanitize.log

# The oldest triton that pyproject.toml allows, beside the one in VENV; for the same Python, no other package needed.
$(OLDEST_TRITON)/.installed: $(VENV)/.installed
	@echo "aot: installing $(notdir $(OLDEST_TRITON)) into $(OLDEST_TRITON) (once)"
	@$(call quiet,triton,$(BIN)/python -m pip install --no-compile --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0)
	@touch $@

aot: build $(OLDEST_TRITON)/.installed
	@echo "aot: tests/aot.py with each triton"
	@$(call quiet,aot,$(BIN)/python tests/aot.py --jobs 2 && PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python tests/aot.py --jobs 2)
	@grep -a ' compiled, ' build/aot.log

setup: $(VENV)/.installed

build: $(EXTENSION)

ifeq ($(SYSTEM),)
$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "setup: fastrnn needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "setup: installing torch and the other packages of constraints.txt into $(VENV) (once; a few minutes at most)"
	@$(call quiet,setup,$(PYTHON) -m venv $(VENV) \
	  && $(BIN)/python -m pip install --no-compile -c constraints.txt setuptools wheel ninja \
	  && FASTRNN_EXTENSION=0 $(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[test$(,)plots]')
	@touch $@
else
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys, importlib.util as u; gone = [n for n in sys.argv[1:] if not u.find_spec(n)]; \
	  sys.exit("setup: SYSTEM=1 wants these in " + sys.executable + ": " + " ".join(gone) if gone else 0)' $(NEEDED)
	@echo "setup: SYSTEM=1: $(VENV) borrows the packages of $(PYTHON), nothing is downloaded"
	@$(call quiet,setup,$(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")]$(,) sep="\n")' \
	       > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth" \
	  && FASTRNN_EXTENSION=0 $(BIN)/python -m pip install --no-index --no-deps --no-build-isolation -e .)
	@touch $@
endif

# Without a working compiler setup.py says so and leaves the extension out; then there is no file, and the next make tries again.
$(EXTENSION): setup.py $(SOURCES) $(VENV)/.installed
	@echo "build: compiling the extension (CPU, and CUDA where torch and nvcc have it)"
	@$(call quiet,build,$(BIN)/python setup.py build_ext --inplace)
	@grep -a '^fastrnn:' build/build.log
	@if [ -e $@ ]; then touch $@; fi

$(VENV)/.lint: constraints.txt $(VENV)/.installed
	@echo "lint: installing ruff and clang-format into $(VENV) (once)"
	@$(call quiet,lint,$(if $(SYSTEM),true,$(BIN)/python -m pip install -c constraints.txt ruff clang-format))
	@touch $@

lint: $(VENV)/.lint
	@echo "lint: ruff check and clang-format --dry-run"
	@$(BIN)/python -m ruff check --quiet .
	@$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))

format: $(VENV)/.lint
	@$(BIN)/python -m ruff check --fix --quiet .
	@$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

clean:
	@rm -rf build dist *.egg-info fastrnn/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find fastrnn kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true

distclean: clean
	@rm -rf .venv .venv-system
