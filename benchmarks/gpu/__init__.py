"""The 7B path on one NVIDIA GPU: correctness, speed and memory; see `__main__`."""
