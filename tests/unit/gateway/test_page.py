"""The page's files as they are served: types, caching, and a policy that lets nothing in from elsewhere."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
from tests.gateways import Gateway

from gateway.api import page

ABSOLUTE = re.compile(r"""(?:src|href)\s*=\s*["'](?!#|web/)|url\(|https?://(?!www\.w3\.org/)|@import""")
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\.srcdoc")


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


async def test_the_page_is_at_the_root(gateway: Gateway) -> None:
    answer = await gateway.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>vidgen</title>" in answer.text


@pytest.mark.parametrize(("name", "kind"), [("main.js", "text/javascript"), ("page.css", "text/css")])
async def test_each_part_has_its_own_type_and_is_not_sniffed(gateway: Gateway, name: str, kind: str) -> None:
    answer = await gateway.client.get(f"/web/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_what_did_not_change_is_not_sent_again(gateway: Gateway) -> None:
    first = await gateway.client.get("/web/main.js")
    again = await gateway.client.get("/web/main.js", headers={"If-None-Match": f'W/{first.headers["etag"]}, "other"'})
    other = await gateway.client.get("/web/main.js", headers={"If-None-Match": '"other"'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert (other.status_code, other.content) == (200, first.content)
    assert first.headers["cache-control"] == "no-cache"


async def test_head_tells_the_size_and_sends_nothing(gateway: Gateway) -> None:
    whole, head = await gateway.client.get("/"), await gateway.client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)


@pytest.mark.parametrize("name", ["nothing.js", "..%2F..%2Fmain.py", "__init__.py"])
async def test_nothing_else_is_served(gateway: Gateway, name: str) -> None:
    answer = await gateway.client.get(f"/web/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "no_such_address")


async def test_the_policy_allows_scripts_and_styles_of_this_origin_alone(gateway: Gateway) -> None:
    policy = (await gateway.client.get("/")).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["media-src"] == rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy


async def test_the_documentation_loads_nothing_from_elsewhere(gateway: Gateway) -> None:
    answer = await gateway.client.get("/docs")
    named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert {"web/swagger-ui-bundle.js", "web/swagger-ui.css", "web/docs.js"} <= set(named)
    for name in named:
        assert (await gateway.client.get(f"/{name}")).status_code == 200
    policy = answer.headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["script-src"], rules["connect-src"]) == ("'none'", "'self'", "'self'")
    assert not re.search(r"https?:|\*", policy)


@pytest.mark.parametrize("address", ["/redoc", "/docs/oauth2-redirect", "/web/redoc.standalone.js"])
async def test_no_other_documentation_is_served(gateway: Gateway, address: str) -> None:
    assert (await gateway.client.get(address)).status_code == 404


@pytest.mark.parametrize("name", sorted(page.files()))
def test_no_part_names_another_origin_or_writes_markup(name: str) -> None:
    text = page.files()[name].body.decode()
    assert ABSOLUTE.findall(text) == []
    assert MARKUP.findall(text) == []
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", text) == []


def test_every_module_and_file_that_is_named_exists() -> None:
    for name, file in page.files().items():
        text = file.body.decode()
        if name.endswith(".js"):
            named = set(re.findall(r'from "\./([\w.-]+)"', text))
        else:
            named = set(re.findall(r'(?:src|href)="web/([\w.-]+)"', text))
        assert named <= {*page.files(), *page.swagger_ui()}, name
