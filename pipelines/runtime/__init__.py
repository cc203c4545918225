"""What the commands share: command line, Ray cluster, progress, pools, recovery."""
