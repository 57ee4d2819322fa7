"""The address pools of the plugin host-local: how large they are by the configuration, how much is leased on disk.

Flows in: a plugin's configuration, the names of the files in `DATADIR/NETWORK/`, Flannel's subnet file. Flows out:
sizes and counts. Rules: containernetworking/plugins, plugins/ipam/host-local/backend: allocator/config.go
(LoadIPAMConfig), range.go (Canonicalize, lastIP), allocator.go (Next passes over the range's gateway), disk/backend.go
(a file per lease, named by its address); flannel-io/cni-plugin: flannel.go (loadFlannelSubnetEnv), flannel_linux.go.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from exporter.monitors.cni_config.reading import content

DATA_DIRECTORY = "/var/lib/cni/networks"
SUBNET_FILE = "/run/flannel/subnet.env"
_MOST_SETS, _MOST_RANGES = 16, 64
_MOST_FILES = 1 << 18
"""Names that are looked at in a directory of leases: four times the largest IPv4 pool that kubelets are given."""


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses from first to last, in network byte order, so that those of one family compare as they count."""

    first: bytes
    last: bytes
    gateway: bytes
    subnet: str

    @property
    def size(self) -> int:
        """How many addresses may be given out: the gateway's own is passed over."""
        count = int.from_bytes(self.last) - int.from_bytes(self.first) + 1
        return count - (self.first <= self.gateway <= self.last)

    def holds(self, address: bytes) -> bool:
        """Whether it lies within."""
        return len(address) == len(self.first) and self.first <= address <= self.last


@dataclass(frozen=True, slots=True)
class Pool:
    """A set of ranges, out of which a container gets one address."""

    network: str
    directory: str
    """Where the leases are."""
    ranges: tuple[Range, ...]
    subnet_file: str = ""
    """Where Flannel writes the ranges, when it knows them."""

    @property
    def size(self) -> int:
        """Addresses in all."""
        return sum(one.size for one in self.ranges)

    @property
    def subnets(self) -> str:
        """What tells the pool from others of its network."""
        return ",".join(one.subnet for one in self.ranges)

    def used(self) -> int:
        """Count the leases. Raises OSError where they cannot be listed; a directory that is not there has none."""
        try:
            with os.scandir(self.directory) as entries:
                return sum(self._holds(entry.name) for entry in islice(entries, _MOST_FILES))
        except FileNotFoundError:
            return 0

    def known(self) -> list["Pool"]:
        """Give the pools that there are now: this one, or those of the subnet file. Raises OSError, ValueError."""
        if not self.subnet_file:
            return [self]
        found = []
        for line in content(self.subnet_file)[1].decode("ascii", "replace").splitlines():
            name, _, value = line.partition("=")
            if name in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"):
                network = ipaddress.ip_network(value, strict=False)  # it is written with the bridge's address
                found.append(Pool(self.network, self.directory, (_range({"subnet": str(network)}),)))
        return found

    def _holds(self, name: str) -> bool:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        try:
            address = socket.inet_pton(family, name)
        except (OSError, ValueError):  # the lock, last_reserved_ip.N
            return False
        return any(one.holds(address) for one in self.ranges)


def pools(network: str, plugin: Mapping[str, Any]) -> list[Pool]:
    """Give the pools of a plugin's `ipam`; none where it is not host-local's, or is filled in only at run time."""
    flannel = plugin.get("type") == "flannel"
    ipam = plugin.get("ipam") or {}
    if not isinstance(ipam, dict) or ipam.get("type", "host-local" if flannel else "") != "host-local":
        return []
    parent = ipam.get("dataDir") or DATA_DIRECTORY
    if not _is_path(parent):
        return []
    directory = f"{parent}/{network}"
    if flannel:
        subnet_file = plugin.get("subnetFile") or SUBNET_FILE
        return [Pool(network, directory, (), subnet_file)] if _is_path(subnet_file) else []
    sets = ipam.get("ranges") or []
    if not isinstance(sets, list):
        return []
    if ipam.get("subnet"):
        sets = [[ipam], *sets]
    found = [_ranges(ranges) for ranges in sets[:_MOST_SETS]]
    return [Pool(network, directory, ranges) for ranges in found if ranges]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith("/") and "\0" not in value


def _ranges(entries: object) -> tuple[Range, ...]:
    """Read a set; empty where host-local would refuse it."""
    if not isinstance(entries, list):
        return ()
    try:
        return tuple(_range(entry) for entry in entries[:_MOST_RANGES])
    except (KeyError, TypeError, ValueError):
        return ()


def _range(entry: Mapping[str, Any]) -> Range:
    """Fill in what is not said: from the first address behind the network's to the last (IPv4: before broadcast)."""
    network = ipaddress.ip_network(entry["subnet"])
    if network.prefixlen > network.max_prefixlen - 2:
        raise ValueError("too small")
    given = {
        name: ipaddress.ip_address(entry[name]) for name in ("rangeStart", "rangeEnd", "gateway") if entry.get(name)
    }
    for name in ("rangeStart", "rangeEnd"):
        if name in given and given[name] not in network:
            raise ValueError("outside of the subnet")
    first = given.get("rangeStart", network[1])
    last = given.get("rangeEnd", network[-2] if network.version == 4 else network[-1])  # noqa: PLR2004 - IPv4
    gateway = given.get("gateway", network[1])
    if first > last:  # type: ignore[operator] # both are of the subnet's family
        raise ValueError("ends before it begins")
    return Range(first.packed, last.packed, gateway.packed, str(network))
