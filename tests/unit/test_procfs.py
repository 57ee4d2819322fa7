"""What the procfs readers make of real and of odd content."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.host import procfs
from exporter.host.netlink_messages import Counters
from exporter.host.procfs import Mount

DEV = b"""Inter-|   Receive                                             |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:       1       2    0    0    0     0          0         0        1       2    0    0    0     0      0        0
  eth0:5000000000    12    3    4    0     0          0         0     2000      22    5    6    0     0      0        0
"""
SNMP = b"""Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens OutRsts RetransSegs
Tcp: 1 200 120000 -1 5 17 23
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors
Udp: 1 2 3 4 5
UdpLite: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors
UdpLite: 9 9 9 9 9
"""
TCP_HEAD = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def tcp_line(number: int, state: int) -> bytes:
    return (
        b"%4d: 0100007F:1F90 00000000:0000 %02X 00000000:00000000 00:00000000 00000000     0        0 1".ljust(149)
        % (
            number,
            state,
        )
        + b"\n"
    )


def never() -> bool:
    return False


def test_start_time_survives_any_command_name() -> None:
    """Brackets and blanks in the command's name do not shift the fields."""
    tail = b" ".join(str(number).encode() for number in range(3, 53))
    assert procfs.start_time(b"42 (a) b) (c) " + tail) == 22


def test_interfaces_reads_both_directions() -> None:
    """Columns of net/dev go to the right counters, beyond 32 bits too."""
    assert procfs.interfaces(DEV)["eth0"] == Counters(12, 22, 5000000000, 2000, 3, 5, 4, 6)
    assert list(procfs.interfaces(DEV)) == ["lo", "eth0"]


def test_columns_follow_the_header_not_the_position() -> None:
    """Values are found by name, per protocol; a column this kernel lacks is None; a kept header stays right."""
    read = procfs.Columns(
        ((b"Tcp", b"RetransSegs"), (b"Tcp", b"OutRsts"), (b"Udp", b"RcvbufErrors"), (b"Udp", b"None"))
    )
    assert read(SNMP) == [23, 17, 5, None]
    swapped = SNMP.replace(b"OutRsts RetransSegs", b"RetransSegs OutRsts")
    assert read(swapped) == [17, 23, 5, None]
    assert read(SNMP) == [23, 17, 5, None]


def test_line_value_wants_the_whole_name() -> None:
    """A name that merely begins alike is not taken; a missing one is 0."""
    content = b"Udp6RcvbufErrorsOther 9\nUdp6RcvbufErrors                \t7\n"
    assert procfs.line_value(b"Ip6InReceives 1\n" + content.replace(b" " * 16, b" "), b"Udp6RcvbufErrors") == 7
    assert procfs.line_value(content, b"Missing") == 0


def test_line_value_reads_this_kernel() -> None:
    """The separators that the running kernel uses are understood."""
    try:
        content = Path("/proc/self/net/snmp6").read_bytes()
    except FileNotFoundError:
        pytest.skip("this kernel has no IPv6")
    fields = dict(line.split() for line in content.splitlines())
    assert procfs.line_value(content, b"Udp6RcvbufErrors") == int(fields[b"Udp6RcvbufErrors"])
    assert procfs.line_value(content, b"Ip6InOctets") <= int(fields[b"Ip6InOctets"])


def test_sockets_of_both_families() -> None:
    """Only what belongs to the namespace is taken: in use and TIME_WAIT."""
    content = b"sockets: used 17\nTCP: inuse 3 orphan 9 tw 2 alloc 99 mem 80\nUDP: inuse 4 mem 0\nUDPLITE: inuse 8\n"
    assert procfs.sockets(content) == (3, 2, 4)
    assert procfs.sockets(b"TCP6: inuse 5\nUDP6: inuse 6\n") == (5, 0, 6)


