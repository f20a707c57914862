"""Routes and keys: who may do what, and how a refusal looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gateway.access import Access
from shared.runtime.access import AccessSettings

from .conftest import question

OPEN_PATHS = ("/health", "/metrics", "/ready")
CLIENT_PATHS = ("/v1/models", "/v1/models/demo", "/v1/traces/none")


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return keys(tmp_path, clients="client", operators="operator")


def keys(folder: Path, *, clients: str = "", operators: str = "") -> Access:
    files = {}
    for name, key in (("api_key_file", clients), ("operator_key_file", operators)):
        if key:
            files[name] = folder / name
            files[name].write_text(key)
    return Access.load(AccessSettings(**files))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_client_needs_a_key(start, access: Access) -> None:
    async with start(access=access) as system:
        for key, status in (("", 401), ("wrong", 401), ("client", 200), ("operator", 200)):
            headers = bearer(key) if key else {}
            response = await system.client.post(
                "/v1/chat/completions", json=question(), headers=headers
            )
            assert response.status_code == status, response.text
            for path in CLIENT_PATHS:
                response = await system.client.get(path, headers=headers)
                assert (response.status_code == 401) == (status == 401)
            for path in OPEN_PATHS:
                assert (await system.client.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic client", "missing_api_key"),
        ("Bearer client2", "invalid_api_key"),
    ],
)
async def test_a_refusal_has_openais_shape(
    start, access: Access, header: str | None, code: str
) -> None:
    async with start(access=access) as system:
        headers = {} if header is None else {"authorization": header}
        response = await system.client.post(
            "/v1/chat/completions", json=question(), headers=headers
        )
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert "client2" not in response.text
        await system.settle()
        assert not system.workers.requests


async def test_roles_are_for_operators(start, access: Access) -> None:
    async with start(access=access) as system:
        for key, status in (("client", 401), ("operator", 200)):
            response = await system.client.get("/v1/roles", headers=bearer(key))
            assert response.status_code == status
        body = {"role": "decode"}
        refused = await system.client.post("/v1/roles/x", json=body, headers=bearer("client"))
        assert refused.status_code == 401
        known = await system.client.post("/v1/roles/x", json=body, headers=bearer("operator"))
        assert known.json()["error"]["code"] == "unknown_worker"


async def test_where_clients_need_keys_roles_do_not_stay_open(start, tmp_path: Path) -> None:
    async with start(access=keys(tmp_path, clients="client")) as system:
        response = await system.client.get("/v1/roles", headers=bearer("client"))
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "no_operators"
        assert "--operator-key-file" in response.json()["error"]["message"]


async def test_operators_alone_leave_asking_open(start, tmp_path: Path) -> None:
    async with start(access=keys(tmp_path, operators="operator")) as system:
        assert (await system.post()).status_code == 200
        assert (await system.client.get("/v1/roles")).status_code == 401
