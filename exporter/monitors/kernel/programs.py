"""Every BPF program as data: its C file, what it reads of the kernel, its maps, its probes and their ladders of hooks.

Flows in: the settings. Flows out: `PROGRAMS`, read by the loader (what to compile, prove, attach) and by `check`.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from exporter.catalog import CONNECT_DURATION, FAMILIES, LIFECYCLE_FAMILIES, NETNS_LIFETIME, PLUGIN_DURATION
from exporter.host.bpf import cpus
from exporter.monitors.kernel import counts
from exporter.monitors.kernel.shapes import (
    ARRAY,
    CLASSES,
    HASH,
    LPM_TRIE,
    LRU_HASH,
    LRU_PERCPU_HASH,
    PERCPU_ARRAY,
    PERCPU_HASH,
    RINGBUF,
    Hook,
    MapShape,
    Probe,
    Program,
    Rung,
    Settings,
)

_RULE = 80  # bytes of struct rule
_RULES = 1024
_RULE_SLOTS = 4096  # rules of all kinds together
LOADS = ("load_netns", "load_comm", "load_prefix")
"""Maps that count by key, and put the least recently used key out when they are full."""
_LOAD = 32  # bytes of struct key_load
_KEYS = 1024  # heavy keys of a kind: the least recently used goes


def _entries(settings: Settings) -> int:
    return settings.entries


COMMON = Program(
    name="common",
    members=(
        *("task_struct.nsproxy", "nsproxy.net_ns", "net.ns.inum", "net.ns.ops"),
        *("net.proc_net_stat", "proc_dir_entry.low_ino"),
    ),
    optional=(
        *("net.net_cookie", "net.net_cookie.counter", "task_struct.comm", "task_struct.tgid"),
        *("task_struct.cgroups", "css_set.dfl_cgrp", "cgroup.kn", "kernfs_node.id"),
    ),
    types=("bpf_rdonly_cast", "bpf_get_current_task_btf", "task_struct", "linux_binprm", "sk_buff", "sock"),
    maps=(
        MapShape("namespaces", HASH, 16, 16, _entries),
        MapShape("constants", ARRAY, 4, 8, 8),
        MapShape("insert_failures", PERCPU_ARRAY, 4, 8, 64),
        MapShape("inserts", PERCPU_ARRAY, 4, 8, 64),
        MapShape("places", ARRAY, 4, counts.PLACE.size, lambda _: counts.PLACES * cpus(), mapped=True),
        MapShape("counted", PERCPU_HASH, 24, 8, _entries),
        MapShape("account", PERCPU_ARRAY, 4, 64, len(CLASSES)),
        MapShape("ratios", ARRAY, 4, 4, len(CLASSES)),
        MapShape("filters", ARRAY, 4, 8, len(CLASSES)),
        MapShape("filter_pid", HASH, 4, _RULE, _RULES),
        MapShape("filter_comm", HASH, 16, _RULE, _RULES),
        MapShape("filter_prefix", LPM_TRIE, 20, _RULE, _RULES),
        MapShape("filter_port", HASH, 4, _RULE, _RULES),
        MapShape("filter_syscall", HASH, 4, _RULE, _RULES),
        MapShape("filter_netns", HASH, 16, _RULE, _RULES),
        MapShape("filter_cgroup", HASH, 8, _RULE, _RULES),
        MapShape("rule_matches", PERCPU_ARRAY, 4, 16, _RULE_SLOTS),
        MapShape("load_netns", LRU_PERCPU_HASH, 16, _LOAD, _KEYS),
        MapShape("load_comm", LRU_PERCPU_HASH, 16, _LOAD, _KEYS),
        MapShape("load_prefix", LRU_PERCPU_HASH, 20, _LOAD, _KEYS),
        MapShape("load_fresh", ARRAY, 4, _LOAD, 1),
        MapShape("fullest", PERCPU_ARRAY, 4, 8, 1),
        MapShape("events", RINGBUF, 0, 0, lambda settings: settings.ring_bytes),
        MapShape("lifecycle", RINGBUF, 0, 0, lambda settings: settings.lifecycle_bytes),
    ),
    probes=(),
    families=(
        *("cni_events_seen_total", "cni_events_filtered_total", "cni_events_sampled_out_total"),
        *("cni_events_lost_total", "cni_events_handled_total", "cni_events_lag_seconds"),
        *("cni_bpf_program_attached", "cni_bpf_map_entries", "cni_bpf_map_capacity"),
    ),
)
"""What common.h needs; part of every compile."""

PROOF = Program(
    name="proof",
    members=(),
    optional=(
        *("task_struct.tgid", "task_struct.pid", "task_struct.group_leader", "task_struct.real_parent"),
        *("task_struct.mm", "mm_struct.env_start", "task_struct.files", "files_struct.fdt", "fdtable.fd"),
        *("file.private_data", "socket.sk", "net.loopback_dev", "net_device.ifindex", "net_device.name"),
        *("net_device.nd_net.net", "sock.__sk_common.skc_family", "sock.__sk_common.skc_num"),
        *("sock.__sk_common.skc_dport", "sock.__sk_common.skc_daddr", "sock.sk_protocol"),
        *("sock.__sk_common.skc_net.net", "sock.sk_receive_queue.next"),
        *("sk_buff.len", "sk_buff.head", "sk_buff.transport_header", "sk_buff.network_header"),
    ),
    maps=(MapShape("proof", ARRAY, 4, 8, 32), MapShape("offsets", ARRAY, 4, 8 * 512, 1)),
    probes=(),
)
"""The self-proof; its maps are gone with the loader."""


PATH = ("rules.c", "events.c")
"""What all programs call: the path of an event."""


def _drop_constants(_: Settings, reasons: Mapping[str, int]) -> dict[str, str]:
    """Number the reasons that are no drop; 0xffffffff is never met."""
    return {
        "REASON_NOT_DROPPED": f"{reasons.get('not_dropped_yet', 0)}U",
        "REASON_CONSUMED": f"{reasons.get('consumed', 0xFFFFFFFF)}U",
        "REASON_NOT_SPECIFIED": f"{reasons.get('not_specified', 0xFFFFFFFE)}U",
    }


DROPS = Program(
    name="drops",
    members=(
        *("sk_buff.dev", "sk_buff.sk", "sk_buff.head", "sk_buff.protocol", "sk_buff.network_header"),
        *("net_device.nd_net.net", "net_device.ifindex", "net_device.name", "sock.__sk_common.skc_net.net"),
    ),
    types=("iphdr", "ipv6hdr", "udphdr"),
    maps=(),
    probes=(
        Probe(
            "drops",
            (
                Rung("tp_btf", (Hook("tp_btf", "drops_with_reason", ("kfree_skb",)),), needs="skb_drop_reason"),
                Rung(
                    "tp_btf",
                    (Hook("tp_btf", "drops_without_reason", ("kfree_skb",)),),
                    "the reason of a drop: this kernel (before 5.17) has none, all count as not_specified",
                ),
            ),
        ),
    ),
    families=("cni_packet_drops_total",),
    constants=_drop_constants,
)


def _tcp_constants(settings: Settings, _: Mapping[str, int]) -> dict[str, str]:
    bounds = FAMILIES[CONNECT_DURATION].buckets
    return {
        "ENTRIES_KEPT": f"{settings.entries // 2}ULL",
        "CONNECT_BUCKETS": str(len(bounds)),
        "CONNECT_BOUNDS": ",".join(f"{round(bound * 1e9)}ULL" for bound in bounds),
    }


_CONNECT_TIMES = 8 * (len(FAMILIES[CONNECT_DURATION].buckets) + 2)  # bytes of struct connect_time

TCP = Program(
    name="tcp",
    members=(
        *("sock.sk_protocol", "sock.__sk_common.skc_family", "sock.__sk_common.skc_num"),
        *("sock.__sk_common.skc_dport", "sock.__sk_common.skc_daddr", "sock.__sk_common.skc_rcv_saddr"),
        *("sock.__sk_common.skc_net.net", "sk_buff.dev", "net_device.nd_net.net"),
    ),
    optional=(
        *("sock.__sk_common.skc_v6_daddr", "sock.__sk_common.skc_v6_rcv_saddr"),
        *("tcp_sock.bytes_acked", "tcp_sock.bytes_received"),
    ),
    maps=(
        MapShape("tcp_connect", PERCPU_HASH, 16, _CONNECT_TIMES, 4096),
        MapShape("tcp_fresh", ARRAY, 4, _CONNECT_TIMES, 1),
        MapShape("tcp_connecting", HASH, 8, 32, _entries),
        MapShape("tcp_entries", ARRAY, 4, 8, 2),
        MapShape("tcp_open", LRU_HASH, 8, 16, _entries),
    ),
    probes=(
        Probe(
            "tcp_state",
            (Rung("tp_btf", (Hook("tp_btf", "tcp_state", ("inet_sock_set_state",)),)),),
        ),
        Probe(
            "tcp_retrans",
            (Rung("tp_btf", (Hook("tp_btf", "tcp_retransmit", ("tcp_retransmit_skb",)),)),),
        ),
        Probe(
            "tcp_reset",
            (
                Rung("tp_btf", (Hook("tp_btf", "tcp_reset", ("tcp_send_reset",)),), needs="sk_rst_reason"),
                Rung(
                    "tp_btf",
                    (Hook("tp_btf", "tcp_reset", ("tcp_send_reset",)),),
                    "resets for which there is no socket, as those of a closed port (shown from 6.10 on)",
                ),
            ),
        ),
    ),
    families=(
        *("cni_tcp_connections_opened_total", "cni_tcp_connection_failures_total"),
        *(CONNECT_DURATION, "cni_tcp_faults_total"),
    ),
    constants=_tcp_constants,
)


def _bounds(family: str, prefix: str) -> dict[str, str]:
    bounds = FAMILIES[family].buckets
    return {
        f"{prefix}_BUCKETS": str(len(bounds)),
        f"{prefix}_BOUNDS": ",".join(f"{round(bound * 1e9)}ULL" for bound in bounds),
    }


PLUGINS = 200
"""Names of plugins that are told apart; the others share the name ~other."""
_COMMANDS = 7  # enum cni_command in cni.c
_PLUGIN_PATH = 124  # CNI_PATH in cni.c


def _plugin_directories(settings: Settings) -> Iterable[tuple[str, bytes, bytes]]:
    """Write the directories as prefixes; one that is too long for a program to see is left out."""
    for name in settings.plugin_directories:
        text = os.fsencode(os.path.normpath(name)).rstrip(b"/") + b"/"
        if text.startswith(b"/") and len(text) < _PLUGIN_PATH:
            key = struct.pack("=I", 8 * len(text)) + text.ljust(_PLUGIN_PATH, b"\0")
            yield "cni_directories", key, struct.pack("=II", len(text), 0)


def _plugin_heads(settings: Settings) -> dict[str, str]:
    """Give the first 16 characters of each directory as two numbers, each with a mask of those that there are."""
    rows = []
    for _, key, value in _plugin_directories(settings):
        length = struct.unpack_from("=I", value)[0]
        mask = (b"\xff" * min(length, 16)).ljust(16, b"\0")
        first, second = struct.unpack("=QQ", key[4:20])
        mask_first, mask_second = struct.unpack("=QQ", mask)
        rows.append(f"{{{first}ULL,{mask_first}ULL,{second}ULL,{mask_second}ULL}}")
    return {"CNI_HEADS": ",".join(rows) or "{0}"}


_PROCESS = (
    *("task_struct.tgid", "task_struct.signal", "task_struct.group_leader", "task_struct.exit_code"),
    *("task_struct.start_time", "signal_struct.live.counter", "signal_struct.flags"),
    *("signal_struct.group_exit_code", "linux_binprm.filename"),
)

CNI = Program(
    name="cni",
    members=(*_PROCESS, "task_struct.mm", "mm_struct.env_start", "mm_struct.env_end"),
    maps=(
        MapShape("cni_directories", LPM_TRIE, 4 + _PLUGIN_PATH, 8, 64),
        MapShape("cni_plugins", HASH, 32, 8, PLUGINS),
        MapShape("cni_runs", HASH, 40, 8 * (len(FAMILIES[PLUGIN_DURATION].buckets) + 3), (PLUGINS + 1) * _COMMANDS),
        MapShape("cni_running", HASH, 4, 160, 1024),
        MapShape("cni_under_way", ARRAY, 4, 8, 1),
        MapShape("cni_scratch", PERCPU_ARRAY, 4, 832, 3),
    ),
    probes=(
        Probe(
            "cni",
            (
                Rung(
                    "tp_btf",
                    (
                        Hook("tp_btf", "cni_exec", ("sched_process_exec",)),
                        Hook("tp_btf", "cni_exit", ("sched_process_exit",)),
                    ),
                ),
            ),
        ),
    ),
    families=("cni_plugin_runs_total", "cni_plugin_failures_total", PLUGIN_DURATION),
    constants=lambda settings, _reasons: _bounds(PLUGIN_DURATION, "CNI") | _plugin_heads(settings),
    contents=_plugin_directories,
)


def _host_netns(_: Settings, __: Mapping[str, int]) -> dict[str, str]:
    """Tell which network namespace is no container's: that of the first process, where it may be asked, or our own."""
    try:
        inode = Path("/proc/1/ns/net").stat().st_ino
    except OSError:
        inode = Path("/proc/self/ns/net").stat().st_ino
    return {"HOST_NETNS": f"{inode}U"}


