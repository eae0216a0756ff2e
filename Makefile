# Training, tests and checks, one command each, on a fresh machine with Python 3.11+.
# PYTHON=… chooses the interpreter of the environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
KERNELS := .venv/.kernels
RUN ?= toy

.PHONY: toy kernels test test-slow torture drills cluster-test soak check format clean help

help:
	@echo "make toy           train the toy model on this machine, on two ranks under Ray"
	@echo "make kernels       install MegaBlocks' kernels, with or without a GPU (docs/kernels.md)"
	@echo "make test          run the fast tests"
	@echo "make test-slow     run the slow tests: whole runs under Ray, killed, moved, swept, submitted"
	@echo "make torture       corrupt checkpoints in every way and count what is lost (5 minutes)"
	@echo "make drills        inject faults into runs on this machine and time the recovery (7 minutes)"
	@echo "make cluster-test  the same on hosts made of network namespaces (as root; 10 minutes)"
	@echo "make soak          train for 30 minutes under random kills, then again undisturbed (1 hour)"
	@echo "make check         check format, lint, types and the direction of imports"
	@echo "make format        format the code"
	@echo "make clean         delete the environment (runs/ and data/ stay)"

# Installs the exact tested versions, and again only when they change.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moetrain needs Python 3.11 or newer; this is %s. Use make PYTHON=python3.11" % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch is large; this happens once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)

toy: $(INSTALLED)
	@$(BIN)/python -m data_pipeline.build corpus=stdlib tokenizer=bytes to=data/stdlib-bytes
	@$(BIN)/python -m moetrain +model=toy run.name=$(RUN) launch.mode=ray launch.num_workers=2

$(KERNELS): $(INSTALLED) constraints.txt launch/clusters/kernels.sh
	@launch/clusters/kernels.sh $(BIN)/python
	@touch $(KERNELS)

kernels: $(KERNELS)

# Two files at once: much of the suite waits for Ray, for timeouts and for processes to end.
test: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

torture: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

drills: $(INSTALLED)
	@$(BIN)/python -m tests.drills where=single

cluster-test: $(INSTALLED)
	@$(BIN)/python -m tests.drills where=cluster

soak: $(INSTALLED)
	@$(BIN)/python -m tests.drills.soak

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info
