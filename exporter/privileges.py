"""Linux capabilities of this process: what it holds, and how it gives up what it no longer needs.

Formats and numbers: capabilities(7), capget(2), include/uapi/linux/capability.h.
"""

import ctypes
import os

SYS_PTRACE = 19
SYS_ADMIN = 21
PERFMON = 38
BPF = 39
_SETPCAP = 8
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

NAMES = [
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner"),
    *("sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice"),
    *("sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap"),
    *("mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf"),
    "checkpoint_restore",
]
"""Names by number, without the prefix cap_."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def held() -> frozenset[int]:
    """Give the numbers of the effective capabilities of the calling thread. Raises OSError."""
    data = (_Data * 2)()
    _call("capget", ctypes.byref(_Header(_VERSION_3, 0)), data)
    bits = data[0].effective | data[1].effective << 32
    return frozenset(number for number in range(64) if bits >> number & 1)


def keep(wanted: frozenset[int]) -> frozenset[int]:
    """Give up every capability but `wanted`, for good, and any way to gain new ones; the answer is what is left.

    Threads that exist already keep theirs: call it before any is started. Raises OSError where the kernel refuses.
    """
    had = held()
    left = had & wanted
    if _SETPCAP in had:
        for number in range(len(NAMES)):
            if number not in left:
                _call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    bits = sum(1 << number for number in left)
    data = (_Data * 2)()
    for half in range(2):
        data[half].effective = data[half].permitted = bits >> (32 * half) & 0xFFFFFFFF
    _call("capset", ctypes.byref(_Header(_VERSION_3, 0)), data)
    return left


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