PROCESS = Program(
    name="process",
    members=(*_PROCESS, "task_struct.thread_pid", "pid.level", "task_struct.real_parent"),
    maps=(MapShape("process_started", LRU_HASH, 4, 32, _entries),),
    probes=(
        Probe(
            "process",
            (
                Rung(
                    "tp_btf",
                    (
                        Hook("tp_btf", "process_exec", ("sched_process_exec",)),
                        Hook("tp_btf", "process_exit", ("sched_process_exit",)),
                    ),
                ),
            ),
        ),
    ),
    constants=_host_netns,
)

_SYSCALLS = 1024  # numbers of system calls that are looked at


def _named_syscalls(settings: Settings) -> Iterable[tuple[str, bytes, bytes]]:
    for number in settings.syscalls:
        if 0 <= number < _SYSCALLS:
            yield "syscalls", struct.pack("=I", number), struct.pack("=I", 1)


SYSCALLS = Program(
    name="syscalls",
    members=("task_struct.real_parent", "task_struct.tgid"),
    maps=(MapShape("syscalls", ARRAY, 4, 4, _SYSCALLS),),
    probes=(Probe("syscalls", (Rung("tp_btf", (Hook("tp_btf", "syscall_enter", ("sys_enter",)),)),)),),
    wanted=lambda settings: bool(settings.syscalls),
    contents=_named_syscalls,
)


