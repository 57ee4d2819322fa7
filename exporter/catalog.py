"""Every metric family as data: the contract with dashboards, alerts and users, and the rules of join and cap.

Flows in: nothing. Flows out: `FAMILIES`, read by the store (what may be written, how it is joined), by the command
`cni-exporter metrics` (the reference) and by the tests (every family has a test, a panel, a line of docs).
"""

from dataclasses import dataclass, field, replace
from enum import Enum


class Kind(Enum):
    """Types of the exposition format."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Join(Enum):
    """How a family's series get the workload labels `namespace`, `pod`, `container` at scrape.

    The monitor writes a hidden key in front of the family's own labels; the store turns it into names.
    """

    NETNS = "netns"
    """Hidden key: the network namespace's identity. A pod's network belongs to the pod: `container` is empty there."""
    CONTAINER = "container"
    """Hidden key: the full container id."""


WORKLOAD = ("namespace", "pod", "container")
"""The labels that a join adds, in this order."""

HOST = "(host)"
"""Owner, and then `container` label, of the host's own network namespace; no container can have this name."""

NETNS_INFO = "cni_netns_info"
NETNS_ALIAS = "cni_netns_alias"
CONNECT_DURATION = "cni_tcp_connect_duration_seconds"
PLUGIN_DURATION = "cni_plugin_duration_seconds"
NETNS_LIFETIME = "cni_netns_lifetime_seconds"
LIFECYCLE_FAMILIES = (
    *("cni_netns_created_total", "cni_netns_destroyed_total", NETNS_LIFETIME),
    *("cni_veth_created_total", "cni_veth_deleted_total", "cni_veth_moved_total"),
)
"""Families that the kernel programs serve where they can, and the link monitor elsewhere; both mean the same."""
CONTAINER_INFO = "cni_container_info"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family. The key that a monitor writes is `hidden + labels`."""

    name: str
    help: str
    owner: str
    kind: Kind = Kind.GAUGE
    labels: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    """Key parts that are used by the join and not exported."""
    join: Join | None = None
    joined: tuple[str, ...] = ()
    """Labels that the join adds behind the family's own."""
    cap: int = 1000
    """Series at most; what is over it is counted in `cni_exporter_series_dropped_total`."""
    buckets: tuple[float, ...] = field(default=())
    """Upper bounds of a histogram, in base units, without +Inf."""
    internal: bool = False
    """Used by the joins and not exported."""
    secret: tuple[str, str] | None = None
    """A label that names something and the label that holds its value: the redaction gate judges them together."""

    @property
    def key(self) -> tuple[str, ...]:
        """Names of the parts of the key that the monitor writes."""
        return self.hidden + self.labels

    @property
    def exported(self) -> tuple[str, ...]:
        """Label names as scraped."""
        return self.labels + self.joined


def _by_netns(
    name: str, help_: str, kind: Kind = Kind.COUNTER, labels: tuple[str, ...] = (), cap: int = 5000
) -> Family:
    """Describe a family of the link monitor that is keyed by a network namespace."""
    return Family(name, help_, "links", kind, labels, ("netns_id",), Join.NETNS, WORKLOAD, cap)


def _by_container(name: str, help_: str, kind: Kind = Kind.GAUGE, labels: tuple[str, ...] = ()) -> Family:
    """Describe a family of the runtime monitors that is keyed by a container."""
    return Family(name, help_, "runtimes", kind, labels, ("container_id",), Join.CONTAINER, WORKLOAD, cap=5000)


def _kernel_by_netns(name: str, help_: str, labels: tuple[str, ...] = (), cap: int = 5000) -> Family:
    """Describe a counter of the kernel programs that is keyed by a network namespace."""
    return Family(name, help_, "kernel", Kind.COUNTER, labels, ("netns_id",), Join.NETNS, WORKLOAD, cap)


def _by_class(name: str, help_: str, kind: Kind = Kind.COUNTER, labels: tuple[str, ...] = ()) -> Family:
    """Describe a family by class of event. The kernel monitor and the steering each write their part."""
    return Family(name, help_, "load", kind, ("class", *labels), cap=100)


