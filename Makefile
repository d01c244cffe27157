# make demo    the whole method on the miniature, on a laptop's CPU
# make test    the tests
# make lint    ruff, with the settings of pyproject.toml, and oxlint for the page's script
# make bench   every benchmark in a size that shows in a minute that it runs; its figures mean nothing
# Each makes its own virtual environment in .venv and installs requirements.txt; nothing else is needed but Python 3.11+.

PYTHON ?= python3
SHELL = /bin/bash
RUN = set -euo pipefail; . .venv/bin/activate;

# The demo is the README's commands; these add flags to each, as CI does to make it smaller.
SAMPLE =
SFT =
GRPO =
RL =
EVALUATE =

.PHONY: demo test lint bench
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch .venv/installed

test: .venv/installed
	.venv/bin/python -m pytest -q tests

lint: .venv/installed
	.venv/bin/pip install --quiet $(shell grep -E '^(ruff|oxlint)' tests/requirements.txt)
	.venv/bin/ruff check .
	.venv/bin/oxlint --deny-warnings report/page.js

bench: .venv/installed
	@$(RUN) TRITON_INTERPRET=1 SCALE=0.003 OUT=out/benchmarks bash benchmarks/gpu.sh; \
	  python benchmarks/sampling.py --model mini --load chat --scale 0.03 --repeats 1 --out out/benchmarks/chat.json

# In a folder of its own, out/demo, with links to the scripts. The two RL runs go side by side, a core each, and
# two processes evaluate.
demo: .venv/installed
	@rm -rf out/demo && mkdir -p out/demo && cd out/demo && ln -s ../../*.py .
	@$(RUN) cd out/demo; \
	  echo "== beside the others: RL only, its screen in out/demo/rl.log"; \
	  python grpo.py --model mini --out out/rl --lr 3e-4 --steps 340 $(RL) > rl.log 2>&1 & rl=$$!; \
	  trap "kill $$rl 2> /dev/null || true" EXIT; \
	  python sample.py $(SAMPLE); \
	  python rearrange.py; \
	  python sft.py $(SFT); \
	  python grpo.py $(GRPO); \
	  wait $$rl; \
	  torchrun --nproc-per-node 2 evaluate.py $(EVALUATE)
	@echo "open out/demo/out/evaluate/report.html, and out/demo/out/grpo/report.html for the training"
