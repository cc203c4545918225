"""The search: Ray Tune around the functions of the pipeline."""
