"""The commands: stages over a run folder, and tools beside them; `runtime` is what they share."""
