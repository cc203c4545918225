"""A small evaluation of IAM policies: as much of AWS's rules as the policies of deploy/aws.yaml use.

Source: IAM User Guide, "Policy evaluation logic" and "IAM JSON policy elements: Condition operators". moto
evaluates no conditions, which are what these policies rest on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

KNOWN = {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}


def is_allowed(
    statements: Iterable[Mapping[str, Any]], action: str, resource: str, context: Mapping[str, str]
) -> bool:
    """Whether one request is allowed: some statement allows it and none denies it.

    Args:
        statements: of all policies that apply.
        action: as `ec2:CreateTags`.
        resource: the ARN of one resource.
        context: condition key -> its value in the request; a key that is not there matches nothing.

    Raises:
        ValueError: a statement has an element or a condition that this evaluation does not know.
    """
    effects = {s["Effect"] for s in statements if _applies(s, action, resource, context)}
    return effects == {"Allow"}


def _applies(statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]) -> bool:
    if unknown := statement.keys() - KNOWN:
        raise ValueError(f"unknown elements of a statement: {sorted(unknown)}")
    return (
        any(fnmatchcase(action.lower(), pattern.lower()) for pattern in _listed(statement["Action"]))
        and any(fnmatchcase(resource, pattern) for pattern in _listed(statement["Resource"]))
        and all(_holds(*condition, context) for condition in statement.get("Condition", {}).items())
    )


def _holds(operator: str, expected: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    if operator not in ("StringEquals", "Bool"):
        raise ValueError(f"unknown operator of a condition: {operator}")
    return all(context.get(key) in _listed(values) for key, values in expected.items())


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
