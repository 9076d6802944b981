"""The benchmark suite: ``python -m tests.benchmarks [--quick]``; see ``docs/benchmarks.md``."""
