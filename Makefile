# make setup | demo | test | lint: each makes the virtual environment it needs.
VENV ?= .venv
PYTHON = $(VENV)/bin/python
READY = $(VENV)/.ready
HOST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): setup.py constraints.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "creating $(VENV) with $$python" && \
	  { [ -x $(PYTHON) ] || "$$python" -m venv $(VENV); } && \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade pip && \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" && \
	  touch $(READY)

demo: $(READY)
	$(HOST) $(PYTHON) examples/tiny_demo/run_demo.py $(DEMO_ARGS)

test: $(READY)
	$(HOST) $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 $(TEST_ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
