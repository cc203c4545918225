"""Causal language models: loading, tokenizer, adapters, packed forward passes, log-probs."""
