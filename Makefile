# make demo: the recipe in miniature, from a bare clone to a report.   make test: every test.
# make slurm: a Slurm of two nodes on this machine, until make slurm-stop.
# All create .venv first, with another interpreter by make PYTHON=python3.11 demo; a .venv that is there stays as it is.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test lint bench setup slurm slurm-stop
setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 12) and f"Python 3.11 or 3.12 is needed and $(PYTHON) is {v[0]}.{v[1]}: name another, as in make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(RUN) -m pip check
	@touch $@

demo: setup
	$(RUN) -m megatron_tower.recipe recipe=demo

test: setup lint
	$(RUN) slurm/local_cluster.py install
	$(RUN) tests/browser/driver.py install
	$(RUN) tests/te/package.py install
	$(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

slurm: setup
	$(RUN) slurm/local_cluster.py start
	@echo 'in this shell: eval "$$($(RUN) slurm/local_cluster.py env)"'

slurm-stop: setup
	$(RUN) slurm/local_cluster.py stop

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: setup
	$(RUN) tools/bench.py cpu