_TRAFFIC = {
    "bytes": "Bytes",
    "packets": "Packets",
    "errors": "Packets with errors",
    "dropped": "Packets dropped by the interface",
}
_DIRECTIONS = {"receive": "received", "transmit": "sent"}

_RUNTIMES = (
    Family("cni_containers", "Containers by runtime and state.", "runtimes", labels=("runtime", "state"), cap=100),
    Family(
        CONTAINER_INFO,
        "A container (or, with an empty container label, a pod's sandbox), its image and its network namespace.",
        "runtimes",
        labels=("container_id", "namespace", "pod", "container", "image", "runtime"),
        join=Join.CONTAINER,
        joined=("netns",),
        cap=5000,
    ),
    Family(
        "cni_container_events_total",
        "Container lifecycle events by runtime.",
        "runtimes",
        Kind.COUNTER,
        ("runtime", "event"),
        cap=200,
    ),
    _by_container(
        "cni_container_state",
        "1 for the state that the container is in (created, running, paused, exited, unknown).",
        labels=("state",),
    ),
    _by_container(
        "cni_container_network_info",
        "Network mode and addresses of a container; one series per network and address.",
        labels=("network_mode", "network", "ip"),
    ),
    _by_container(
        "cni_container_port_info",
        "A port of the container that is published on the host.",
        labels=("protocol", "container_port", "host_ip", "host_port"),
    ),
    _by_container("cni_container_mount_info", "A mount of the container.", labels=("destination", "type", "mode")),
    replace(
        _by_container("cni_container_label_info", "A label of the container that the configuration allows."),
        labels=("label", "value"),
        secret=("label", "value"),
    ),
    replace(
        _by_container(
            "cni_container_annotation_info",
            "A Kubernetes annotation of the container or pod that the configuration allows.",
        ),
        labels=("annotation", "value"),
        secret=("annotation", "value"),
    ),
    replace(
        _by_container(
            "cni_container_environment_info",
            "An environment variable of the container; the value only where the configuration allows it.",
        ),
        labels=("name", "value"),
        secret=("name", "value"),
    ),
    _by_container("cni_container_cpu_usage_seconds_total", "CPU time used by the container.", Kind.COUNTER),
    _by_container(
        "cni_container_cpu_limit_cores", "CPU limit of the container in cores; no series where there is none."
    ),
    _by_container(
        "cni_container_memory_working_set_bytes", "Memory in use by the container without its inactive file cache."
    ),
    _by_container("cni_container_memory_limit_bytes", "Memory limit of the container; no series where there is none."),
    _by_container(
        "cni_container_disk_read_bytes_total", "Bytes that the container read from block devices.", Kind.COUNTER
    ),
    _by_container(
        "cni_container_disk_written_bytes_total", "Bytes that the container wrote to block devices.", Kind.COUNTER
    ),
    _by_container("cni_container_pids", "Processes and threads in the container."),
)

_NAMESPACES = (
    Family(
        "cni_namespaces", "Linux namespaces with at least one process, by type.", "namespaces", labels=("type",), cap=20
    ),
    *(
        replace(family, owner="namespaces")
        for family in (
            _by_container(
                "cni_container_namespace_info",
                "A Linux namespace of the container's first process; shared is true where it is the host's own.",
                labels=("type", "inode", "shared"),
            ),
            _by_container(
                "cni_container_process_info",
                "The container's first process: PID on the host and inside, UID mapping (inside:outside:count).",
                labels=("pid", "container_pid", "uid_map"),
            ),
            _by_container("cni_container_processes", "Processes in the container."),
        )
    ),
)

