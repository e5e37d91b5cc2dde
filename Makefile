# 两条命令：make train 从零走到一张预报图，make test 跑全部测试；其余见 make help。
SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help train test soak docs mutation audit lock lint format house clean missing
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# 戳记里写着环境中 python 的路径：requirements 改了、或环境被删了，就重新安装；否则立刻可用
# BASE=python3.10：另造一个虚拟环境，由那个解释器造，与平常的互不相干
BASE :=
VENV := .venv$(if $(BASE),-$(notdir $(BASE)))
STAMP := tmp/environment$(if $(BASE),-$(notdir $(BASE)))
PYTHON = $(or $(shell cat $(STAMP) 2>/dev/null),$(VENV)/bin/python)
QUICKSTART_TIME := 1981-07-01T00

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): environment.yml requirements.txt $(if $(wildcard $(PYTHON)),,missing)
	@bash .ci/environment $@ $(VENV) $(BASE)

$(STAMP)-dev: requirements-dev.txt $(STAMP)
	$(PYTHON) -m pip install -r requirements.txt -r requirements-dev.txt
	@touch $@

train: $(STAMP)  ## environment, sample data, quickstart run, its scores and a forecast; goes on where it stopped
	$(PYTHON) dataset.py sample --root data/sample
	$(PYTHON) train.py --config config/quickstart.yaml --resume auto run.name=quickstart
	$(PYTHON) evaluate.py --checkpoint checkpoints/quickstart/best.ckpt --split test --out log/quickstart/evaluation
	$(PYTHON) inference.py --checkpoint checkpoints/quickstart/best.ckpt --time $(QUICKSTART_TIME) --out forecast/quickstart
	@printf '%s\n' '' 'Done. Where everything is:' \
	  '  data/sample/                      the sample data, in the layout of your own tree' \
	  '  log/quickstart/                   report.html, train.log, config.yaml, metrics, figures/' \
	  '  log/quickstart/evaluation/        report.html: every window of the test year, beside persistence and climatology' \
	  '  checkpoints/quickstart/           best.ckpt, last.ckpt' \
	  '  forecast/quickstart/              the forecast: .npy, NetCDF, PNG' \
	  "  $(PYTHON)   the Python of this environment" \
	  'Again: make train goes on with the same run; make clean first starts it afresh.'

test: $(STAMP)-dev  ## the whole test suite; a part: ARGS="tests/test_house.py -k wings"; another Python: BASE=python3.10
	$(PYTHON) -m pytest -n 2 $(ARGS)

soak: $(STAMP)-dev  ## the tests too long for the suite, an hour at most; goes on where it stopped; results: docs/reliability.md
	$(PYTHON) -m tests.soak $(ARGS)

mutation: $(STAMP)-dev  ## change the code in one place, 300 times: do its tests notice? goes on where it stopped
	$(PYTHON) -m tests.mutation $(ARGS)

audit: $(STAMP)-dev  ## the installed packages beside the lock, their files beside what was installed; why each: ARGS=--list
	$(PYTHON) -m tests.audit $(ARGS)

lock: $(STAMP)-dev  ## requirements-lock-*.txt: every package with the sha256 of its files; LOCKED=1 installs from them
	bash .ci/lock $(PYTHON)

docs: $(STAMP)-dev  ## run every command of docs/tutorial, write output and pictures into its pages; half an hour
	$(PYTHON) -m tests.tutorial

lint: $(STAMP)-dev  ## ruff and pyright
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

format: $(STAMP)-dev  ## let ruff lay out the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

house:  ## print the house (wings, rooms, lines, arrows) into docs/architecture.md
	python3 -m tests.house --write

clean:  ## remove the quickstart run and all caches; your runs, the sample data, the environment and what was soaked stay
	rm -rf checkpoints/quickstart log/quickstart forecast/quickstart .pytest_cache .ruff_cache .hypothesis
	find tmp -mindepth 1 ! -name .gitkeep ! -name 'environment*' ! -name 'soak-*' ! -name 'mutation*' -delete
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
