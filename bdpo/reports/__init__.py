"""HTML pages and figures of a run, its scores, a search and an experiment."""
