"""Ray Tune copies parts of the environment into logs: no secret is among them."""

from __future__ import annotations

from ray.tune.execution import class_cache


def keep_secrets() -> None:
    """Have trials take the keys of object storage from their node's environment, as everything else does.

    Ray 2.60 copies the driver's into the `runtime_env` of every trial, which its logs and its API show.
    """
    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])
