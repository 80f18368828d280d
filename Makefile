# make demo: train both stages on the drawn pill, draw pairs, evaluate them. make test: the tests; make test-faults: those that break
# things on purpose, with 20 random moments of a kill where make test takes 4. Each sets up .venv by itself.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-faults
demo: .venv/ready
	rm -rf runs/demo
	$(RUN) train.py --stage large
	$(RUN) train.py --stage small
	$(RUN) sample.py
	$(RUN) evaluate.py

test: .venv/ready
	$(RUN) -m pytest -q

test-faults: .venv/ready
	ALL_FAULTS=1 $(RUN) -m pytest -q tests/test_faults.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@
