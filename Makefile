# make demo, make test, ...: each is a command of tasks.py, which does the same where there is no make.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
TASKS  := help install demo demo-clean test test-fast test-interop lint bench sample tiny clean

.PHONY: $(TASKS)
$(TASKS):
	@"$(PYTHON)" tasks.py $@
