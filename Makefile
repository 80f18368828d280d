# make demo: train both stages on the drawn pill, draw pairs, evaluate them. make test: the tests; make test-all: the slow ones too.
# Each sets up .venv by itself.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-all
demo: .venv/ready
	rm -rf runs/demo
	$(RUN) train.py --stage large
	$(RUN) train.py --stage small
	$(RUN) sample.py --min-area-px 1
	$(RUN) evaluate.py generation

test: .venv/ready
	$(RUN) -m pytest -q -m "not slow"

test-all: .venv/ready
	$(RUN) -m pytest -q

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@