_LINKS = (
    Family(
        "cni_veth_info",
        "A veth or netkit device on the host, its peer, the network namespace behind it and its bridge.",
        "links",
        labels=("device", "ifindex", "peer_ifindex", "netns", "bridge", "kind", "state"),
        cap=5000,
    ),
    Family(
        "cni_veths",
        "Veth and netkit devices on the host: attached to a live namespace, orphaned, or with both ends on the host.",
        "links",
        labels=("state",),
        cap=10,
    ),
    *(
        _by_netns(
            f"cni_veth_{way}_{unit}_total", f"{what} {verb} by the container over this device.", labels=("device",)
        )
        for way, verb in _DIRECTIONS.items()
        for unit, what in _TRAFFIC.items()
    ),
    Family("cni_veth_created_total", "Veth and netkit devices that appeared on the host.", "lifecycle", Kind.COUNTER),
    Family("cni_veth_deleted_total", "Veth and netkit devices that were deleted.", "lifecycle", Kind.COUNTER),
    Family(
        "cni_veth_moved_total",
        "Veth and netkit devices that left the host for another network namespace.",
        "lifecycle",
        Kind.COUNTER,
    ),
    Family(
        NETNS_INFO,
        "A network namespace, whose it is, and whether a bind mount keeps it alive.",
        "links",
        labels=("netns", "pinned"),
        hidden=("netns_id", "owner"),
        join=Join.NETNS,
        joined=WORKLOAD,
        cap=5000,
    ),
    Family("cni_netns_members", "Containers that share the network namespace.", "links", labels=("netns",), cap=5000),
    *(
        _by_netns(
            f"cni_netns_{way}_{unit}_total",
            f"{what} {verb} by an interface that has no host side.",
            labels=("interface",),
        )
        for way, verb in _DIRECTIONS.items()
        for unit, what in _TRAFFIC.items()
    ),
    Family("cni_netns_created_total", "Network namespaces that appeared.", "lifecycle", Kind.COUNTER),
    Family("cni_netns_destroyed_total", "Network namespaces that are gone.", "lifecycle", Kind.COUNTER),
    Family(
        "cni_netns_lifetime_seconds",
        "How long the network namespaces lived that are gone, of those whose creation was seen.",
        "lifecycle",
        Kind.HISTOGRAM,
        buckets=(1, 10, 60, 600, 3600, 21600, 86400, 604800),
    ),
    _by_netns("cni_netns_tcp_retransmitted_segments_total", "TCP segments sent again."),
    _by_netns("cni_netns_tcp_resets_sent_total", "TCP segments sent with the RST flag."),
    _by_netns("cni_netns_tcp_listen_overflows_total", "Connections refused because a listen queue was full."),
    _by_netns("cni_netns_udp_receive_buffer_errors_total", "UDP datagrams dropped because a receive buffer was full."),
    _by_netns("cni_netns_tcp_connections", "TCP sockets by state.", Kind.GAUGE, ("state",), 20000),
)

