"""Which network addresses a picture may be fetched from: public ones, and nothing else.

Pure. A request must not be able to make the gateway talk to its own machine, its network or a
cloud's metadata service, under any spelling of the address.
"""

from __future__ import annotations

import ipaddress

# Every other IPv6 range is local, reserved, or wraps an IPv4 address that would need its own check.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_WRAPPING = (
    ipaddress.ip_network("2001::/32"),  # Teredo
    ipaddress.ip_network("2002::/16"),  # 6to4
)


def is_public_address(text: str) -> bool:
    """Whether an address as the resolver prints it belongs to the public internet."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and not _is_plain_unicast(address):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_plain_unicast(address: ipaddress.IPv6Address) -> bool:
    return address in _GLOBAL_UNICAST and not any(address in network for network in _WRAPPING)
