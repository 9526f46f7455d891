"""Speed, measured beside the peers in one run. `python -m benchmarks.run` writes results/*.json and docs/benchmarks.md."""
