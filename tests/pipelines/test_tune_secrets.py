"""The keys of object storage are not in what Ray Tune sends with a trial, which its logs and API show."""

from __future__ import annotations

from ray.tune.execution import class_cache

from pipelines.runtime.tune_secrets import keep_secrets

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


class Trial:
    """Any class."""


def sent(monkeypatch):
    for name in KEYS:
        monkeypatch.setenv(name, "planted")
    options = class_cache._ActorClassCache().get(Trial)._default_options
    return options["runtime_env"]["env_vars"]


def test_no_key_is_sent_with_a_trial(monkeypatch):
    names = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names)
    assert "planted" in sent(monkeypatch).values()  # what Ray does by itself
    keep_secrets()
    assert "planted" not in sent(monkeypatch).values()
    assert "PL_DISABLE_FORK" in sent(monkeypatch)
