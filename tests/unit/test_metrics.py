"""The family store: joins, sums, caps, redaction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.catalog import FAMILIES, HOST
from exporter.metrics import Policy, Store

BYTES = "cni_veth_receive_bytes_total"
RESETS = "cni_netns_tcp_resets_sent_total"
STATES = "cni_netns_tcp_connections"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Store:
    return Store(Policy(grace=2.0), clock=clock)


def netns(store: Store, *rows: tuple[str, str]) -> None:
    """List namespaces as (identity, owning container)."""
    keys = {(netns_id, owner, netns_id.partition(":")[0], "false"): 1.0 for netns_id, owner in rows}
    store.owned("links").replace({"cni_netns_info": keys})


def containers(store: Store, *rows: tuple[str, str, str, str]) -> None:
    """List containers as (id, namespace, pod, container)."""
    store.owned("runtimes").replace({"cni_container_info": {(*row, "image", "docker"): 1.0 for row in rows}})


def test_a_veth_carries_the_name_of_the_container_behind_it(store: Store) -> None:
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "", "", "web"))
    store.owned("links").replace({BYTES: {("11:7", "veth0"): 5.0}})
    assert store.read(BYTES) == [({"device": "veth0", "namespace": "", "pod": "", "container": "web"}, 5.0)]


def test_a_pods_network_belongs_to_the_pod(store: Store) -> None:
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "shop", "cart-1", "app"))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS) == [({"namespace": "shop", "pod": "cart-1", "container": ""}, 1.0)]


def test_the_hosts_namespace_is_named_so(store: Store) -> None:
    netns(store, ("11:7", HOST))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS)[0][0]["container"] == "(host)"


def test_a_series_waits_for_its_name_and_then_keeps_it(store: Store, clock: Clock) -> None:
    netns(store, ("11:7", "c1"))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS) == []
    clock.now += 1
    containers(store, ("c1", "", "", "web"))
    assert store.read(RESETS)[0][0]["container"] == "web"
    containers(store, ("c1", "", "", "renamed"))
    assert store.read(RESETS)[0][0]["container"] == "web"
    containers(store)
    assert store.read(RESETS)[0][0]["container"] == "web"


def test_after_the_grace_an_unnamed_container_is_told_by_its_short_id_for_good(store: Store, clock: Clock) -> None:
    netns(store, ("11:7", "0123456789abcdef"))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS) == []
    clock.now += 2
    assert store.read(RESETS)[0][0]["container"] == "0123456789ab"
    containers(store, ("0123456789abcdef", "", "", "late"))
    assert store.read(RESETS)[0][0]["container"] == "0123456789ab"


def test_a_namespace_without_owner_is_unknown_until_it_has_one(store: Store, clock: Clock) -> None:
    netns(store, ("11:7", ""))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS) == []
    clock.now += 2
    assert store.read(RESETS) == [({"namespace": "", "pod": "", "container": ""}, 1.0)]
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "", "", "web"))
    assert store.read(RESETS) == [({"namespace": "", "pod": "", "container": "web"}, 1.0)]


def test_a_reused_inode_is_another_namespace(store: Store) -> None:
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "", "", "old"), ("c2", "", "", "new"))
    store.owned("links").replace({RESETS: {("11:7",): 9.0}})
    assert store.read(RESETS)[0][0]["container"] == "old"
    netns(store, ("11:8", "c2"))
    store.owned("links").replace({RESETS: {("11:8",): 1.0}})
    assert store.read(RESETS) == [({"namespace": "", "pod": "", "container": "new"}, 1.0)]


def test_what_is_gone_is_gone_at_once(store: Store) -> None:
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "", "", "web"))
    store.owned("links").replace({BYTES: {("11:7", "veth0"): 5.0}})
    assert store.read(BYTES)
    store.owned("links").replace({BYTES: {}})
    assert store.read(BYTES) == []


def test_a_container_that_is_gone_takes_every_monitors_series_along(store: Store) -> None:
    """Another monitor may still list it for a while; its name is no longer anybody's."""
    containers(store, ("c1", "", "", "web"))
    store.owned("namespaces").replace({"cni_container_processes": {("c1",): 3.0}})
    assert store.read("cni_container_processes")
    containers(store)
    assert store.read("cni_container_processes") == []


def test_two_namespaces_of_one_name_are_summed_and_never_go_backwards(store: Store) -> None:
    containers(store, ("c1", "", "", "web"), ("c2", "", "", "web"))
    netns(store, ("11:7", "c1"), ("12:8", "c2"))
    links = store.owned("links")
    links.replace(
        {
            RESETS: {("11:7",): 40.0, ("12:8",): 2.0},
            STATES: {("11:7", "established"): 3.0, ("12:8", "established"): 4.0},
        }
    )
    assert [value for _, value in store.read(RESETS)] == [42.0]
    assert [value for _, value in store.read(STATES)] == [7.0]
    netns(store, ("12:8", "c2"))
    links.replace({RESETS: {("12:8",): 3.0}, STATES: {("12:8", "established"): 4.0}})
    assert [value for _, value in store.read(RESETS)] == [43.0]
    assert [value for _, value in store.read(STATES)] == [4.0]


