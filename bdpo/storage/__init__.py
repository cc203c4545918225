"""Files that are complete or absent: paths, locks, digests, manifests, the run folder, shards."""
