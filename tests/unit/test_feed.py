"""The live feed: filters on the server, losses told to whom they hit, bad readers, the socket's file, the end."""

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from recorder import RecordedFamilies

from exporter import feed as module
from exporter import follow
from exporter.cli import main
from exporter.feed import Feed
from exporter.feed_protocol import default_socket, parse_filter
from exporter.load.admission import CLASSES, Admission, KeptEvent
from exporter.metrics import Store
from exporter.privacy import DEFAULT

A, B = "a" * 64, "b" * 64
NAMES = {"1:1": ("shop", "cart", ""), "2:2": ("shop", "stock", ""), "": ("", "", "web")}


class Reader:
    """A reader of the socket."""

    def __init__(self, path: Path, request: object = None) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self.file = self.sock.makefile("rb")
        if request is not None:
            with contextlib.suppress(BrokenPipeError):  # refused already: the answer says why
                self.sock.sendall(json.dumps(request).encode() + b"\n")

    def following(self) -> "Reader":
        assert "following" in self.line()
        return self

    def line(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the feed hung up"
        return dict(json.loads(line))

    def ended(self) -> bool:
        try:
            return self.file.readline() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class House:
    """A feed, an admission, and the readers that the test has made."""

    def __init__(self, path: Path) -> None:
        self.families = RecordedFamilies()
        self.admission = Admission()
        self.hidden: set[str] = set()
        self.feed = Feed(
            path,
            self.admission,
            self.families,
            names=lambda netns, _: NAMES.get(netns, ("", "", "")),
            clean=DEFAULT.safe_label,
            shows=lambda namespace: namespace not in self.hidden,
        )
        self.readers: list[Reader] = []

    def reader(self, **wanted: object) -> Reader:
        self.readers.append(Reader(self.feed.path, wanted))
        return self.readers[-1].following()

    def tell(self, class_: str, kind: str = "created", **fields: Any) -> None:  # noqa: ANN401 - any field
        self.admission.record_event(KeptEvent(1.5, class_, kind, CLASSES[class_], **fields))

    def following(self, count: int) -> bool:
        return until(lambda: self.families.value("cni_exporter_feed_readers") == count)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "feed" / "events.sock")
    assert made.feed.start()
    yield made
    for reader in made.readers:
        reader.close()
    made.feed.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


# Events


def test_an_event_arrives_whole_and_with_names(house: House) -> None:
    """Every field, the workload's names, the details in their order."""
    reader = house.reader()
    house.tell("packet_drop", "dropped", netns="1:1", pid=7, command="curl", weight=4.0, details={"b": "x", "a": 2})
    assert reader.line() == {
        "time": 1.5,
        "class": "packet_drop",
        "priority": "error",
        "kind": "dropped",
        "namespace": "shop",
        "pod": "cart",
        "container": "",
        "netns": "1:1",
        "container_id": "",
        "pid": 7,
        "command": "curl",
        "weight": 4.0,
        "details": {"b": "x", "a": 2},
    }


def test_each_reader_gets_what_it_asked_for(house: House) -> None:
    """By class, by pod, by container, by all of them; the rest never leaves the server."""
    drops = house.reader(**{"class": ["packet_drop", "exec"]})
    cart = house.reader(pod="shop/cart")
    web = house.reader(**{"class": ["veth"], "container": "web"})
    house.tell("veth", netns="2:2")
    house.tell("veth", netns="1:1")
    house.tell("packet_drop", "dropped", netns="2:2")
    house.tell("veth")
    house.tell("exec", "end", netns="1:1")
    house.tell("veth", "end")
    assert [line["class"] for line in up_to_end(drops)] == ["packet_drop", "exec"]
    assert [line["class"] for line in up_to_end(cart)] == ["veth", "exec"]
    assert [(line["class"], line["container"]) for line in up_to_end(web)] == [("veth", "web")] * 2


def up_to_end(reader: Reader) -> list[dict[str, Any]]:
    lines = [reader.line()]
    while lines[-1]["kind"] != "end":
        lines.append(reader.line())
    return lines


def test_no_secret_and_no_control_character_leaves(house: House) -> None:
    """Every text passes the gate, also the names and texts of details."""
    reader = house.reader()
    bait = "AKIAIOSFODNN7EXAMPLE"
    house.tell("exec", f"x {bait}", netns="1:1", command=f"\x1b[31m {bait}", details={f"n {bait}": f"v {bait}"})
    line = reader.file.readline().decode()
    assert bait not in line
    assert "\\u001b" not in line
    assert line.count("[redacted]") == 4


