"""Topology: the tree that follows from families, rates between readings, and both renderings."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topologies import HOSTILE, Families, families

from exporter import topology
from exporter.topology import Rates, Topology, Workload, as_json, as_text, build
from exporter.traffic import Traffic, quantity


def veth(made: Families, device: str, netns: str = "", bridge: str = "docker0", index: int = 10, peer: int = 2) -> None:
    made.put(
        "cni_veth_info",
        1,
        device=device,
        ifindex=str(index),
        peer_ifindex=str(peer),
        netns=netns,
        bridge=bridge,
        kind="veth",
    )


def netns(
    made: Families, inode: str, container: str = "", *, pod: str = "", pinned: bool = False, members: int = 1
) -> None:
    labels = {"namespace": "shop" if pod else "", "pod": pod, "container": container}
    made.put("cni_netns_info", 1, netns=inode, pinned=str(pinned).lower(), **labels)
    made.put("cni_netns_members", members, netns=inode)


def received(made: Families, device: str, value: float) -> None:
    made.put("cni_veth_receive_bytes_total", value, device=device, namespace="", pod="", container="web")


def states(built: Topology) -> dict[str, str]:
    return {link.device: link.state for link in built.links}


# The tree


def test_a_docker_container_is_behind_its_veth() -> None:
    """Bridge, veth, container, image and counters of one container come together."""
    made = Families()
    veth(made, "veth1", "401")
    netns(made, "401", "web")
    made.put(
        "cni_container_info",
        1,
        container_id="c1",
        namespace="",
        pod="",
        container="web",
        image="nginx:1",
        runtime="docker",
        netns="401",
    )
    received(made, "veth1", 7)
    made.put("cni_veth_transmit_dropped_total", 3, device="veth1", namespace="", pod="", container="web")
    (bridge,) = build(made.read, "n").bridges
    (link,) = bridge.links
    assert (bridge.name, link.device, link.state, link.title) == ("docker0", "veth1", "attached", "web")
    assert link.workload is not None
    assert link.workload.detail == "nginx:1"
    assert (link.traffic.receive_bytes, link.traffic.dropped, link.remark) == (7, 3, "3 dropped")


def test_a_pod_shows_its_containers_and_not_its_sandbox() -> None:
    """The sandbox carries the namespace's inode, the pod's containers are found by the pod's name."""
    made = Families()
    veth(made, "veth1", "401", "cni0")
    netns(made, "401", pod="cart-1", pinned=True, members=3)
    for container, inode in (("", "401"), ("app", ""), ("proxy", "")):
        made.put(
            "cni_container_info",
            1,
            container_id=f"c-{container}",
            namespace="shop",
            pod="cart-1",
            container=container,
            image="i",
            runtime="containerd",
            netns=inode,
        )
    (link,) = build(made.read, "n").links
    assert link.title == "shop/cart-1"
    assert link.workload is not None
    assert link.workload.detail == "app, proxy"
    assert link.workload.members == 3


def test_a_veth_without_a_namespace_is_orphaned() -> None:
    """No known namespace behind a veth, or one that a bind mount alone keeps: no live process."""
    made = Families()
    veth(made, "veth1")
    veth(made, "veth2", "402")
    netns(made, "402", pinned=True, members=0)
    assert states(build(made.read, "n")) == {"veth1": "orphaned", "veth2": "orphaned"}


def test_no_veth_is_called_orphaned_where_the_monitor_counts_none() -> None:
    """A named namespace with a process that is in no container looks alike; the count of orphans tells."""
    made = Families()
    veth(made, "veth2", "402")
    netns(made, "402", pinned=True, members=0)
    made.put("cni_veths", 0, state="orphaned")
    assert states(build(made.read, "n")) == {"veth2": "attached"}


def test_a_namespace_whose_name_is_not_known_yet_is_no_orphan() -> None:
    """While the store holds a namespace's names back, its veth is attached to an unknown workload."""
    made = Families()
    veth(made, "veth1", "401")
    (link,) = build(made.read, "n").links
    assert (link.state, link.title) == ("attached", "unknown")
    assert link.workload is not None
    assert link.workload.detail == "network namespace 401"


def test_a_pair_on_the_host_is_no_orphan() -> None:
    """Two host devices that are each other's peers, or a namespace that is the host's own, are state `host`."""
    made = Families()
    veth(made, "a", index=10, peer=11)
    veth(made, "b", index=11, peer=10)
    veth(made, "c", "1", index=12, peer=13)
    netns(made, "1", "(host)")
    assert set(states(build(made.read, "n")).values()) == {"host"}