_KERNEL = (
    Family(
        NETNS_ALIAS,
        "A network namespace as the kernel programs know it, and the label under which the link monitor may list it.",
        "kernel",
        labels=("netns_id", "netns"),
        cap=5000,
        internal=True,
    ),
    _kernel_by_netns("cni_packet_drops_total", "Packets that the kernel dropped, by its reason.", ("reason",), 20000),
    _kernel_by_netns("cni_tcp_connections_opened_total", "TCP connections established.", ("direction",)),
    _kernel_by_netns(
        "cni_tcp_connection_failures_total",
        "TCP connections that were begun and not established: refused, timed out or given up.",
        ("direction",),
    ),
    _kernel_by_netns(
        "cni_tcp_faults_total", "TCP segments sent again (retransmit) and resets sent (reset_sent).", ("fault",)
    ),
    Family(
        CONNECT_DURATION,
        "Time from the first SYN of an outgoing TCP connection until it is established.",
        "kernel",
        Kind.HISTOGRAM,
        hidden=("netns_id",),
        join=Join.NETNS,
        joined=WORKLOAD,
        cap=1000,
        buckets=(
            *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
            *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
        ),
    ),
    Family(
        "cni_plugin_runs_total",
        "Runs of CNI plugins that have ended, by plugin and command (ADD, DEL, CHECK, VERSION, STATUS, GC, other).",
        "plugins",
        Kind.COUNTER,
        ("plugin", "command"),
        cap=1500,
    ),
    Family(
        "cni_plugin_failures_total",
        "Runs of CNI plugins that ended with an exit status other than 0, or by a signal.",
        "plugins",
        Kind.COUNTER,
        ("plugin", "command"),
        cap=1500,
    ),
    Family(
        PLUGIN_DURATION,
        "Time from a CNI plugin's start until its end.",
        "plugins",
        Kind.HISTOGRAM,
        ("plugin", "command"),
        cap=1500,
        buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    ),
    Family(
        "cni_bpf_program_attached",
        "1 where the kernel program is attached, at these hooks and on this rung (fentry, kprobe, tp_btf); 0 where the "
        "kernel takes it on none: cni_bpf_program_info has the reason.",
        "kernel",
        labels=("program", "hook", "rung"),
        cap=100,
    ),
    Family(
        "cni_bpf_program_info",
        "Always 1; the label reason says why the kernel program is not attached, or not on a better rung; empty on the "
        "best one.",
        "kernel",
        labels=("program", "reason"),
        cap=100,
    ),
    Family(
        "cni_bpf_program_run_time_seconds_total",
        "Time spent in the program, by the kernel's own count.",
        "kernel",
        Kind.COUNTER,
        ("program",),
        cap=100,
    ),
    Family("cni_bpf_program_runs_total", "Runs of the program.", "kernel", Kind.COUNTER, ("program",), cap=100),
    Family(
        "cni_bpf_program_misses_total",
        "Events that the kernel did not hand to the program because it was running on that CPU already.",
        "kernel",
        Kind.COUNTER,
        ("program",),
        cap=100,
    ),
    Family(
        "cni_bpf_map_entries",
        "Entries in the map. Maps that drop their oldest entry when they are full are not listed.",
        "kernel",
        labels=("map",),
        cap=100,
    ),
    Family("cni_bpf_map_capacity", "Entries that the map can hold.", "kernel", labels=("map",), cap=100),
    Family(
        "cni_bpf_map_insert_failures_total",
        "Times a kernel program found no room for a new entry (a namespace's counter, a connection): its counts are "
        "missing. kernel.map_entries gives more room.",
        "kernel",
        Kind.COUNTER,
        ("map",),
        cap=100,
    ),
    Family(
        "cni_bpf_map_evictions_total",
        "Keys put out of a map of the heaviest senders for newer ones.",
        "kernel",
        Kind.COUNTER,
        ("map",),
        cap=100,
    ),
)

_CONFIGURATIONS = (
    Family(
        "cni_config_info",
        "A CNI configuration file: its network, its plugins in order, its version and the checksum of its content.",
        "cni_config",
        labels=("file", "network", "plugins", "cni_version", "sha256"),
    ),
    Family(
        "cni_config_valid",
        "1 where the file is a configuration that pods can be given; 0 where it is not.",
        "cni_config",
        labels=("file",),
    ),
    Family(
        "cni_config_problem_info",
        "Why a configuration file is invalid or cannot be read, and where.",
        "cni_config",
        labels=("file", "problem", "line", "column"),
    ),
    Family(
        "cni_config_active",
        "1 where the container runtime uses the file for new pods, by its own rule of choice.",
        "cni_config",
        labels=("file",),
    ),
    Family(
        "cni_config_changes_total",
        "Changes of the content of configuration files.",
        "cni_config",
        Kind.COUNTER,
        ("directory", "operation"),
    ),
    Family(
        "cni_config_last_change_timestamp_seconds",
        "When the content of a file last changed; before the first change that was seen: when the newest was written.",
        "cni_config",
        labels=("directory",),
    ),
    Family(
        "cni_config_watch_overflows_total",
        "How often events of the watched directories were lost, so that all of them had to be read again.",
        "cni_config",
        Kind.COUNTER,
    ),
    Family(
        "cni_config_rescans_total",
        "How often everything was read again because events were lost, or to be sure that none was missed.",
        "cni_config",
        Kind.COUNTER,
    ),
    Family(
        "cni_config_plugin_available",
        "1 where a plugin that a configuration names is in a plugin directory and can be started.",
        "cni_config",
        labels=("plugin",),
    ),
    Family(
        "cni_ipam_addresses",
        "Addresses of a pool of the plugin host-local: used (leased) and free; together they are its size.",
        "cni_config",
        labels=("network", "subnets", "state"),
    ),
)

