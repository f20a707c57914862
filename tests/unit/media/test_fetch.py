"""No URL makes the gateway talk to anything but a listed host on the public internet."""

import httpx
import pytest

from shared.errors import RequestFailed
from shared.media.address import is_public_address
from shared.media.fetch import FetchPolicy, MediaFetcher

PUBLIC = "93.184.216.34"
ALLOWED = FetchPolicy(
    allowed_hosts=("ok.example", ".cdn.example", "alt.example:8443"), max_bytes=100, timeout_s=2.0
)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:53aa:64c:0:0:80ff:fffe",
        "2001:db8::1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "localhost",
        "x",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public_address(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_addresses_that_are(address):
    assert is_public_address(address)


class Network:
    """Answers by host, and remembers to which address each request went."""

    def __init__(self, answers=None, addresses=None):
        self.answers = answers or {}
        self.addresses = addresses or {}
        self.contacted: list[tuple[str, str, str]] = []
        self.lookups: list[str] = []

    async def resolve(self, host, port):
        self.lookups.append(host)
        found = self.addresses.get(host, [PUBLIC])
        return found.pop(0) if found and isinstance(found[0], list) else found

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.headers["host"]
        self.contacted.append((request.url.host, host, request.extensions["sni_hostname"]))
        return self.answers.get(host, httpx.Response(200, content=b"picture"))

    def fetcher(self, policy=ALLOWED) -> MediaFetcher:
        return MediaFetcher(policy, resolve=self.resolve, transport=httpx.MockTransport(self))


async def refused(network: Network, url: str, policy=ALLOWED) -> str:
    with pytest.raises(RequestFailed) as caught:
        await network.fetcher(policy).fetch(url)
    assert caught.value.kind == "bad_request"
    return caught.value.message


async def test_a_listed_host_is_fetched_from_the_address_that_was_checked():
    network = Network()
    assert await network.fetcher().fetch("https://ok.example/a.png") == b"picture"
    assert network.contacted == [(PUBLIC, "ok.example", "ok.example")]


async def test_subdomains_and_ports_only_where_listed():
    network = Network()
    assert await network.fetcher().fetch("http://a.cdn.example/x")
    assert await network.fetcher().fetch("https://alt.example:8443/x")
    for url in (
        "https://cdn.example/x",
        "https://alt.example/x",
        "https://ok.example:22/x",
        "https://evil-cdn.example/x",
        "https://x.ok.example/x",
        "https://ok.example.evil.org/x",
    ):
        assert "not allowed" in await refused(network, url)
    assert len(network.contacted) == 2


BATTERY = [
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost/",
    "http://metadata.google.internal/",
    "file:///etc/passwd",
    "ftp://ok.example/x",
    "gopher://ok.example/",
    "http:///x",
    "https://ok.example@127.0.0.1/",
    "https://user:secret@ok.example/",
    "http://ok.example%2f@127.1/",
    "//ok.example/x",
    "ok.example",
    "javascript:1",
    "http://ok.example:99999/",
    "http://[bad",
]


@pytest.mark.parametrize("url", BATTERY)
async def test_the_battery(url):
    network = Network(addresses={"localhost": ["127.0.0.1"]})
    await refused(network, url)
    assert network.contacted == []


@pytest.mark.parametrize("url", BATTERY)
async def test_an_address_literal_on_the_list_is_still_checked(url):
    host = httpx.URL("http://[::1]/").host if "[" in url else url.split("/")[2:3]
    policy = FetchPolicy(allowed_hosts=("127.0.0.1", "127.1", "2130706433", "::1", "localhost"))
    network = Network(addresses={"2130706433": ["127.0.0.1"], "127.1": ["127.0.0.1"]})
    network.addresses |= {h: [h] for h in ("127.0.0.1", "::1")} | {"localhost": ["::1"]}
    await refused(network, url, policy)
    assert network.contacted == [], host


async def test_nothing_is_allowed_by_default():
    network = Network()
    message = await refused(network, "https://ok.example/x", FetchPolicy())
    assert "data: URL" in message
    assert network.lookups == []


@pytest.mark.parametrize("inner", ["10.0.0.7", "169.254.169.254", "::1"])
async def test_one_private_address_among_several_is_enough(inner):
    network = Network(addresses={"ok.example": [PUBLIC, inner]})
    assert "public internet" in await refused(network, "https://ok.example/x")
    assert network.contacted == []


async def test_a_name_that_changes_its_address_is_looked_up_once():
    network = Network(addresses={"ok.example": [[PUBLIC], ["127.0.0.1"]]})
    await network.fetcher().fetch("https://ok.example/x")
    assert network.lookups == ["ok.example"]
    assert network.contacted[0][0] == PUBLIC


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "https://other.example/", "file:///etc/passwd", "//10.0.0.1/"]
)
async def test_a_redirect_is_checked_like_the_first_url(target):
    answer = httpx.Response(302, headers={"location": target})
    network = Network({"ok.example": answer})
    await refused(network, "https://ok.example/x")
    assert len(network.contacted) == 1


async def test_a_redirect_to_a_listed_host_is_followed_but_not_for_ever():
    there = httpx.Response(302, headers={"location": "https://a.cdn.example/y"})
    network = Network({"ok.example": there})
    assert await network.fetcher().fetch("https://ok.example/x") == b"picture"
    network.answers["a.cdn.example"] = httpx.Response(302, headers={"location": "/again"})
    assert "redirects" in await refused(network, "https://ok.example/x")


async def test_size_status_and_failures_are_refused():
    network = Network({"ok.example": httpx.Response(200, content=b"x" * 101)})
    assert "larger than the limit of 100" in await refused(network, "https://ok.example/x")
    network.answers["ok.example"] = httpx.Response(404)
    assert "status 404" in await refused(network, "https://ok.example/x")


async def test_a_slow_host_is_given_up():
    import asyncio

    async def never(host, port):
        await asyncio.sleep(60)

    policy = FetchPolicy(allowed_hosts=("ok.example",), timeout_s=0.05)
    fetcher = MediaFetcher(policy, resolve=never)
    with pytest.raises(RequestFailed, match=r"within 0.05 s"):
        await fetcher.fetch("https://ok.example/x")
    await fetcher.close()
