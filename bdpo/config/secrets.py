"""Secrets have no place in a config or a runtime_env: both are stored, shown in the dashboard and logged.

A secret is recognised by the name of its key, or by its value where that has a form of its own: by the rules
of detect-secrets (Yelp), and those that it lacks. Its rules for entropy and for names are left out: digests,
revisions and paths are no secrets. No message repeats the value, and nothing is asked of any service.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

from bdpo.errors import UserError

_WORDS = {"key", "token", "apikey", "pat", "passphrase", "authorization", "bearer"}
_PARTS = re.compile("secret|password|passwd|credential|private_?key")
# `api_key_env`, `RAY_AUTH_TOKEN_PATH`: the place of a secret is no secret
_PLACES = {"env", "path", "file", "dir"}

_RULES = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "basic_auth": "BasicAuthDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "private_key": "PrivateKeyDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
"""Modules of detect_secrets.plugins, and the rule in each."""

_FORMS = re.compile(
    r"\w://[^/\s@]*:[^/\s@]+@"  # scheme://user:password@host
    r"|\w://[^/\s@:]{20,}@"  # scheme://token@host
    r"|[?&][\w-]*(?:token|signature|secret|password|key|\bsig)[\w-]*=[^&\s]"  # a signed URL, an Azure SAS
    r"|\bgithub_pat_\w{20}|\bgh[pousr]_\w{20}"
    r"|\bhf_[A-Za-z0-9]{20}|\bapi_org_[A-Za-z0-9]{20}"  # Hugging Face
    r"|\bsk-[\w-]{20}"  # OpenAI, Anthropic, DeepSeek, OpenRouter
    r"|\bAIza[\w-]{35}|\bya29\.[\w-]{20}|\bGOCSPX-[\w-]{20}"  # Google
    r"|\bxapp-\d-[A-Z0-9]+-\d|\bxox[a-z]-[\w-]{20}"  # Slack
    r"|\bnvapi-[\w-]{30}|\b(?:pplx-|xai-|tgp_v1_)[A-Za-z0-9]{30}"  # NVIDIA, Perplexity, xAI, Together
    r"|\b(?:r8|gsk|wandb_v1)_[A-Za-z0-9]{30}"  # Replicate, Groq, Weights & Biases
    r"|\b(?:Account|SharedAccess)Key=[\w+/=]{20}"
    r"|\b(?:Bearer|Basic|Token)\s+[\w.~+/=-]{16}"  # of an HTTP header
    r"|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)

# A name and its value inside one text, as in an environment file
_ASSIGNMENT = re.compile(r"([A-Za-z][\w-]*)\s*[=:]\s*[\"']?[^\s\"'/,]{8}")

_AWS_SECRET = re.compile(r"(?<![\w+/])[A-Za-z0-9+/]{40}(?![\w+/=])")
_RANDOM = 4.5  # bits a character from which on 40 of base64 are a key and no path


def refuse_secrets(values: Any, source: str) -> None:
    """Raise a UserError that names the first key of nested plain values that holds a secret."""
    for key, why in _secrets(values, ""):
        raise UserError(
            f"{source}: {key} {why}; take it out: a secret is read from the environment or a file of the "
            "nodes, never from a config or a runtime_env, which are stored and shown"
        )


def _secrets(values: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            inside = f"{path}.{key}" if path else str(key)
            if looks_secret(str(key)) and value not in (None, "", False):
                yield inside, "looks like a secret"
            else:
                yield from _secrets(value, inside)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, path)
    elif isinstance(values, str) and is_secret(values):
        yield path, "holds a password or token"


def is_secret(value: str) -> bool:
    """Whether a text has the form of a password or token, or holds one."""
    return (
        _FORMS.search(value) is not None
        or any(looks_secret(found[1]) for found in _ASSIGNMENT.finditer(value))
        or any(_is_random(found[0]) for found in _AWS_SECRET.finditer(value))
        or any(any(True for _ in rule.analyze_string(value)) for rule in _rules())
    )


@cache
def _rules() -> list[Any]:
    return [getattr(import_module(f"detect_secrets.plugins.{name}"), rule)() for name, rule in _RULES.items()]


def _is_random(text: str) -> bool:
    """Letters of both cases and digits without order; a hexadecimal digest has one case."""
    mixed = all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    counts = Counter(text).values()
    return mixed and -sum(n / len(text) * math.log2(n / len(text)) for n in counts) > _RANDOM


def looks_secret(key: str) -> bool:
    """Whether a key of this name would hold a secret: `HF_TOKEN` does, `tokens_per_batch` does not."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = re.split(r"[^a-z0-9]+", name)
    return words[-1] not in _PLACES and (bool(_WORDS & set(words)) or bool(_PARTS.search(name)))
