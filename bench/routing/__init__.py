"""The routing policies on simulated replicas: `python -m bench.routing`; see docs/routing.md."""