def test_pods_that_the_configuration_leaves_out_are_not_shown(house: House) -> None:
    """The filter of Kubernetes namespaces holds for the feed too."""
    reader = house.reader()
    house.hidden.add("shop")
    house.tell("veth", netns="1:1")
    house.tell("veth")
    assert reader.line()["container"] == "web"


def test_nobody_taps_while_nobody_reads(house: House) -> None:
    """The admission is tapped from the first reader to the last, however they leave."""
    assert not house.admission.wanted
    first, second = house.reader(), house.reader()
    assert house.following(2)
    assert house.admission.wanted
    first.close()
    assert house.following(1)
    assert house.admission.wanted
    second.close()
    assert house.following(0)
    assert not house.admission.wanted


# Slow readers


def test_a_slow_reader_loses_its_own_events_and_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reader takes nothing: what it gets and what it is told adds up; the other one misses nothing."""
    monkeypatch.setattr(module, "QUEUE", 100)
    slow, good = house.reader(), house.reader()
    count, got = 3000, []
    taking = threading.Thread(target=lambda: got.extend(good.line() for _ in range(count)))
    taking.start()
    for number in range(count):
        house.tell("veth", pid=number, details={"filler": "x " * 100})
        assert until(lambda sent=number: len(got) > sent - 90), "the good reader is kept waiting"
    taking.join(20)
    assert [line["pid"] for line in got] == list(range(count))
    events, lost, expected = 0, 0, 0
    while events + lost < count:
        line = slow.line()
        if "lost" in line:
            lost += line["lost"]
            expected += line["lost"]
        else:
            assert line["pid"] == expected, "a loss is told where it happened"
            events, expected = events + 1, expected + 1
    assert lost > 0
    assert house.families.value("cni_exporter_feed_lost_total") == lost


def test_a_reader_that_takes_nothing_is_cut(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is free again, and what it lost is counted."""
    monkeypatch.setattr(module, "_PATIENCE", 1.0)
    monkeypatch.setattr(module, "QUEUE", 100)
    house.reader()

    def cut() -> bool:
        for _ in range(50):
            house.tell("veth", details={"filler": "x " * 100})
        return house.families.value("cni_exporter_feed_readers") == 0

    assert until(cut, 20)
    assert house.families.value("cni_exporter_feed_lost_total") > 0


# Bad readers


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"null\n",
        b'{"class": "veth"}\n',
        b'{"class": ["nonsense"]}\n',
        b'{"class": [["veth"]]}\n',
        b'{"pod": "cart"}\n',
        b'{"pod": 7}\n',
        b'{"container": {}}\n',
        b'{"select": "*"}\n',
        b"[" * 50_000 + b"\n",
        b"x" * (1 << 20) + b"\n",
    ],
    ids=lambda request: repr(request[:20]),
)
def test_a_bad_request_is_refused_in_words(house: House, request_: bytes) -> None:
    """Whatever is asked, the answer is one line with the reason; a good reader is served beside."""
    good = house.reader()
    bad = Reader(house.feed.path)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it had said everything
        bad.sock.sendall(request_)
    assert bad.line()["error"]
    assert bad.ended()
    bad.close()
    house.tell("veth")
    assert good.line()["class"] == "veth"


def test_a_reader_that_says_nothing_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a request has a deadline, however slowly its bytes trickle."""
    monkeypatch.setattr(module, "_REQUEST_TIMEOUT", 0.2)
    silent = Reader(house.feed.path)
    silent.sock.sendall(b"{")
    assert "no request within" in silent.line()["error"]
    silent.close()


def test_the_reader_after_the_last_place_is_refused_in_words(house: House) -> None:
    """Sixteen follow; the seventeenth reads why it cannot; a place that becomes free is given away."""
    readers = [house.reader() for _ in range(16)]
    late = Reader(house.feed.path, {})
    assert "16 readers are connected already" in late.line()["error"]
    assert late.ended()
    late.close()
    readers[0].close()
    assert house.following(15)
    house.reader()
    house.tell("veth")
    assert all(reader.line()["class"] == "veth" for reader in readers[1:])


# The socket


def test_the_socket_is_for_our_own_user_alone(house: House) -> None:
    """Its directory too, whatever the umask."""
    assert stat.S_IMODE(house.feed.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(house.feed.path.parent.stat().st_mode) == 0o700


def test_a_stale_socket_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    """What a killed exporter left behind is in nobody's way."""
    path = tmp_path / "events.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    house = House(path)
    assert house.feed.start()
    house.reader().close()
    house.feed.stop()
    assert not path.exists()


