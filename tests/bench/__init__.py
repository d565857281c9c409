"""Benchmarks: speed and memory as ratios, taken in turn within one run. ``python -m tests.bench --help``."""
