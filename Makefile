# LANE=native (nodes as namespaces, zfs-fuse) or LANE=openzfs (nodes as virtual machines, OpenZFS); N nodes.
LANE ?= native
N ?= 2
LAB := LANE=$(LANE) e2e/lab/lab

.PHONY: help lab-build lab-up lab-down lab-shell lab-status images

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

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
