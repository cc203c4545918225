"""Engines that generate answers: transformers and vLLM."""