_LOAD = (
    Family(
        "cni_load_pressure_ratio",
        "How much of a resource is in use; 1 is full: the host's CPU, disk and network, the exporter's own memory.",
        "host_load",
        labels=("resource",),
        cap=10,
    ),
    _by_class("cni_events_seen_total", "Events that were met, before any filter."),
    _by_class("cni_events_filtered_total", "Events that a filter rule left out."),
    _by_class("cni_events_sampled_out_total", "Events left out by a sampling ratio."),
    _by_class(
        "cni_events_lost_total", "Events that were to be kept and for which there was no room.", labels=("stage",)
    ),
    _by_class("cni_events_handled_total", "Events that the exporter handled."),
    _by_class(
        "cni_events_estimated_total",
        "Events by the weights of those that were handled: an estimate of what filters and loss let through.",
    ),
    _by_class(
        "cni_events_estimate_standard_error", "Standard error of cni_events_estimated_total, in events.", Kind.GAUGE
    ),
    Family(
        "cni_events_lag_seconds",
        "Time from the kernel's event to its handling; of a class that nobody listens to, one event in 16 is timed.",
        "load",
        Kind.HISTOGRAM,
        ("class",),
        cap=20,
        buckets=(0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
    ),
    _by_class("cni_sampling_ratio", "Share of the events behind filters that was kept last.", Kind.GAUGE),
    _by_class("cni_sampling_target_ratio", "Share of the events behind filters that is to be kept.", Kind.GAUGE),
    Family("cni_drop_ratio", "Share of all events behind filters that was not kept last: sampled out or lost.", "load"),
    Family("cni_load_events_per_second", "Events per second behind filters.", "load"),
    Family("cni_load_forecast_events_per_second", "Events per second that ratios are made for.", "load"),
    Family(
        "cni_load_level", "1 for the level of the load: low, medium, high, critical.", "load", labels=("level",), cap=10
    ),
    Family(
        "cni_load_pattern",
        "1 for how the load moves: steady, trending, periodic, bursty, or unknown.",
        "load",
        labels=("pattern",),
        cap=10,
    ),
    Family(
        "cni_load_adaptations_total",
        "Changes of ratios and learned rules, by cause.",
        "load",
        Kind.COUNTER,
        ("reason",),
        cap=20,
    ),
    _by_class("cni_load_anomalies_total", "Departures of the load from what was to be expected."),
    Family(
        "cni_top_peer_events_estimated",
        "Events of the last minute about an address, of the largest ones; estimated from the kept events.",
        "load",
        labels=("class", "peer"),
        hidden=("netns_id",),
        join=Join.NETNS,
        joined=WORKLOAD,
        cap=200,
    ),
    Family(
        "cni_filter_rules",
        "Filter rules in force, by what they are about and whether they are configured or learned.",
        "load",
        labels=("kind", "origin"),
        cap=20,
    ),
    Family(
        "cni_filter_rule_matches_total",
        "Events that filter rules met, those included that a rule keeps.",
        "load",
        Kind.COUNTER,
        ("kind", "origin"),
        cap=20,
    ),
)

_EXPORTER = (
    Family(
        "cni_exporter_build_info", "The running build.", "exporter", labels=("version", "revision", "python_version")
    ),
    Family("cni_exporter_config_info", "The configuration in force.", "exporter", labels=("sha256", "preset")),
    Family(
        "cni_exporter_config_last_reload_successful",
        "1 where the last reload of the configuration took effect.",
        "exporter",
    ),
    Family(
        "cni_exporter_feature_enabled",
        "1 where the feature is switched on by the configuration.",
        "exporter",
        labels=("feature",),
    ),
    Family(
        "cni_exporter_capability",
        "1 for each Linux capability that the exporter holds.",
        "exporter",
        labels=("capability",),
    ),
    Family(
        "cni_exporter_monitor_up",
        "1 where the monitor's last update succeeded; no series where there is nothing to observe.",
        "supervisor",
        labels=("monitor",),
    ),
    Family(
        "cni_exporter_monitor_mode_info",
        "How the monitor observes, and why not better.",
        "supervisor",
        labels=("monitor", "mode", "reason"),
    ),
    Family(
        "cni_exporter_monitor_fallback",
        "1 where the monitor stands on a lower rung than its best.",
        "supervisor",
        labels=("monitor",),
    ),
    Family(
        "cni_exporter_monitor_last_update_timestamp_seconds",
        "When the monitor's last successful update ended.",
        "supervisor",
        labels=("monitor",),
    ),
    Family(
        "cni_exporter_monitor_update_duration_seconds",
        "How long the monitor's last update took.",
        "supervisor",
        labels=("monitor",),
    ),
    Family(
        "cni_exporter_monitor_circuit_open",
        "1 while the monitor rests after repeated failures.",
        "supervisor",
        labels=("monitor",),
    ),
    Family(
        "cni_exporter_monitor_restarts_total",
        "How often the monitor's source failed and was opened again.",
        "supervisor",
        Kind.COUNTER,
        ("monitor",),
    ),
    Family(
        "cni_exporter_monitor_errors_total",
        "Bad input that the monitor met, by kind.",
        "supervisor",
        Kind.COUNTER,
        ("monitor", "kind"),
    ),
    Family(
        "cni_exporter_monitor_queue_dropped_total",
        "Events shed by a full queue of the monitor.",
        "supervisor",
        Kind.COUNTER,
        ("monitor",),
    ),
    Family("cni_exporter_series", "Series in the last scrape.", "metrics", labels=("family",)),
    Family("cni_exporter_series_limit", "Series at most.", "metrics", labels=("family",)),
    Family(
        "cni_exporter_series_dropped_total",
        "Samples left out of a scrape because the family was at its limit.",
        "metrics",
        Kind.COUNTER,
        ("family",),
    ),
    Family(
        "cni_exporter_series_held",
        "Series held back in the last scrape because their workload is not known yet.",
        "metrics",
    ),
    Family(
        "cni_exporter_scrape_duration_seconds", "How long the last scrape took: refresh, join and encoding.", "metrics"
    ),
    Family("cni_exporter_scrapes_total", "Scrapes answered.", "metrics", Kind.COUNTER),
    Family(
        "cni_exporter_http_connections_dropped_total",
        "HTTP connections closed because there were too many or one was too slow.",
        "web",
        Kind.COUNTER,
        ("reason",),
    ),
    Family(
        "cni_exporter_feed_up",
        "1 where the live feed can be read; no series where it is switched off.",
        "feed",
    ),
    Family("cni_exporter_feed_readers", "Readers of the live feed.", "feed"),
    Family(
        "cni_exporter_audit_up",
        "1 where the audit log's last line was written; no series where there is no audit log.",
        "audit",
    ),
    Family(
        "cni_exporter_audit_records_total",
        "Records in the audit log, by kind (start, stop, reload, read, event, scrape, lost).",
        "audit",
        Kind.COUNTER,
        ("record",),
        cap=20,
    ),
    Family(
        "cni_exporter_audit_records_dropped_total",
        "Records that the audit log lacks: too many at once (rate, queue), or the file cannot be written (write).",
        "audit",
        Kind.COUNTER,
        ("reason",),
        cap=10,
    ),
    Family(
        "cni_exporter_feed_lost_total",
        "Events that readers of the live feed did not get because they read too slowly.",
        "feed",
        Kind.COUNTER,
    ),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (*_RUNTIMES, *_NAMESPACES, *_LINKS, *_KERNEL, *_LOAD, *_CONFIGURATIONS, *_EXPORTER)
}
