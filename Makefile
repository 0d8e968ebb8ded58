# LANE=native (nodes as namespaces, zfs-fuse) or LANE=openzfs (nodes as virtual machines, OpenZFS); N nodes.
LANE ?= native
N ?= 2
LAB := LANE=$(LANE) e2e/lab/lab

# Tests are built as the images' programs are (static, optimised), so that what both need is compiled once.
export PORTOLAN_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/portolan
export CARGO_TARGET_DIR ?= $(PORTOLAN_CACHE)/target
CARGO := env RUSTFLAGS='-C target-feature=+crt-static' CARGO_BUILD_TARGET=x86_64-unknown-linux-gnu cargo
# Always the whole workspace: cargo unifies features over the packages that are asked for, and with others it would compile all once more.
BUILD := $(CARGO) build --release --locked -q --workspace --bin
TEST := $(CARGO) test --release --locked --workspace
PROGRAMS := $(CARGO_TARGET_DIR)/x86_64-unknown-linux-gnu/release
# Programs find the lab and the chart there.
export PORTOLAN_REPOSITORY := $(CURDIR)
TIMED := e2e/timed

.PHONY: help demo test test-code test-scene test-primary scene e2e-storage e2e-network bench bench-network bench-encrypted bench-names bench-cni bench-scale generate tools lab-build lab-up lab-down lab-shell lab-status images

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## demo         PostgreSQL moves between two nodes with its disk, its address and its name; the cluster stays up
demo: tools
	$(BUILD) demo
	$(TIMED) "the demo" env KEEP=1 LANE=$(LANE) e2e/on-lane $(PROGRAMS)/demo

## test         everything that is tested, both lanes' scenes and a cluster without another CNI plugin included
test: tools
	$(TIMED) "the lab's Kubernetes" e2e/lab/lab build csi e2e
	$(MAKE) test-code
	$(MAKE) test-scene LANE=native
	$(MAKE) test-primary
	$(MAKE) test-scene LANE=openzfs

## test-code    formatting, lints, and all tests that need no cluster
test-code: tools
	$(TIMED) "Debian packages" e2e/lab/lab packages
	$(TIMED) "formatting" cargo fmt --all --check
	$(TIMED) "lints" $(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	$(TIMED) "tests without a cluster" $(TEST)

## test-scene   the demo's scene as a test, on LANE, in a cluster of its own; TIMES=10 repeats it
TIMES ?= 1
test-scene: tools
	$(TIMED) "the scene on lane $(LANE)" env LANE=$(LANE) e2e/on-lane $(MAKE) scene TIMES=$(TIMES)

## test-primary  Portolan as the only CNI plugin: what nodes and pods see of it, in a cluster of its own on lane native
test-primary: tools
	$(BUILD) e2e-network
	$(TIMED) "Portolan as the only plugin" env LANE=native LAB_CNI=none PARTS=primary e2e/on-lane $(PROGRAMS)/e2e-network

## scene        the scene's test in the lab that is up; PARTS="install snapshots" plays only these parts of it
scene:
	for i in $$(seq $(TIMES)); do LANE=$(LANE) $(TEST) --test e2e -- --nocapture || exit 1; done

## e2e-storage  all of Kubernetes' external-storage suite, on LANE, in a cluster of its own; ends with its result as a table
e2e-storage: tools
	$(BUILD) e2e-storage
	$(TIMED) "the storage suite on lane $(LANE)" env LANE=$(LANE) e2e/on-lane $(PROGRAMS)/e2e-storage

## e2e-network  the same, and a selection of Kubernetes' suite for networks
e2e-network: tools
	$(BUILD) e2e-network
	$(TIMED) "Portolan as the only plugin, and the suite for networks" env LANE=native LAB_CNI=none e2e/on-lane $(PROGRAMS)/e2e-network

## bench        Portolan beside what it is built on, in one run: networks, names and pods' starts, then volumes on LANE (PARTS="forgetting volumes transfers crowds wire moves load"); ends with tables (docs/benchmarks.md)
bench: tools bench-network bench-names bench-cni
	$(TIMED) "what people use else" $(LAB) packages openssh-server sanoid
	$(BUILD) bench
	$(TIMED) "the benchmarks on lane $(LANE)" env LANE=$(LANE) e2e/on-lane $(PROGRAMS)/bench

## bench-network  pods' networks beside those made by hand; needs no cluster. QUICK=1 only shows that it works
bench-network: tools
	$(TIMED) "Debian packages" e2e/lab/lab packages wireguard-tools
	$(BUILD) bench-network
	$(TIMED) "the benchmarks of networks" $(PROGRAMS)/bench-network

## bench-encrypted  encrypted networks beside VXLAN in WireGuard by hand, in a guest of lane openzfs, whose kernel has WireGuard; QUICK=1 as above
bench-encrypted: tools
	$(TIMED) "Debian packages" env LANE=openzfs e2e/lab/lab packages iperf3 wireguard-tools
	$(BUILD) bench-network
	$(TIMED) "the benchmark of encrypted networks" bench/in-guest $(PROGRAMS)/bench-network

## bench-names  Portolan's DNS server beside CoreDNS; needs no cluster. QUICK=1 only shows that it works
bench-names: tools
	$(TIMED) "the lab's programs" e2e/lab/lab build
	$(BUILD) bench-names
	COREDNS=$$(e2e/lab/build/binaries)/coredns $(TIMED) "the benchmarks of names" $(PROGRAMS)/bench-names

## bench-cni    what Portolan adds to a pod's start and end, beside the plugins bridge and host-local; needs no cluster. QUICK=1 only shows that it works
bench-cni: tools
	$(TIMED) "Debian packages" e2e/lab/lab packages
	$(TIMED) "the lab's programs" e2e/lab/lab build
	$(BUILD) bench-cni --bin portolan-cni
	CNI_PLUGINS=$$(e2e/lab/build/binaries)/cni $(TIMED) "the benchmarks of pods' starts" $(PROGRAMS)/bench-cni

## bench-scale  one node of a network of 5,000 nodes and 150,000 pods; needs no cluster. QUICK=1 only shows that it works
bench-scale: tools
	$(BUILD) bench-scale
	$(TIMED) "the benchmark of a large network" $(PROGRAMS)/bench-scale

## generate     the custom resource definitions: ours from their types, those of snapshots from their Go module
generate:
	cargo run -q -p portolan-crds --bin generate-crds -- crds charts/portolan/crds
	charts/snapshot-crds

tools:
	@e2e/tools

## lab-build    build the lab's Kubernetes (LANE=openzfs: and its guests) without starting it
lab-build:
	$(LAB) build

## lab-up       start a cluster of N=2 nodes; LAB_IMAGES="a.tar b.tar" are on its nodes from the start
lab-up:
	$(LAB) up $(N)

## lab-down     end it and remove all of it
lab-down:
	$(LAB) down

## lab-shell    a shell with kubectl and helm that talk to it
lab-shell:
	$(LAB) shell

## lab-status   what runs
lab-status:
	$(LAB) status

## images       build the product's images; prints the archives' paths
images:
	images/build
