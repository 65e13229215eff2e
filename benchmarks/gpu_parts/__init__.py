"""The parts of `benchmarks/gpu_check.py`; each runs in a process of its own."""