def test_the_unknown_are_summed_and_never_go_backwards(store: Store, clock: Clock) -> None:
    netns(store, ("11:7", ""), ("12:8", ""))
    links = store.owned("links")
    links.replace({RESETS: {("11:7",): 40.0, ("12:8",): 2.0}})
    store.read(RESETS)
    clock.now += 2
    assert [value for _, value in store.read(RESETS)] == [42.0]
    netns(store, ("12:8", ""))
    links.replace({RESETS: {("12:8",): 3.0}})
    assert [value for _, value in store.read(RESETS)] == [43.0]


@pytest.mark.parametrize("listed", ["11:7", "11:g1", "proc-99:g1"])
def test_a_namespace_known_to_the_kernel_by_its_cookie_is_found(store: Store, listed: str) -> None:
    """By cookie, by inode where the link monitor knows no cookie, by alias where it may not even see the inode."""
    netns(store, (listed, "c1"))
    containers(store, ("c1", "", "", "web"))
    store.owned("kernel").replace({"cni_netns_alias": {("11:7", "proc-99"): 1.0}})
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert [labels["container"] for labels, _ in store.read(RESETS)] == ["web"]


def test_a_cookie_that_differs_is_another_namespace(store: Store) -> None:
    netns(store, ("11:8", "c1"))
    containers(store, ("c1", "", "", "web"))
    store.owned("links").replace({RESETS: {("11:7",): 1.0}})
    assert store.read(RESETS) == []


def test_a_container_knows_its_network_namespace(store: Store) -> None:
    netns(store, ("11:7", "c1"))
    containers(store, ("c1", "", "", "web"))
    assert store.read("cni_container_info")[0][0]["netns"] == "11"


def test_a_family_over_its_limit_keeps_what_it_has_and_counts_the_rest() -> None:
    store = Store(Policy(limits={"cni_containers": 2}))
    runtimes = store.owned("runtimes")
    runtimes.replace({"cni_containers": {("docker", "running"): 1.0, ("docker", "exited"): 2.0}})
    store.collect()
    runtimes.replace(
        {"cni_containers": {("docker", "paused"): 7.0, ("docker", "running"): 1.0, ("docker", "exited"): 2.0}}
    )
    assert {labels["state"] for labels, _ in store.read("cni_containers")} == {"running", "exited"}
    store.collect()
    dropped = {labels["family"]: value for labels, value in store.read("cni_exporter_series_dropped_total")}
    assert dropped["cni_containers"] == 2


def test_under_memory_pressure_no_new_series_is_taken_in(store: Store) -> None:
    runtimes = store.owned("runtimes")
    runtimes.replace({"cni_containers": {("docker", "running"): 1.0}})
    store.collect()
    store.admitting = False
    runtimes.replace({"cni_containers": {("docker", "running"): 1.0, ("docker", "exited"): 1.0}})
    assert [labels["state"] for labels, _ in store.read("cni_containers")] == ["running"]


def test_a_monitor_writes_its_own_families_alone(store: Store) -> None:
    with pytest.raises(ValueError, match="no family of links"):
        store.owned("links").replace({"cni_containers": {}})
    with pytest.raises(ValueError, match="no family of links"):
        store.owned("links").add("cni_no_such_thing")
    with pytest.raises(ValueError, match="does not fit"):
        store.owned("links").replace({RESETS: {("a", "b"): 1.0}})
    with pytest.raises(ValueError, match="cannot be raised"):
        store.owned("lifecycle").add("cni_veth_created_total", (), -1)


def test_secrets_in_labels_do_not_pass(store: Store) -> None:
    containers(store, ("c1", "", "", "web"))
    store.owned("runtimes").replace(
        {"cni_container_environment_info": {("c1", "DB_PASSWORD", "hunter2"): 1.0, ("c1", "LANG", "C"): 1.0}}
    )
    found = {labels["name"]: labels["value"] for labels, _ in store.read("cni_container_environment_info")}
    assert found["LANG"] == "C"
    assert "hunter2" not in found["DB_PASSWORD"]


def test_pods_of_other_namespaces_leave_no_trace() -> None:
    """The filter is one gate for every family: no name, no id in place of a name. Other containers are kept."""
    store = Store(Policy(grace=0.0, admits=lambda namespace: namespace == "kept"))
    netns(store, ("1:1", "c1"), ("2:2", "c2"), ("3:3", "c3"), ("4:4", "c4"))
    pods = [("c1", "kept", "pod", ""), ("c2", "other", "pod", ""), ("c3", "", "", "web"), ("c4", "", "uid", "c4")]
    containers(store, *pods)
    store.owned("links").replace({RESETS: {(f"{n}:{n}",): 1.0 for n in range(1, 5)}})
    for family in (RESETS, "cni_netns_info", "cni_container_info"):
        found = {(labels["namespace"], labels["pod"], labels["container"]) for labels, _ in store.read(family)}
        assert found == {("kept", "pod", ""), ("", "", "web")}


