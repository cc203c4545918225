"""Scoring pairs with the reference model: mutual information and CHES of every pair."""
