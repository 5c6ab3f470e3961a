"""The stages of benchmarks/gpu.py that are modules of their own."""
