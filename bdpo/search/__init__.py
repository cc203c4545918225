"""Hyperparameter search: space, suggestions, early stopping, winner."""