def test_tcp_states_are_counted_across_chunks(tmp_path: Path) -> None:
    """Ten thousand and more lines (the number column grows wider) are each counted once."""
    table = tmp_path / "tcp"
    table.write_bytes(TCP_HEAD + b"".join(tcp_line(number, 1 if number % 3 else 10) for number in range(12_000)))
    counts: Counter[str] = Counter()
    assert procfs.count_tcp_states(str(table), counts, never)
    assert counts == {"established": 8000, "listen": 4000}


def test_tcp_table_is_bounded(tmp_path: Path) -> None:
    """More lines than the limit, a line without end, or time that is over: it stops and says so."""
    table = tmp_path / "tcp"
    table.write_bytes(TCP_HEAD + b"".join(tcp_line(number, 1) for number in range(1000)))
    assert not procfs.count_tcp_states(str(table), Counter(), lambda: True)
    table.write_bytes(b"x" * 200_000)
    assert not procfs.count_tcp_states(str(table), Counter(), never)
    table.write_bytes(b"".join(b"%d: 0:0000 0:0000 01 \n" % number for number in range(200_500)))
    assert not procfs.count_tcp_states(str(table), Counter(), never)


def test_namespace_mounts_decodes_paths_and_skips_others() -> None:
    """Only network namespaces, each once, with octal escapes undone."""
    content = (
        b"22 1 254:0 / / rw - ext4 /dev/root rw\n"
        b"43 42 0:4 net:[4026532177] /run/netns/a\\040b rw shared:2 - nsfs nsfs rw\n"
        b"44 42 0:4 net:[4026532177] /var/run/netns/again rw - nsfs nsfs rw\n"
        b"45 42 0:4 mnt:[4026532178] /run/mnt rw - nsfs nsfs rw\n"
    )
    assert procfs.namespace_mounts(content) == [Mount(4026532177, b"/run/netns/a b")]


def test_interface_indexes_joins_three_files(tmp_path: Path) -> None:
    """An index is found in whichever file has it; a missing file and odd lines do no harm."""
    net = tmp_path / "7" / "net"
    net.mkdir(parents=True)
    (net / "igmp").write_bytes(
        b"Idx\tDevice    : Count Querier\n2\teth0      :     1      V3\n\t\t\t\t010000E0     1 0:0 0\n"
    )
    (net / "if_inet6").write_bytes(b"fe800000000000000000000000000001 0b 40 20 80     wg0\nodd\n")
    assert procfs.interface_indexes(str(tmp_path), 7) == {2: "eth0", 11: "wg0"}


def test_processes_and_network_of_this_host() -> None:
    """This process is listed, and it shares its network namespace's number with itself under its pid."""
    assert os.getpid() in dict(procfs.processes("/proc"))
    assert procfs.network("/proc", "self") == procfs.network("/proc", os.getpid())
    with pytest.raises(FileNotFoundError):
        procfs.network("/proc", 2**22 + 1)


def test_identity_without_cookie_is_zero(tmp_path: Path) -> None:
    """Where the file knows no NS_GET_ID (an older kernel), the cookie is 0 and the inode stands."""
    file = tmp_path / "net"
    file.touch()
    with file.open() as opened:
        assert procfs.namespace_identity(opened.fileno()) == (file.stat().st_ino, 0)


_PARSERS: tuple[Callable[[bytes], object], ...] = (
    procfs.start_time,
    procfs.interfaces,
    procfs.Columns(((b"Tcp", b"RetransSegs"),)),
    lambda content: procfs.line_value(content, b"Udp6RcvbufErrors"),
    procfs.sockets,
    procfs.namespace_mounts,
)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.sampled_from([DEV, SNMP]).flatmap(lambda good: st.integers(0, len(good)).map(lambda cut: good[:cut])),
    )
)
def test_any_content_is_read_or_refused(content: bytes) -> None:
    """No content makes a parser do worse than ValueError."""
    for parse in _PARSERS:
        for text in (content, b"Tcp: " + content, b"Tcp: RetransSegs\nTcp: " + content, b"Udp6RcvbufErrors " + content):
            try:
                parse(text)
            except ValueError:
                continue
