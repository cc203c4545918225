"""Variants: configs that differ from a run's in some keys, each trained and evaluated in a folder of its own.

An arm of an experiment and a trial of a search are variants. This room has what both share: how a variant
ends, and what ranks it. The engine that runs them on Ray is `pipelines.runtime.variants`.
"""
