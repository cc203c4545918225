"""The token of Ray's clusters belongs to its owner alone, whoever made the file."""

from __future__ import annotations

import pytest

from bdpo.errors import UserError
from pipelines.runtime.cluster import protect_token


@pytest.fixture
def token_file(tmp_path, monkeypatch):
    """Where Ray looks for the token of a user without any."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def mode(file):
    return file.stat().st_mode & 0o777


def test_a_token_is_made_for_its_owner_alone_and_kept(token_file):
    protect_token()
    token = token_file.read_text()
    assert len(token) == 64
    assert mode(token_file) == 0o600
    protect_token()
    assert token_file.read_text() == token
    assert list(token_file.parent.iterdir()) == [token_file]


@pytest.mark.parametrize("named", [False, True])
def test_the_file_that_ray_made_loses_the_permissions_of_others(token_file, tmp_path, monkeypatch, named):
    if named:
        token_file = tmp_path / "elsewhere" / "token"
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
    token_file.parent.mkdir()
    token_file.write_text("theirs")
    token_file.chmod(0o644)
    protect_token()
    assert (token_file.read_text(), mode(token_file)) == ("theirs", 0o600)


@pytest.mark.parametrize(
    "variables",
    [{"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_AUTH_TOKEN": "given"}, {"RAY_AUTH_MODE": "disabled"}],
    ids=lambda variables: next(iter(variables)),
)
def test_no_token_is_made_for_a_cluster_that_has_one(token_file, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    protect_token()
    assert not token_file.exists()


def test_a_token_that_cannot_be_made_is_one_line(token_file):
    token_file.parent.write_text("a file where the folder should be")
    with pytest.raises(
        UserError, match=r"^~/\.ray/auth_token: Ray's token cannot be made \(.*RAY_AUTH_TOKEN_PATH$"
    ):
        protect_token()