def test_interfaces_without_a_host_side_hang_below_their_workload() -> None:
    """A macvlan interface is listed as direct, with its workload; the host's own are the host network."""
    made = Families()
    netns(made, "401", "web")
    netns(made, "1", "(host)")
    made.put("cni_netns_receive_bytes_total", 5, interface="eth0", namespace="", pod="", container="web")
    made.put("cni_netns_receive_bytes_total", 9, interface="ens3", namespace="", pod="", container="(host)")
    built = build(made.read, "n")
    assert [(link.device, link.state, link.title, link.netns) for link in built.direct] == [
        ("ens3", "direct", "host network", "1"),
        ("eth0", "direct", "web", "401"),
    ]
    assert built.bridges == ()


def test_names_that_several_namespaces_share_are_not_guessed() -> None:
    """Where two namespaces are unknown alike, an interface is not put into one of them."""
    made = Families()
    netns(made, "401")
    netns(made, "402")
    made.put("cni_netns_receive_bytes_total", 5, interface="eth0", namespace="", pod="", container="")
    (link,) = build(made.read, "n").direct
    assert link.netns == ""


def test_a_workload_without_interfaces_is_not_lost() -> None:
    """A container without a network is listed apart."""
    made = Families()
    netns(made, "401", "offline")
    assert [workload.title for workload in build(made.read, "n").unlinked] == ["offline"]


def test_bridges_and_links_have_a_stable_order() -> None:
    """By name, numbers as numbers, links without a bridge last."""
    made = Families()
    for number, bridge in enumerate(("", "br1", "br0", "br0", "br0")):
        veth(made, f"veth{number}", str(number), bridge)
        netns(made, str(number), f"web-{10 - number * 2}")
    built = build(made.read, "n")
    assert [bridge.name for bridge in built.bridges] == ["br0", "br1", ""]
    assert [link.title for link in built.bridges[0].links] == ["web-2", "web-4", "web-6"]


def test_the_drawing_is_bounded_and_keeps_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the limit, orphans stay, then trouble, then traffic; the rest is counted."""
    monkeypatch.setattr(topology, "LINK_LIMIT", 3)
    made = Families()
    for number in range(10):
        veth(made, f"veth{number}", str(400 + number))
        netns(made, str(400 + number), f"c{number}")
        received(made, f"veth{number}", number)
    made.put("cni_veth_receive_errors_total", 1, device="veth0", namespace="", pod="", container="")
    veth(made, "dead")
    built = build(made.read, "n")
    assert {link.device for link in built.links} == {"dead", "veth0", "veth9"}
    assert built.omitted == 8


def test_an_empty_node_is_an_empty_tree() -> None:
    """Nothing observed is an answer, not an error."""
    built = build(lambda _: (), "n")
    assert built == Topology("n")
    assert as_text(built) == "n: no container interfaces"


# Rates


def test_rates_are_differences_over_the_time_between() -> None:
    """500 bytes more after ten seconds are 50 bytes per second; the span is told."""
    now = [100.0]
    rates = Rates(lambda: now[0])
    assert rates.take({("veth", "a"): Traffic(1000)}) == ({}, 0.0)
    now[0] = 110.0
    assert rates.take({("veth", "a"): Traffic(1500)}) == ({("veth", "a"): Traffic(50)}, 10.0)


def test_readings_in_quick_succession_share_their_rates() -> None:
    """Within a second of the last reading its rates are given again, and it stays the base of the next ones."""
    now = [0.0]
    rates = Rates(lambda: now[0])
    rates.take({("veth", "a"): Traffic(0)})
    now[0] = 10.0
    first = rates.take({("veth", "a"): Traffic(100)})
    now[0] = 10.9
    assert rates.take({("veth", "a"): Traffic(900)}) == first
    now[0] = 20.0
    assert rates.take({("veth", "a"): Traffic(200)}) == ({("veth", "a"): Traffic(10)}, 10.0)


def test_a_new_device_and_one_that_began_anew_have_no_rate() -> None:
    """A counter that went back is another device under the same name."""
    now = [0.0]
    rates = Rates(lambda: now[0])
    rates.take({("veth", "a"): Traffic(100, 5)})
    now[0] = 1.0
    assert rates.take({("veth", "a"): Traffic(101, 4), ("veth", "b"): Traffic(7)})[0] == {}


def test_rates_remember_a_bounded_number_of_links() -> None:
    """Links over the limit have no rate; memory does not grow with them."""
    now = [0.0]
    rates = Rates(lambda: now[0], limit=2)
    reading = {("veth", str(number)): Traffic(1) for number in range(5)}
    rates.take(reading)
    now[0] = 1.0
    assert len(rates.take(reading)[0]) == 2


def test_build_gives_each_link_its_rate() -> None:
    """Device and hostless interface alike."""
    now = [0.0]
    rates = Rates(lambda: now[0])
    rates.update(families(25))
    now[0] = 10.0
    built = build(families(25, seconds=10), "n", rates)
    assert built.seconds == 10.0
    for link in built.links:
        assert link.state == "orphaned" or (link.rate is not None and link.rate.receive_bytes > 0)


def test_a_state_that_the_monitor_tells_is_taken() -> None:
    """Where the families say a veth's state, nothing is inferred."""
    made = Families()
    made.put("cni_veth_info", 1, device="veth1", netns="401", state="orphaned")
    assert states(build(made.read, "n")) == {"veth1": "orphaned"}


