"""How costs grow: `python -m benchmarks.scaling`; see docs/scale.md."""