def test_the_feed_of_another_exporter_is_left_alone(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The second exporter warns and does without; the first one's feed goes on."""
    second = House(house.feed.path)
    assert not second.feed.start()
    second.feed.stop()
    assert "another exporter has its feed there" in caplog.text
    assert second.families.value("cni_exporter_feed_up") == 0
    house.reader()


@pytest.mark.parametrize("place", ["file", "long", "nowhere"])
def test_a_socket_that_cannot_be_had_is_a_warning(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    """The exporter runs without its feed: a plain file of that name is kept, a path may be too long or impossible."""
    (tmp_path / "file").write_text("mine")
    path = {"file": tmp_path / "file", "long": tmp_path / ("x" * 120), "nowhere": Path("/proc/none/events.sock")}[place]
    house = House(path)
    assert not house.feed.start()
    house.feed.stop()
    assert f"no live feed at {path}" in caplog.text
    assert house.families.value("cni_exporter_feed_up") == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_where_the_socket_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's is the system's, a user's is in the runtime directory; without that, the message says what to set."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket() == Path("/run/cni-exporter/events.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_socket() == Path("/run/user/1000/cni-exporter/events.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(OSError, match=r"set feed\.socket"):
        default_socket()


def test_the_end_is_bounded(house: House) -> None:
    """Readers that take nothing, that wait and that have said nothing yet do not hold the exporter up."""
    Reader(house.feed.path).close()
    silent = Reader(house.feed.path)
    full, idle = house.reader(**{"class": ["veth"]}), house.reader(**{"class": ["exec"]})
    for _ in range(5000):
        house.tell("veth", details={"filler": "x " * 100})
    started = time.monotonic()
    house.feed.stop()
    assert time.monotonic() - started < 1.0
    assert idle.ended()
    assert not house.feed.path.exists()
    assert not house.admission.wanted
    assert full.line()["class"] == "veth", "what was sent can still be read"
    silent.close()


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    """Readers that came, were refused and went leave nothing open."""
    house = House(tmp_path / "events.sock")
    before = descriptors()
    assert house.feed.start()
    for _ in range(5):
        house.reader().close()
        Reader(house.feed.path, []).close()
        Reader(house.feed.path).close()
    house.feed.stop()
    assert until(lambda: descriptors() == before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_request_that_asks_for_nothing_gets_everything() -> None:
    """Each part of a request is optional."""
    wanted = parse_filter(b"{}")
    assert (wanted.classes, wanted.pod, wanted.container) == (frozenset(CLASSES), "", "")


# Names


def test_the_store_names_events() -> None:
    """By container, by exact namespace, by inode where there is no cookie to compare; the host; nobody."""
    store = Store()
    info = {(A, "shop", "cart", "", "", "containerd"): 1.0, (B, "", "", "web", "", "docker"): 1.0}
    store.replace("runtimes", {"cni_container_info": info})
    netns = {
        ("10:1", A, "10", "false"): 1.0,
        ("11:g4", B, "11", "false"): 1.0,
        ("12:3", "(host)", "12", "false"): 1.0,
        ("13:4", "c" * 64, "13", "false"): 1.0,
        ("proc-14:g9", B, "proc-14", "false"): 1.0,
    }
    store.replace("links", {"cni_netns_info": netns})
    assert store.names_of("", B) == ("", "", "web")
    assert store.names_of("10:1") == ("shop", "cart", "")
    assert store.names_of("10:2") == ("", "", ""), "the inode is used again: another namespace"
    assert store.names_of("11:99") == store.names_of("11:g4") == ("", "", "web")
    store.replace("kernel", {"cni_netns_alias": {("50:5", "proc-14"): 1.0, ("51:5", "proc-15"): 1.0}})
    assert store.names_of("50:5") == ("", "", "web"), "known by its alias"
    assert store.names_of("51:5") == ("", "", ""), "an alias that is not listed"
    assert store.names_of("12:3") == ("", "", "(host)")
    assert store.names_of("13:4") == ("", "", "c" * 12)
    assert store.names_of("", "d" * 64) == ("", "", "d" * 12)
    assert store.names_of("99:9") == store.names_of("") == ("", "", "")


def test_names_are_known_for_a_while_after_the_end() -> None:
    """The event that tells of an end comes when the families have forgotten already; memory of it is bounded."""
    store = Store()
    store.replace("runtimes", {"cni_container_info": {(A, "shop", "cart", "", "", "containerd"): 1.0}})
    store.replace("links", {"cni_netns_info": {("10:1", A, "10", "false"): 1.0}})
    store.names_of("")
    store.replace("runtimes", {"cni_container_info": {}})
    store.replace("links", {"cni_netns_info": {}})
    assert store.names_of("10:1") == store.names_of("", A) == ("shop", "cart", "")
    for number in range(3000):
        store.replace("links", {"cni_netns_info": {(f"{number}:7", "", "", "false"): 1.0}})
        store.names_of("")
    assert store.names_of("10:1") == ("", "", "")
    assert len(store._names._gone) <= 2048


# The command


def run(house: House, *arguments: str, tell: int = 3) -> Any:  # noqa: ANN401 - click's result
    """Run the command while events happen."""
    stop = threading.Event()

    def work() -> None:
        if until(lambda: house.admission.wanted or stop.is_set()):
            for number in range(tell):
                house.tell("veth", netns="1:1", pid=number, command="ip", details={"device": f"veth{number}"})

    teller = threading.Thread(target=work)
    teller.start()
    try:
        return CliRunner().invoke(main, ["events", "--socket", str(house.feed.path), *arguments])
    finally:
        stop.set()
        teller.join(10)


def test_the_command_prints_columns(house: House) -> None:
    """A line of heads, then a line per event that a person can read; --count ends it."""
    result = run(house, "--count", "2", "--class", "veth", "--pod", "shop/cart")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split() == ["time", "class", "workload", "kind", "details"]
    assert [line.split()[1:] for line in lines[1:]] == [
        ["veth", "shop/cart", "created", f"device=veth{number}", f"by=ip[{number}]"] for number in range(2)
    ]


def test_the_command_prints_json_lines(house: House) -> None:
    """Each line is a record of the feed; --for ends it."""
    result = run(house, "--json", "--for", "0.5")
    assert result.exit_code == 0
    assert [json.loads(line)["pid"] for line in result.stdout.splitlines()] == [0, 1, 2]


def test_the_command_says_that_the_exporter_ended(house: House) -> None:
    """The end of the feed is an end of the command, with a reason."""
    ending = threading.Thread(target=lambda: until(lambda: house.admission.wanted) and house.feed.stop())
    ending.start()
    result = run(house, tell=0)
    ending.join(10)
    assert result.exit_code == 1
    assert "the exporter ended" in result.stderr


def test_the_command_tells_of_losses(tmp_path: Path) -> None:
    """Columns: on standard error, as it is no event; JSON: a line of its own. Neither counts for --count."""
    lines = [{"following": {}}, {"lost": 5}, {**line_of("veth"), "weight": 2.5}]
    text = served(tmp_path / "one", lines, "--count", "1")
    assert "5 events were lost here" in text.stderr
    assert "weight=2.5" in text.stdout
    as_json = served(tmp_path / "two", lines, "--count", "1", "--json")
    assert [json.loads(line) for line in as_json.stdout.splitlines()] == lines[1:]


def line_of(class_: str) -> dict[str, Any]:
    names = dict.fromkeys(("namespace", "pod", "container", "container_id", "command", "kind", "priority"), "")
    return {"time": 1.0, "class": class_, **names, "netns": "5:1", "pid": 0, "weight": 1.0, "details": {}}


def served(path: Path, lines: list[dict[str, Any]], *arguments: str) -> Any:  # noqa: ANN401 - click's result
    """Run the command against a server of the test's own."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1024)
                sock.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

        answering = threading.Thread(target=answer)
        answering.start()
        result = CliRunner().invoke(main, ["events", "--socket", str(path), *arguments])
        answering.join(10)
    return result


def test_the_command_refuses_in_words(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exporter, one that was killed, no permission, a wrong class, a stranger's socket: each says what to do."""
    absent = CliRunner().invoke(main, ["events", "--socket", str(tmp_path / "none")])
    assert (absent.exit_code, "no exporter offers its feed there" in absent.stderr) == (1, True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "stale"))
    assert "has ended" in CliRunner().invoke(main, ["events", "--socket", str(tmp_path / "stale")]).stderr
    wrong = run(house, "--class", "vethh", tell=0)
    assert (wrong.exit_code, "expected a list of container, netns, veth" in wrong.stderr) == (1, True)
    assert "no exporter's feed" in served(tmp_path / "list", [{"following": {}}, [1]]).stderr  # type: ignore[list-item]
    assert "no exporter's feed" in served(tmp_path / "stranger", [{"class": "veth"}]).stderr

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert "run this command as that user, or as root" in CliRunner().invoke(main, ["events", "--socket", "/x"]).stderr


def test_the_command_ends_cleanly_on_ctrl_c(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback, no error."""

    def interrupted(*_: object) -> Iterator[follow.Record]:
        yield line_of("veth")
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow", interrupted)
    result = CliRunner().invoke(main, ["events"])
    assert result.exit_code == 0
    assert "netns 5" in result.stdout