def _lifecycle_constants(_: Settings, __: Mapping[str, int]) -> dict[str, str]:
    """Give the bounds of lifetimes in nanoseconds, and the host's namespace: the one that the loader runs in."""
    bounds = FAMILIES[NETNS_LIFETIME].buckets
    return {
        "LIFETIME_BUCKETS": str(len(bounds)),
        "LIFETIME_BOUNDS": ",".join(f"{round(bound * 1e9)}ULL" for bound in bounds),
        "HOST_NETNS": f"{Path('/proc/self/ns/net').stat().st_ino}U",
    }


_REQUESTS = (Hook("on_request", "netns_sweep", ("netns_sweep",)), Hook("on_request", "netns_walk", ("netns_walk",)))
_DEVICE_HOOKS = (("dev_init_scheduler",), ("netdev_unregister_kobject",), ("netdev_change_owner",))
_DEVICE_LIMIT = "a device that a notifier refuses at the last step of its creation: it counts as created and as deleted"

LIFECYCLE = Program(
    name="lifecycle",
    members=(
        *("net.list.next", "task_struct.flags", "net_device.nd_net.net", "net_device.ifindex", "net_device.name"),
        *("net_device.rtnl_link_ops", "rtnl_link_ops.kind"),
    ),
    optional=(
        *("net.ns.__ns_ref", "net.ns.count", "net.count", "pt_regs.di", "pt_regs.si", "pt_regs.dx", "pt_regs.orig_ax"),
        *("pt_regs.regs", "pt_regs.orig_x0", "pt_regs.syscallno"),
    ),
    maps=(
        MapShape("lifecycles", PERCPU_ARRAY, 4, 8, 8),
        MapShape("netns_alive", HASH, 16, 16, _entries),
        MapShape("netns_lifetime", PERCPU_ARRAY, 4, 8 * (len(FAMILIES[NETNS_LIFETIME].buckets) + 2), 1),
        MapShape("netns_cursor", ARRAY, 4, 8, 2),
    ),
    probes=(
        Probe(
            "netns",
            (
                Rung(
                    "fentry",
                    (
                        Hook("fexit", "netns_copied", ("copy_net_ns",)),
                        Hook("fentry", "netns_exit_entered", ("proc_net_ns_exit",)),
                    ),
                ),
                Rung(
                    "kprobe",
                    (
                        Hook("kprobe", "netns_loopback_probed", ("loopback_net_init",)),
                        Hook("kprobe", "netns_exit_probed", ("proc_net_ns_exit",)),
                    ),
                    "a creation that fails in a module's last steps: it counts as created and as gone",
                ),
                Rung(
                    "tp_btf",
                    (
                        Hook("tp_btf", "netns_capable", ("cap_capable",)),
                        Hook("tp_btf", "netns_process", ("sched_process_exec",)),
                        Hook("tp_btf", "netns_process", ("sched_process_exit",)),
                        Hook("tp_btf", "netns_newtask", ("task_newtask",)),
                        *_REQUESTS,
                    ),
                    "when exactly a namespace ended: it is noticed at the next update",
                ),
                Rung(
                    "tp_btf",
                    (
                        Hook("tp_btf", "netns_unshared", ("sys_exit",)),
                        Hook("tp_btf", "netns_newtask", ("task_newtask",)),
                        *_REQUESTS,
                    ),
                    "when exactly a namespace ended: it is noticed at the next update; it makes each system call some "
                    "150 ns slower",
                ),
            ),
        ),
        Probe(
            "veth",
            tuple(
                Rung(
                    kind,
                    tuple(
                        Hook(kind, function, symbols)
                        for function, symbols in zip(functions, _DEVICE_HOOKS, strict=True)
                    ),
                    _DEVICE_LIMIT,
                )
                for kind, functions in (
                    ("fentry", ("veth_registered", "veth_unregistered", "veth_changed")),
                    ("kprobe", ("veth_reg_probed", "veth_unreg_probed", "veth_change_probed")),
                )
            ),
        ),
    ),
    families=LIFECYCLE_FAMILIES,
    constants=_lifecycle_constants,
)

PROGRAMS: tuple[Program, ...] = (DROPS, TCP, CNI, PROCESS, SYSCALLS, LIFECYCLE)
"""All that can be loaded, in the order in which they are compiled."""
