"""The cluster as bdpo sees it: nodes, placement, preflight checks, status of a run."""
