"""The commands behind the figures in README and docs, run as `python -m benchmarks.NAME`."""
