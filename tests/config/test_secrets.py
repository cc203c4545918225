"""Secrets are refused wherever they would be stored or shown, and never repeated."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo.config import Config, load_config, parse_config
from bdpo.config.secrets import looks_secret, refuse_secrets
from bdpo.errors import UserError
from tests.support import ROOT
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


def random_text(length, alphabet=string.ascii_letters + string.digits, seed=0):
    return "".join(random.Random(seed).choices(alphabet, k=length))


R20, R36, R40 = (random_text(n) for n in (20, 36, 40))

PLANTED_SHAPES = {
    "password in a URL": f"s3://user:{PLANTED}@bucket/run",
    "password of an endpoint": f"https://x:{PLANTED}@host/v1",
    "token as user in a URL": f"https://{R40}@github.com/a/b.git",
    "signed URL of S3": f"https://host/file.csv?X-Amz-Signature={PLANTED}",
    "Azure SAS": f"https://a.blob.core.windows.net/c/d?sv=2024-01-01&sp=r&sig={R40}%3D",
    "Azure AccountKey": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={random_text(86)}==",
    "Azure service bus": f"Endpoint=sb://a/;SharedAccessKeyName=n;SharedAccessKey={R40}=",
    "Hugging Face": "hf_" + R36,
    "Hugging Face organisation": "api_org_" + R36,
    "OpenAI": "sk-" + R40,
    "OpenAI project": f"sk-proj-{R20}-{R20}",
    "Anthropic": f"sk-ant-api03-{R40}",
    "AWS key id": "AKIA" + "ABCDEFGH23456789",
    "AWS session key id": "ASIA" + "ABCDEFGH23456789",
    "AWS secret key": random_text(40, string.ascii_letters + string.digits + "+/", seed=3),
    "GitHub classic": "ghp_" + R36,
    "GitHub fine-grained": f"github_pat_{random_text(22)}_{random_text(59)}",
    "GitHub app": "ghs_" + R36,
    "GitLab": "glpat-" + R20,
    "GitLab CI": f"glcbt-64_{R20}",
    "Slack bot": f"xoxb-123456789012-123456789012-{random_text(24)}",
    "Slack app": f"xapp-1-A0123456789-1234567890123-{R40}",
    "Slack webhook": f"https://hooks.slack.com/services/T01234567/B01234567/{random_text(24)}",
    "Google API": "AIza" + random_text(35),
    "Google OAuth": f"ya29.{R40}",
    "Weights & Biases": f"wandb_v1_{R40}",
    "Weights & Biases in an assignment": f"WANDB_API_KEY={random_text(40, '0123456789abcdef')}",
    "NVIDIA": f"nvapi-{random_text(64)}",
    "Replicate": "r8_" + random_text(37),
    "Groq": f"gsk_{random_text(52)}",
    "JSON Web Token": (
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
    ),
    "Bearer": f"Bearer {R20}",
    "Authorization header": f"Authorization: Basic {random_text(24)}==",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "Stripe": f"sk_live_{random_text(24)}",
    "SendGrid": f"SG.{random_text(22)}.{random_text(43)}",
    "PyPI": f"pypi-AgEIcHlwaS5vcmc{random_text(80)}",
    "password in an assignment": f"PGPASSWORD={PLANTED}",
}


@pytest.mark.parametrize("value", PLANTED_SHAPES.values(), ids=PLANTED_SHAPES)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [f"a {v} b"], lambda v: {"deep": [{"er": v}]}])
def test_values_of_secrets(value, wrap):
    with pytest.raises(UserError) as refused:
        refuse_secrets({"run_dir": wrap(value)}, "my.yaml")
    assert "my.yaml: run_dir" in str(refused.value)
    assert value not in str(refused.value)
    assert PLANTED not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/runs/a@b",
        "s3://bucket@region/run",
        "Qwen/Qwen2-7B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "http://host:8000/v1",
        "https://host/data.jsonl?download=true&rev=main",
        "a:b@c",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "D41D8CD98F00B204E9800998ECF8427E",
        "/mnt/nvme0/checkpoints/2026/11/28/run/model",
        "runs/Qwen2Instruct/Experiment1/Alpha15/Seed0",
        "SafetyAlignedModelOfTheSecondRunInNovember",
        "(q|k|v|o)_proj$",
        "prompts_of_the_token_budget",
        "tokenizer: own",
        "tokens_per_batch=16384000",
        "sk-learn",
        "risk-free-and-quite-long-name-of-a-run",
        "local_checkpoints/of_the_run_with_a_long_name",
        "fw_experiments_with_a_rather_long_name_of_a_run",
        "Bearer",
        "{{ messages[0]['content'] }} <|im_end|>",
    ],
)
def test_values_of_other_things(value):
    refuse_secrets({"run_dir": value, "n": 3, "none": None}, "my.yaml")


@pytest.mark.parametrize("name", ["sandbox", "qwen2-7b", "mistral-7b", "vicuna-7b", "tune-sandbox"])
def test_presets_hold_none(name):
    refuse_secrets(load_config(ROOT / "pipelines" / "configs" / f"{name}.yaml").model_dump(), name)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.text("abcdefghij/_-.", max_size=60))
def test_digests_and_paths_are_no_secrets(digest, path):
    """Of SHA-256, SHA-1 and MD5, alone and inside a path."""
    for length in (64, 40, 32):
        refuse_secrets({"x": digest.hex()[:length], "y": f"/{path}/{digest.hex()[:length]}/model"}, "here")


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