def test_a_histogram_counts_every_observation_once(store: Store) -> None:
    links = store.owned("lifecycle")
    for seconds in (0.5, 1.0, 30.0, 1e9):
        links.observe("cni_netns_lifetime_seconds", seconds)
    (collected,) = (c for c in store.collect() if c.family.name == "cni_netns_lifetime_seconds")
    ((_, state),) = collected.histograms
    assert state == [2.0, 0.0, 1.0, 0, 0, 0, 0, 0, 1.0, 1e9 + 31.5]


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3), max_size=6), max_size=8))
def test_a_shared_counter_never_goes_backwards(steps: list[dict[str, int]]) -> None:
    """Whatever namespaces come and go behind one name, the sum only rises while it exists."""
    clock = Clock()
    store = Store(Policy(grace=0.0), clock=clock)
    totals: dict[str, float] = {}
    lives = dict.fromkeys("abcdef", 0)
    last = 0.0
    previous: set[str] = set()
    for step in steps:
        for name in "abcdef":
            if name in step:
                totals[name] = totals.get(name, 0.0) + step[name]
            elif totals.pop(name, None) is not None:
                lives[name] += 1
        keys = {f"{ord(name)}:{lives[name]}": value for name, value in totals.items()}
        survivors = any(key in previous for key in keys)
        netns(store, *((key, "") for key in keys))
        store.owned("links").replace({RESETS: {(key,): value for key, value in keys.items()}})
        rows = store.read(RESETS)
        value = rows[0][1] if rows else 0.0
        if survivors:
            assert value >= last
        last, previous = value, set(keys)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_of_the_catalogue_is_sound(family: object) -> None:
    assert family.name.startswith("cni_")
    assert family.help.endswith(".")
    assert family.cap > 0
    assert (family.kind.value == "counter") == family.name.endswith("_total")
    assert bool(family.buckets) == (family.kind.value == "histogram")
    assert len(set(family.key)) == len(family.key)


def test_what_is_in_no_namespace_has_empty_labels_at_once(store: Store) -> None:
    """The kernel programs may meet a packet that belongs to no namespace."""
    store.owned("links").replace({RESETS: {("",): 3.0}})
    assert store.read(RESETS) == [({"namespace": "", "pod": "", "container": ""}, 3.0)]


def test_a_family_of_several_writers_is_the_sum_of_their_parts(store: Store) -> None:
    """Each replaces its own part; a key of both adds up; clearing one leaves the other's part."""
    one, other = store.owned("kernel", "load"), store.owned("load")
    seen = "cni_events_seen_total"
    one.replace({seen: {("exec",): 5.0, ("veth",): 1.0}})
    other.replace({seen: {("container",): 2.0, ("veth",): 3.0}})
    assert store.latest(seen) == {("exec",): 5.0, ("veth",): 4.0, ("container",): 2.0}
    one.replace({seen: {("exec",): 7.0}})
    assert store.latest(seen) == {("exec",): 7.0, ("veth",): 3.0, ("container",): 2.0}
    store.clear("load")
    assert store.latest(seen) == {("exec",): 7.0}
    other.replace({seen: {("container",): 2.0}})
    store.clear("load", "kernel")
    assert store.latest(seen) == {("container",): 2.0}


def test_histograms_go_with_the_view_that_replaced_them(store: Store) -> None:
    """A view that has only an owner in common with it takes nothing away."""
    lags = "cni_events_lag_seconds"
    state = [0.0] * (len(FAMILIES[lags].buckets) + 2)
    store.owned("kernel", "load").replace_histograms({lags: {("exec",): state}})

    def told() -> int:
        return sum(len(found.histograms) for found in store.collect() if found.family.name == lags)

    store.clear("load")
    assert told() == 1
    store.clear("kernel", "load")
    assert told() == 0


def test_namespaces_are_given_by_the_identity_that_the_kernel_knows(store: Store) -> None:
    """With inode and cookie, from the link monitor or from the programs' aliases, and the names of the owner."""
    netns(store, ("11:7", "c1"), ("12:g3", "c2"), ("proc-99:g1", "c3"))
    containers(store, ("c1", "", "", "web"), ("c3", "shop", "cart-1", "app"))
    store.owned("kernel").replace({"cni_netns_alias": {("13:9", "proc-99"): 1.0, ("11:7", "proc-98"): 1.0}})
    assert store.namespaces() == {"11:7": ("c1", ("", "", "web")), "13:9": ("", ("shop", "cart-1", ""))}