# Renderings


@pytest.mark.parametrize("width", [10, 60, 80, 120, 200])
@pytest.mark.parametrize("count", [0, 3, 25, 300])
def test_text_fits_the_terminal(count: int, width: int) -> None:
    """No line is longer than the terminal (60 at least); every device is in it where the width allows."""
    text = as_text(build(families(count), "node"), width)
    assert max(map(len, text.splitlines())) <= max(width, 60)
    if width >= 80 and count:
        assert "vethdead001" in text
        assert "orphaned" in text


def test_text_is_a_tree_with_aligned_columns() -> None:
    """Stems join up, and the numbers stand below their head."""
    made = Families()
    for number in range(2):
        veth(made, f"veth{number}", str(number))
        netns(made, str(number), f"web-{number}")
        received(made, f"veth{number}", 1500)
    made.put("cni_netns_receive_bytes_total", 5, interface="eth0", namespace="", pod="", container="web-1")
    assert as_text(build(made.read, "n"), 80).splitlines() == [
        "n: 1 bridge, 2 veths, 1 interface",
        "DEVICE           WORKLOAD  RECEIVED  SENT  REMARK",
        "├─ docker0",
        "│  ├─ veth0      web-0       1.5 kB   0 B",
        "│  └─ veth1      web-1       1.5 kB   0 B",
        "└─ no host side",
        "   └─ eth0       web-1          5 B   0 B",
    ]


def test_hostile_names_cannot_drive_a_terminal() -> None:
    """Escape sequences, line breaks and direction marks in names do not reach the terminal."""
    text = as_text(build(families(10, hostile=True), "n"), 200)
    assert all(line.isprintable() for line in text.splitlines())
    assert "\x1b" not in text
    text.encode()


def test_json_holds_everything_as_plain_data() -> None:
    """The dictionary survives JSON, names its counters, and has null for a rate that is not known."""
    plain = json.loads(json.dumps(as_json(build(families(25), "n"))))
    links = [link for bridge in plain["bridges"] for link in bridge["links"]] + plain["direct"]
    assert len(links) == 27
    assert plain["node"] == "n"
    assert all(set(link["traffic"]) == set(Traffic._fields) for link in links)
    assert {link["rate"] for link in links} == {None}


@given(
    st.dictionaries(st.sampled_from(["device", "ifindex", "peer_ifindex", "netns", "bridge", "container"]), st.text())
)
def test_odd_labels_break_nothing(labels: dict[str, str]) -> None:
    """Whatever labels a series has or lacks, a topology is built and drawn."""
    built = build(lambda _: [(labels, 1.0)], HOSTILE)
    assert as_text(built)
    assert json.dumps(as_json(built))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (0.01, "B/s", "<0.1 B/s"),
        (0.5, "B/s", "0.5 B/s"),
        (7, "", "7"),
        (999.4, "B", "999 B"),
        (999.6, "B", "1.0 kB"),
        (12345, "", "12k"),
        (1.5e6, "B/s", "1.5 MB/s"),
        (9.96e6, "B", "10 MB"),
        (2**64, "B", "18447 PB"),
    ],
)
def test_quantities_read_well(value: float, unit: str, text: str) -> None:
    """Three digits or less, with a decimal prefix."""
    assert quantity(value, unit) == text


@given(st.floats(0, 1e17))
def test_quantities_are_near_the_value(value: float) -> None:
    """What is written differs by no more than its last digit."""
    text = quantity(value)
    if not text.startswith("<"):
        factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1)
        assert math.isclose(float(text.rstrip("kMGTP")) * factor, value, rel_tol=0.06, abs_tol=0.06)


@pytest.mark.parametrize(
    ("workload", "title"),
    [
        (Workload("shop", "cart"), "shop/cart"),
        (Workload("", "cart"), "cart"),
        (Workload(container="web"), "web"),
        (Workload(container="(host)"), "host network"),
        (Workload(), "unknown"),
    ],
)
def test_workloads_are_called_as_people_call_them(workload: Workload, title: str) -> None:
    """Pod before container, the host by name, and the unknown as such."""
    assert workload.title == title
