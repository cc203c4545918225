"""Training on scored pairs: batches, loop, DeepSpeed engine, checkpoints."""
