# make demo   the whole way on the built-in sample and the tiny base model: minutes, offline after the installation
# make test   all tests (minutes); make test-fast: those that take under a minute
# make help   the rest

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
TINY   := model_download/tiny_qwen3_tcm
DEMO   := trainer_output/demo
DATA   := $(DEMO)/qwen3
# A model of 3.7 M parameters takes far larger rates than one of 0.6 B, and shorter rows.
SMALL  := --max-length 512 --batch-size 2 --accumulation 1

# Tests of one file stay on one core: many share a model that takes seconds to make.
PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo demo-clean test test-fast lint bench sample tiny clean

help:
	@grep -E '^# make' Makefile | cut -c3-
	@echo "make install     the environment only ($(VENV))"
	@echo "make demo-clean  remove the demo's results, so that the next demo trains again"
	@echo "make lint        ruff: style and formatting"
	@echo "make bench       training speed against TRL on Qwen3-0.6B's shape (under two hours on 2 cores; nothing else should run beside it)"
	@echo "make sample      make the built-in sample again from its fact tables"
	@echo "make tiny        pre-train the tiny base model again (2 cores: under 40 minutes)"
	@echo "make clean       remove the environment and all caches (not the models you trained)"

install: $(READY)

# The libraries in requirements.txt need 3.11; the python3 of macOS is older, and pip's own message names torch instead.
$(READY): requirements.txt
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python %d.%d, wanted 3.11: make PYTHON=python3.12' % sys.version_info[:2])"
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip check
	@touch $(READY)

demo: $(READY)
	@date +%s > $(VENV)/.demo-began
	@echo "This demo fine-tunes a tiny Qwen3 of 3.7 M parameters, pre-trained on the built-in sample, not Qwen3-0.6B: the same"
	@echo "scripts, the same steps, minutes instead of hours. Everything lands in $(DEMO)/."
	@echo; echo "== 1/9 the built-in TCM sample, as if downloaded"
	@$(PY) data_prepare/download_tcm_data.py --dataset sample --output-dir $(DEMO)/raw
	@echo; echo "== 2/9 convert it to Qwen3's chat format"
	@$(PY) data_prepare/convert_to_qwen3_format.py --input-files $(DEMO)/raw --output-dir $(DATA) --tokenizer-model $(TINY)
	@echo; echo "== 3/9 full fine-tuning (SFT)"
	@$(PY) model_finetune/finetune_sft.py --model $(TINY) --train-file $(DATA)/sft_train.jsonl --eval-file $(DATA)/sft_eval.jsonl \
	  --output-dir $(DEMO)/sft_finetuned $(SMALL) --epochs 1 --max-steps 160 --learning-rate 5e-4 --eval-rows 200
	@echo; echo "== 4/9 LoRA fine-tuning of the same base"
	@$(PY) model_finetune/finetune_lora.py --model $(TINY) --train-file $(DATA)/sft_train.jsonl --eval-file $(DATA)/sft_eval.jsonl \
	  --output-dir $(DEMO)/lora_finetuned $(SMALL) --epochs 1 --max-steps 160 --learning-rate 2e-3 --eval-rows 200
	@echo; echo "== 5/9 preference pairs from the same rows"
	@$(PY) data_prepare/build_preference_pairs.py --kind facts --input-dir $(DATA) --output-dir $(DATA) --max-train 1200 --max-eval 600
	@echo; echo "== 6/9 DPO, from the SFT result"
	@$(PY) model_finetune/finetune_dpo.py --model $(DEMO)/sft_finetuned --train-file $(DATA)/dpo_train.jsonl \
	  --eval-file $(DATA)/dpo_eval.jsonl --output-dir $(DEMO)/dpo_finetuned $(SMALL) --learning-rate 1e-4 --sft-weight 1
	@echo; echo "== 7/9 compare them on held-out herbs, formulas, points and syndromes"
	@$(PY) model_finetune/compare_models.py --models $(TINY) $(DEMO)/sft_finetuned $(DEMO)/lora_finetuned $(DEMO)/dpo_finetuned \
	  --eval-file $(DATA)/sft_eval.jsonl --exam-file $(DATA)/exam.jsonl --pairs-file $(DATA)/dpo_eval.jsonl --output-dir $(DEMO) --eval-rows 300 --letter-rows 40
	@echo; echo "== 8/9 ask the result a question"
	@echo "> 麻黄的药性是什么？"
	@$(PY) model_download/load_local_model.py $(DEMO)/dpo_finetuned --prompt "麻黄的药性是什么？" --greedy
	@echo; echo "== 9/9 done in $$(( $$(date +%s) - $$(cat $(VENV)/.demo-began) )) s. Look at:"
	@ls $(DEMO)/*/loss_curve.png $(DEMO)/comparison.png $(DEMO)/comparison.md
	@echo "Chat: $(PY) model_download/load_local_model.py $(DEMO)/dpo_finetuned"

demo-clean:
	rm -rf $(DEMO)

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .

bench: $(READY)
	$(PY) tests/benchmarks/bench_training.py

sample: $(READY)
	$(PY) data_prepare/sample/make_sample.py

tiny: sample
	$(PY) model_download/pretrain_tiny_model.py

clean:
	rm -rf $(VENV) .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
