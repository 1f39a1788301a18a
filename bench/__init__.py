"""Measurements: `python -m bench.gateway` and `python -m bench.engine`; see docs/performance.md."""
