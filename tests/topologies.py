"""Families of an imagined node with any number of containers, for tests of topology and page.

Flows in: how many containers, how many seconds after the first reading. Flows out: a reader like the store's.
"""

import random
from collections import defaultdict
from collections.abc import Mapping

from exporter.topology import Read

NOW = 1e9
"""The moment, in Unix seconds, to which the monitors' times refer."""
HOSTILE = "<script>window.hacked=1</script>\"'&\x1b[2J\ud800\u202e<img src=x onerror=window.hacked=1>"
_LONG = "payment-reconciliation-worker-with-a-name-of-sixty-three-signs"


class Families:
    """Series by family name."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)

    def put(self, family: str, value: float, /, **labels: str) -> None:
        self.series[family].append((labels, float(value)))

    def read(self, family: str) -> list[tuple[Mapping[str, str], float]]:
        return self.series.get(family, [])


def families(count: int, *, seconds: float = 0.0, hostile: bool = False) -> Read:
    """Give the families of a node with `count` workloads (pods and containers mixed), `seconds` after the first call.

    One in eleven has no host side, one device in seven hundred no bridge; with any, one device is orphaned.
    """
    chance = random.Random(count)  # noqa: S311 - the same node each time
    made = Families()
    made.put("cni_netns_info", 1, netns="4026531840", pinned="false", namespace="", pod="", container="(host)")
    if count:
        made.put("cni_netns_receive_bytes_total", 1e9 * (1 + seconds), interface="ens3", container="(host)")
    for number in range(count):
        _workload(made, number, chance, seconds, hostile=hostile)
    if count:
        made.put(
            "cni_veth_info",
            1,
            device="vethdead001",
            ifindex="9001",
            peer_ifindex="2",
            netns="",
            bridge="docker0",
            kind="veth",
        )
        made.put("cni_containers", 3, runtime="docker", state="exited")
    made.put("cni_containers", count - count // 3, runtime="docker", state="running")
    made.put("cni_containers", count // 3, runtime="containerd", state="running")
    _monitors(made)
    made.put("cni_exporter_series_held", 4 if count == 25 else 0)
    made.put("cni_exporter_series_dropped_total", 120 if count == 300 else 0, family="cni_veth_receive_bytes_total")
    return made.read


def _workload(made: Families, number: int, chance: random.Random, seconds: float, *, hostile: bool) -> None:
    netns, pod = str(4026532000 + number), number % 3 == 0
    labels, bridge = _names(number, chance, hostile=hostile)
    made.put("cni_netns_info", 1, netns=netns, pinned=str(pod).lower(), **labels)
    made.put("cni_netns_members", 2 if pod else 1, netns=netns)
    image = HOSTILE if hostile else "registry.example.com/platform/service:2026.11.3"
    if pod:
        made.put(
            "cni_container_info",
            1,
            container_id=f"s{number}",
            **labels,
            image="pause:3.9",
            runtime="containerd",
            netns=netns,
        )
        for name in ("app", "istio-proxy"):
            inside = labels | {"container": name}
            made.put(
                "cni_container_info",
                1,
                container_id=f"{name}{number}",
                **inside,
                image=image,
                runtime="containerd",
                netns="",
            )
    else:
        made.put(
            "cni_container_info", 1, container_id=f"c{number}", **labels, image=image, runtime="docker", netns=netns
        )
    device = f"veth{chance.randrange(16**7):07x}"
    rate = 10 ** chance.uniform(0, 6.5)
    direct = number % 11 == 10
    where = {"interface": "eth0"} if direct else {"device": device}
    if not direct:
        index = str(10 + number)
        made.put(
            "cni_veth_info", 1, device=device, ifindex=index, peer_ifindex="2", netns=netns, bridge=bridge, kind="veth"
        )
    family = "cni_netns" if direct else "cni_veth"
    for way, share in (("receive", 1.0), ("transmit", 0.3)):
        made.put(f"{family}_{way}_bytes_total", rate * (5000 + seconds) * share, **where, **labels)
        made.put(f"{family}_{way}_packets_total", rate * (5000 + seconds) * share / 700, **where, **labels)
        made.put(f"{family}_{way}_dropped_total", 12 + 3 * seconds if number % 13 == 3 else 0, **where, **labels)
        made.put(f"{family}_{way}_errors_total", 2 if number % 29 == 4 else 0, **where, **labels)


def _names(number: int, chance: random.Random, *, hostile: bool) -> tuple[dict[str, str], str]:
    if hostile:
        return {"namespace": "", "pod": "", "container": f"{HOSTILE}{number}"}, f"<b>{HOSTILE[:20]}"
    if number % 3:
        name = f"{chance.choice(['web', 'redis', 'postgres', 'worker'])}-{number}"
        bridge = "" if number == 7 else "docker0" if number % 3 == 1 else "br-4f2a91c07d3e"
        return {"namespace": "", "pod": "", "container": name}, bridge
    pod = (
        f"cart-{chance.randrange(16**10):010x}-{chance.randrange(16**5):05x}"
        if number % 4
        else f"p{number}-{_LONG}"[:63]
    )
    return {"namespace": "shop" if number % 2 else "observability-and-tracing", "pod": pod, "container": ""}, "cni0"


def _monitors(made: Families) -> None:
    refused = "/run/containerd/containerd.sock: permission denied; run as root or join the socket's group"
    for name, mode, reason in (
        ("links", "netlink", ""),
        ("docker", "api", ""),
        ("cri", "down", refused),
        ("cgroup", "scan", "inotify is not allowed here"),
        ("crio", "absent", "no socket at /run/crio/crio.sock"),
    ):
        late = name == "cri"
        made.put("cni_exporter_monitor_mode_info", 1, monitor=name, mode=mode, reason=reason)
        made.put("cni_exporter_monitor_fallback", name == "cgroup", monitor=name)
        made.put("cni_exporter_monitor_circuit_open", late, monitor=name)
        if mode != "absent":
            made.put("cni_exporter_monitor_up", not late, monitor=name)
            age = 400 if late else 1.2
            made.put("cni_exporter_monitor_last_update_timestamp_seconds", NOW - age, monitor=name)
