# make demo    the whole method on the miniature, on a laptop's CPU
# make test    the tests
# make lint    ruff, with the settings of pyproject.toml
# make bench   every benchmark in a size that shows in a minute that it runs; its figures mean nothing
# Each makes its own virtual environment in .venv and installs requirements.txt; nothing else is needed but Python 3.11+.

PYTHON ?= python3
SHELL = /bin/bash
RUN = set -euo pipefail; . .venv/bin/activate; export OMP_NUM_THREADS=1;

# How much the demo does. CI makes it smaller: make demo QUESTIONS=60 EPOCHS=1 STEPS=3 RL_STEPS=3 EVAL=20
QUESTIONS = 450
EPOCHS = 5
STEPS = 80
RL_STEPS = 300
EVAL = 200

SIZES = countdown-3-small,countdown-4-small,countdown-5-small
DEMO = out/demo

.PHONY: demo test lint bench
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch .venv/installed

test: .venv/installed
	.venv/bin/python -m pytest -q tests

lint: .venv/installed
	.venv/bin/pip install --quiet $(shell grep ^ruff tests/requirements.txt)
	.venv/bin/ruff check .

bench: .venv/installed
	@$(RUN) out="--repeats 1 --out out/benchmarks"; \
	  python benchmarks/ops.py --scale 0.01 $$out/ops.json; \
	  TRITON_INTERPRET=1 KERNELS=triton python benchmarks/ops.py --scale 0.0005 --device cpu --dtype float32 $$out/ops-interpreted.json; \
	  for load in nano-vllm group chat decode; do python benchmarks/sampling.py --model mini --load $$load --scale 0.03 $$out/$$load.json; done; \
	  python benchmarks/training.py sft --model mini --rows 2 --length 64 $$out/sft.json; \
	  python benchmarks/training.py grpo --model mini --questions 2 --rollouts 4 --max-new-tokens 32 $$out/grpo.json

# Two jobs run side by side, one core each: the model is too small for a second thread to help.
# Traces are made of 3, 4 and 5 numbers; both GRPO runs train on 3 numbers only.
demo: .venv/installed
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "== 1. sample: the base model attempts problems and judges its attempts (two processes, half of the questions each)"
	@$(RUN) sample="python sample.py --task $(SIZES) --questions $(QUESTIONS) --n 6 --reflections 1 --max-new-tokens 100 \
	    --temperature 1 --top-p 1 --top-k 0 --repetition-penalty 1"; \
	  $$sample --shard 0/2 --out $(DEMO)/samples0.jsonl & other=$$!; \
	  $$sample --shard 1/2 --out $(DEMO)/samples1.jsonl; wait $$other
	@echo "== 2. rearrange: its text becomes traces; here is one, as it is built"
	@$(RUN) python rearrange.py --data $(DEMO)/samples0.jsonl,$(DEMO)/samples1.jsonl --show 1
	@$(RUN) python rearrange.py --data $(DEMO)/samples0.jsonl,$(DEMO)/samples1.jsonl --out $(DEMO)/silver.jsonl
	@echo "== 3. sft on the traces, then grpo from there; beside it grpo from the base (RL only), its screen in $(DEMO)/rl.log"
	@$(RUN) python grpo.py --lr 1e-4 --steps $(RL_STEPS) --max-new-tokens 100 --out $(DEMO)/rl > $(DEMO)/rl.log 2>&1 & other=$$!; \
	  python sft.py --data $(DEMO)/silver.jsonl --epochs $(EPOCHS) --out $(DEMO)/sft; \
	  python grpo.py --model $(DEMO)/sft --steps $(STEPS) --max-new-tokens 400 --out $(DEMO)/grpo; wait $$other
	@echo "== 4. evaluate on problems that nothing was trained on"
	@$(RUN) python evaluate.py --models base=mini,rl-only=$(DEMO)/rl,sft=$(DEMO)/sft,sft+grpo=$(DEMO)/grpo --tasks $(SIZES) \
	  --questions $(EVAL) --samples 4 --out $(DEMO)/evaluate
	@echo "open $(DEMO)/evaluate/report.html"
