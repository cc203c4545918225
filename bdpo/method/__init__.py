"""The method as pure functions of tensors: mutual information, CHES, weights and losses."""
