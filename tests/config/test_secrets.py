"""Secrets are refused wherever they would be stored or shown, and never repeated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.config import Config, parse_config
from bdpo.config.secrets import looks_secret, refuse_secrets
from bdpo.errors import UserError
from tests.support.helpers import tiny_config

PLANTED = "pl4nted-s3cret-value"

SECRETS = """
    HF_TOKEN OPENAI_API_KEY AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_ACCESS_KEY_ID RAY_AUTH_TOKEN apiKey
    token judge_api_key PGPASSWORD db_passwd GITHUB_PAT client-secret GOOGLE_CREDENTIALS SSH_PRIVATE_KEY
    x.y.token
"""

OTHERS = """
    judge_api_key_env RAY_AUTH_TOKEN_PATH GOOGLE_CREDENTIALS_FILE TOKENIZERS_PARALLELISM max_new_tokens
    tokens_per_batch prefill_tokens num_tokens path PYTHONPATH monkey keyword
"""


@pytest.mark.parametrize("key", SECRETS.split())
def test_names_of_secrets(key):
    assert looks_secret(key)


@pytest.mark.parametrize("key", OTHERS.split())
def test_names_of_other_things(key):
    assert not looks_secret(key)


def keys_of(model):
    for name, field in model.model_fields.items():
        yield name
        if hasattr(field.annotation, "model_fields"):
            yield from keys_of(field.annotation)


def test_no_key_of_ours_looks_like_one():
    assert [key for key in keys_of(Config) if looks_secret(key)] == []


@pytest.mark.parametrize(
    "value",
    [
        f"s3://user:{PLANTED}@bucket/run",
        f"https://x:{PLANTED}@host/v1",
        f"https://host/file.csv?X-Amz-Signature={PLANTED}",
        "hf_" + "a1B2" * 8,
        "sk-" + "a1B2" * 8,
        "AKIA" + "ABCDEFGH23456789",
    ],
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"deep": [{"er": v}]}])
def test_values_of_secrets(value, wrap):
    with pytest.raises(UserError) as refused:
        refuse_secrets({"run_dir": wrap(value)}, "my.yaml")
    assert "my.yaml: run_dir" in str(refused.value)
    assert value not in str(refused.value)
    assert PLANTED not in str(refused.value)


@pytest.mark.parametrize(
    "value", ["s3://bucket/runs/a@b", "Qwen/Qwen2-7B-Instruct", "http://host:8000/v1", "a:b@c"]
)
def test_values_of_other_things(value):
    refuse_secrets({"run_dir": value, "n": 3, "none": None}, "my.yaml")


@given(
    st.lists(st.sampled_from(["model", "data", "x"]), max_size=3),
    st.sampled_from(["api_key", "HF_TOKEN", "db_password"]),
)
def test_no_depth_hides_one(sections, key):
    values = {key: PLANTED}
    for section in sections:
        values = {section: values}
    with pytest.raises(UserError, match=".".join([*reversed(sections), key])):
        refuse_secrets(values, "my.yaml")


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("evaluate", {"judge_api_key": PLANTED}, "evaluate.judge_api_key looks like a secret"),
        ("data", {"path": f"https://me:{PLANTED}@host/pairs.jsonl"}, "data.path holds a password"),
    ],
)
def test_a_config_with_one_is_refused_before_anything_else(tmp_path, section, change, named):
    values = tiny_config(tmp_path, tmp_path, tmp_path).model_dump()
    values[section] = values[section] | change
    with pytest.raises(UserError) as refused:
        parse_config(values, "my.yaml")
    assert named in str(refused.value)
    assert PLANTED not in str(refused.value)
