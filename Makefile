# fastaa-loaderd. Every target can be repeated; nothing is done twice.
#
#   make run     train a small CNN on Fashion-MNIST from the stream (sets everything up)
#   make test    all checks and tests (sets everything up); last line: N passed, N failed
#   make build   target/release/fastaa-loaderd and target/release/fastaa-ctl
#   make setup   Debian packages, .venv with torch and the Python client
#   make bench   throughput of the whole pipeline
#   make test-gpu   what needs a GPU, and why it was skipped where there is none
#   make bench-gpu  throughput into CUDA tensors, against peers and the copy's bandwidth
#   make clean   remove what was built (not .venv)

SHELL := /bin/bash
.DEFAULT_GOAL := help

export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(HOME)/.cargo/bin:$(PATH)
# torch-sys builds against the torch in .venv, whose version it demands exactly.
export LIBTORCH_USE_PYTORCH := 1

.PHONY: help setup build run test bench test-gpu bench-gpu clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@.ci/setup

build: setup
	cargo build --release --locked

run: build
	@clients/examples/run_demo

test: setup
	@tests/run_all

bench: build
	cargo build --release --locked --example decode_all
	@python benches/pipeline.py

test-gpu: build
	@tests/run_gpu

bench-gpu: build
	@python benches/gpu.py

clean:
	cargo clean
