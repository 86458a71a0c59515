# make demo    the whole product on real data with real servers, in a few minutes
# make page    a person's device in a browser, with the demo's model: what it predicts, and every byte that leaves it
# make test    unit tests, then integration tests against real Kafka, Triton, Feast and Flower
# make documents what the walkthroughs tell you to type, typed: another quarter of an hour
# make check   format, lint, types, import rules, unit tests and doctests
# make images   the images of the chart (Docker): REGISTRY=... VERSION=...
# make chart   what the Helm chart promises, without a cluster; builds Helm and what looks at charts the first time (needs Go)
# make chart-cluster   the chart on a real Kubernetes API server: installed, upgraded, rolled back, removed
# make benchmarks   how fast training, serving and devices are, and how good: about 50 minutes
# make clean   removes everything these made
#
# Set UV_TORCH_BACKEND=cpu to install torch's CPU build from its own index instead of the CUDA one.

PYTHON ?= python3
UV_VERSION := 0.12.24
UV := .cache/uv/bin/uv
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
RUN := .venv/bin/
PACKAGES := hybrid feature_store serving device_runtime

# Without cached byte code every command would compile its libraries again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo page test check static unit integration documents servers images chart chart-cluster benchmarks clean
.DEFAULT_GOAL := demo

demo: servers
	@$(RUN)python -m examples.coupon.demo

page: servers
	@HYBRID_HOME=runs/demo/.hybrid $(RUN)hybrid page coupon

test: unit integration

check: static unit

static: .venv/installed
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy
	$(RUN)lint-imports --no-logo

unit: .venv/installed
	$(RUN)pytest -n 2 --dist loadfile $(PACKAGES) examples benchmarks
	$(RUN)pytest --doctest-modules --ignore-glob='*/tests/*' --ignore=hybrid/export/triton_onnx_model.py $(PACKAGES) -p no:cacheprovider

integration: servers
	$(RUN)pytest -n 2 --dist loadfile --ignore=integration_tests/test_walkthroughs.py integration_tests

documents: servers
	$(RUN)pytest -n 2 integration_tests/test_walkthroughs.py

# Torch's CPU build unless TORCH_BACKEND says otherwise; BASE is the Python image. Scan before you push.
images:
	@test -n "$(REGISTRY)" || { echo "REGISTRY must be where the images are pushed to, such as registry.example/ml"; exit 2; }
	for role in serving training control; do \
	  docker build --file helm/Dockerfile --target $$role --tag $(REGISTRY)/hybrid-towers-$$role:$(VERSION) \
	    --build-arg VERSION=$(VERSION) $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(TORCH_BACKEND),--build-arg TORCH_BACKEND=$(TORCH_BACKEND)) \
	    $(if $(UV_DEFAULT_INDEX),--build-arg UV_DEFAULT_INDEX) $(if $(PIP_INDEX_URL),--build-arg PIP_INDEX_URL) . || exit; \
	done
	@for role in serving training control; do \
	  echo "trivy image --exit-code 1 --severity HIGH,CRITICAL $(REGISTRY)/hybrid-towers-$$role:$(VERSION)"; \
	  echo "docker push $(REGISTRY)/hybrid-towers-$$role:$(VERSION)"; \
	done
chart: .venv/installed
	@$(RUN)python -m helm.tools.install
	$(RUN)pytest helm/tools --ignore=helm/tools/tests/test_cluster.py
	@$(RUN)python -m helm.tools.check --json build/chart.json

chart-cluster: .venv/installed
	@$(RUN)python -m helm.tools.install cluster
	$(RUN)pytest helm/tools/tests/test_cluster.py
	@$(RUN)python -m helm.tools.cluster --json build/chart-cluster.json

benchmarks: servers
	@mkdir -p build
	$(RUN)python -m benchmarks.training --json build/training.json
	$(RUN)python -m benchmarks.accuracy --json build/accuracy.json
	$(RUN)python -m benchmarks.serving --json build/serving.json
	$(RUN)python -m benchmarks.device --json build/device.json
	$(RUN)python -m benchmarks.fleet --json build/fleet.json
	$(RUN)python -m benchmarks.analytics --json build/analytics.json

# Kafka's JARs, and Triton in an environment of its own (its Python backend needs NumPy 1).
servers: .venv/installed
	@$(RUN)python -m hybrid.local install

.venv/installed: pyproject.toml constraints.txt $(UV)
	@echo "Installing the Python environment into .venv (the first time: about 3 GB to download, 6.5 GB on disk) ..."
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	@$(UV) pip install --quiet --python .venv/bin/python --constraints constraints.txt --editable '.[dev]'
	@touch $@

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	@echo "Installing uv $(UV_VERSION) into .cache/uv ..."
	@$(PYTHON) -m venv .cache/uv
	@.cache/uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

clean:
	@if [ -x $(RUN)hybrid ]; then $(RUN)hybrid down; HYBRID_HOME=runs/demo/.hybrid $(RUN)hybrid down; fi
	rm -rf examples/*/data/*.parquet .venv .cache .hybrid build runs dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
