"""Measurements whose results are the cards under docs/benchmarks/."""
