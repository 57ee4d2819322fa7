"""The audit log: what its records say, how often, and that neither a disk nor a flood can harm the exporter."""

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import RecordedFamilies

from exporter import audit
from exporter.audit import Audit, Scrape, Settings
from exporter.audit.file import AppendOnly
from exporter.audit.reads import FAMILIES, Reads
from exporter.audit.scrapes import Scrapes
from exporter.catalog import FAMILIES as CATALOGUE
from exporter.contract import Key
from exporter.load.admission import CLASSES, KeptEvent
from exporter.privacy import REDACTED, safe_label

A, B = "a" * 64, "b" * 64
INFO = "cni_container_info"
ENVIRONMENT = "cni_container_environment_info"
LABELS = "cni_container_label_info"
DROPPED = "cni_exporter_audit_records_dropped_total"
UP = "cni_exporter_audit_up"
TOKEN = "gh" + "p_16C7e42F292c6912E7710c838347Ae178B4a"

Snapshot = Mapping[str, Mapping[Key, float]]


class Log:
    """An audit log with a file to read."""

    def __init__(self, path: Path, **settings: Any) -> None:  # noqa: ANN401 - fields of Settings
        self.path = path
        self.families = RecordedFamilies()
        self.written = RecordedFamilies()
        self.audit = Audit(Settings(path, **settings), self.families, lambda *_: ("shop", "web-0", "app"), safe_label)

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return [record for line in lines for record in [json.loads(line)] if kind in ("", record["record"])]

    def until(self, holds: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self.records(), self.families.snapshots)
            time.sleep(0.005)

    def dropped(self) -> dict[Key, float]:
        return {key: value for key, value in self.families.snapshots[DROPPED].items() if value}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Log]]:
    """Start audit logs that end with the test."""
    made: list[Log] = []

    def start(path: Path | None = None, **settings: Any) -> Log:  # noqa: ANN401 - as above
        made.append(Log(path or tmp_path / "log" / "audit.jsonl", **settings))
        made[-1].audit.start({"version": "1.2.3"})
        return made[-1]

    yield start
    for one in made:
        one.audit.stop()


def info(container_id: str, name: str = "web", image: str = "nginx:1.25") -> Key:
    return (container_id, "", "", name, image, "docker")


def scrape(client: str = "10.0.0.1", path: str = "/metrics", at: float = 1000.0) -> Scrape:
    return Scrape(at, client, "", path, 200, 120, 4000)


# The file


def test_the_file_is_private_and_grows_only(make: Callable[..., Log]) -> None:
    """The directory is made, file and directory are for our user alone, and a second exporter adds to what is there."""
    first = make()
    first.audit.stop()
    second = make()
    second.audit.stop()
    assert [record["record"] for record in second.records()] == ["start", "stop", "start", "stop"]
    assert stat.S_IMODE(second.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(second.path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    """A file that was made with wider permissions loses them before the first line."""
    path = tmp_path / "audit.jsonl"
    path.touch(0o666)
    path.chmod(0o666)
    AppendOnly(path, 1000, 1).append(b"{}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_are_set_aside_by_size_and_their_number_is_bounded(tmp_path: Path) -> None:
    """No file is over the size, no line is lost but those of the oldest files, no line is cut."""
    file = AppendOnly(tmp_path / "a", 100, 3)
    for number in range(60):
        file.append(b"%019d\n" % number)
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a", "a.1", "a.2", "a.3"]
    lines = b"".join((tmp_path / name).read_bytes() for name in reversed(names))
    assert [int(line) for line in lines.split()] == list(range(40, 60))


def test_a_file_set_aside_by_somebody_else_is_begun_anew(tmp_path: Path) -> None:
    """Where logrotate moves or removes the file, the next line makes it again."""
    path = tmp_path / "a"
    file = AppendOnly(path, 1000, 1)
    file.append(b"1\n")
    path.rename(tmp_path / "moved")
    file.append(b"2\n")
    path.unlink()
    file.append(b"3\n")
    file.close()
    assert (path.read_bytes(), (tmp_path / "moved").read_bytes()) == (b"3\n", b"1\n")


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    """What a killed exporter left of a line ends before ours begins."""
    path = tmp_path / "a"
    path.write_bytes(b'{"half":')
    file = AppendOnly(path, 1000, 1)
    file.append(b"{}\n")
    file.append(b"{}\n")
    file.close()
    assert path.read_bytes() == b'{"half":\n{}\n{}\n'


def _directory(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    target = path.with_name("victim")
    target.write_text("precious")
    path.symlink_to(target)


def _under_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.touch()


@pytest.mark.parametrize(
    "obstacle", [_directory, os.mkfifo, _link, _under_a_file], ids=["directory", "fifo", "link", "under a file"]
)
def test_what_cannot_be_written_is_said_and_counted(
    obstacle: Callable[[Path], None], tmp_path: Path, make: Callable[..., Log], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing blocks, nothing is written through a link; up is 0, one warning names the path; the end comes in time."""
    path = tmp_path / "log" / "audit.jsonl"
    path.parent.mkdir()
    obstacle(path)
    started = make(path)
    started.until(lambda: UP in started.families.snapshots)
    assert started.families.value(UP) == 0
    for _ in range(20):
        started.audit.served(scrape())
    started.audit.stop()
    assert [record.getMessage() for record in caplog.records if str(path) in record.getMessage()] != []
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1
    victim = path.with_name("victim")
    assert not path.parent.is_dir() or not victim.exists() or victim.read_text() == "precious"


def test_what_waited_for_the_file_is_written_and_what_was_lost_is_told(
    tmp_path: Path, make: Callable[..., Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records wait in bounded memory; then they are lost, counted, and the log itself says how many it lacks."""
    monkeypatch.setattr(audit, "BACKLOG", 2000)
    monkeypatch.setattr(audit, "_RETRY", 0.01)
    path = tmp_path / "audit.jsonl"
    path.mkdir()
    started = make(path, scrape_interval=0.0)
    for number in range(50):
        started.audit.served(scrape(f"10.0.0.{number}"))
    started.until(lambda: started.dropped().get(("write",), 0) > 30)
    lost = started.dropped()["write",]
    path.rmdir()
    started.until(lambda: started.records("lost"))
    assert started.families.value(UP) == 1
    assert len(started.records("scrape")) == 50 - lost
    assert sum(record["count"] for record in started.records("lost")) == lost
    numbers = [record["seq"] for record in started.records()]
    assert numbers == sorted(set(numbers))


# What was read


def test_what_is_read_is_told_once_and_again_when_it_has_changed() -> None:
    """The same snapshot ten times is one record; another value of a label is another reading."""
    reads = Reads()
    snapshot: dict[str, dict[Key, float]] = {INFO: {info(A): 1.0}, LABELS: {(A, "app", "shop"): 1.0}}
    told = [list(reads.records({**snapshot})) for _ in range(10)]
    assert [len(records) for records in told] == [1] + [0] * 9
    assert told[0][0]["what"] == {"identity": ["name", "image"], "labels": ["app"]}
    (again,) = reads.records({LABELS: {(A, "app", "bar"): 1.0}})
    assert again["what"] == {"labels": ["app"]}


def test_a_record_names_container_and_monitor_and_holds_no_value() -> None:
    """Values of variables and labels are not in the log: only their names, and how many."""
    reads = Reads()
    (record,) = reads.records(
        {INFO: {info(A): 1.0}, ENVIRONMENT: {(A, "LANG", "C.UTF-8"): 1.0, (A, "PASSWORD", ""): 1.0}}
    )
    assert (record["monitor"], record["container_id"], record["container"]) == ("docker", A, "web")
    assert record["what"] == {"environment": {"names": 2, "values": ["LANG"]}, "identity": ["name", "image"]}
    assert "C.UTF-8" not in json.dumps(record)


def test_a_network_namespace_is_its_owners() -> None:
    """The link monitor's reading is told of the owning container; the host's own namespace is nobody's."""
    reads = Reads()
    list(reads.records({INFO: {info(A): 1.0}}))
    netns = {("7:1", A, "4026", "false"): 1.0, ("1:1", "(host)", "1", "false"): 1.0, ("9:1", "", "9", "true"): 1.0}
    (record,) = reads.records({"cni_netns_info": netns})
    assert (record["monitor"], record["container"], record["what"]) == ("links", "web", {"network_namespace": ["4026"]})


def test_a_container_without_a_runtime_was_read_by_the_scan() -> None:
    """Where no runtime's interface told the image, the cgroup scan is the reader."""
    (record,) = Reads().records({INFO: {info(A, A[:12], ""): 1.0}})
    assert record["monitor"] == "cgroup"
    (record,) = Reads().records({INFO: {(A, "shop", "web-0", "", "", "containerd"): 1.0}})
    assert record["monitor"] == "containerd"


def test_a_container_that_came_back_is_read_anew() -> None:
    """What is forgotten with the container is told again when its id returns."""
    reads = Reads()
    assert len(list(reads.records({INFO: {info(A): 1.0}}))) == 1
    assert list(reads.records({INFO: {}})) == []
    assert len(list(reads.records({INFO: {info(A): 1.0}}))) == 1


def test_every_family_that_tells_of_a_reading_is_in_the_catalogue() -> None:
    """The table of readings follows the catalogue, and every family with rows of a container's own data is in it."""
    assert CATALOGUE.keys() >= FAMILIES
    details = {name for name in CATALOGUE if name.startswith("cni_container_") and name.endswith("_info")}
    assert details <= FAMILIES


def test_a_monitors_writer_writes_first(make: Callable[..., Log]) -> None:
    """A monitor that is watched writes the same families as before; the log has its reading."""
    started = make()
    writer = started.audit.witness(started.written)
    writer.replace({INFO: {info(A): 1.0}, "cni_containers": {("docker", "running"): 1.0}})
    writer.add("cni_container_events_total", ("docker", "start"))
    started.until(lambda: started.records("read"))
    assert started.written.value("cni_containers", ("docker", "running")) == 1
    assert started.written.value("cni_container_events_total", ("docker", "start")) == 1
    assert started.records("read")[0]["container_id"] == A


# Who was told


def test_requests_of_a_client_are_added_up() -> None:
    """The first is told at once; those of the next interval are one record: count, bytes, the time of its first."""
    scrapes = Scrapes(60.0)
    (first,) = scrapes.add(scrape(at=1000.0), 0.0)
    assert (first["count"], first["bytes"], first["since"]) == (1, 4000, 1000.0)
    assert [record for second in range(1, 5) for record in scrapes.add(scrape(at=1000.0 + second), float(second))] == []
    assert list(scrapes.due(59.9)) == []
    (together,) = scrapes.due(60.0)
    assert (together["count"], together["bytes"], together["since"], together["time"]) == (4, 16000, 1001.0, 1004.0)
    assert list(scrapes.due(120.0)) == []
    assert len(list(scrapes.add(scrape(), 121.0))) == 1


def test_clients_paths_and_answers_are_told_apart() -> None:
    """Each client, path and status has its own records, and an interval of zero adds nothing up."""
    scrapes = Scrapes(60.0)
    given = [scrape("10.0.0.1"), scrape("10.0.0.2"), scrape("10.0.0.1", "/")]
    assert [len(list(scrapes.add(one, 0.0))) for one in given] == [1, 1, 1]
    each = Scrapes(0.0)
    assert [len(list(each.add(scrape(), 0.0))) for _ in range(5)] == [1] * 5


def test_clients_without_number_take_bounded_memory() -> None:
    """A thousand addresses are told, each once; what had been added up for those that make room is told too."""
    scrapes = Scrapes(60.0)
    told = 0
    for _ in range(2):
        for number in range(1000):
            told += sum(int(str(record["count"])) for record in scrapes.add(scrape(f"10.0.{number}"), 0.0))
    told += sum(int(str(record["count"])) for record in scrapes.due(60.0))
    assert told == 2000


# The log as a whole


def test_start_reload_and_stop_are_records(make: Callable[..., Log]) -> None:
    """In order, numbered, with the time in UTC; what waited for its interval comes before the end."""
    started = make()
    started.audit.note("reload", {"successful": True})
    for _ in range(3):
        started.audit.served(scrape())
    started.audit.stop()
    records = started.records()
    assert [record["record"] for record in records] == ["start", "reload", "scrape", "scrape", "stop"]
    assert [record["seq"] for record in records] == [1, 2, 3, 4, 5]
    assert records[3]["count"] == 2
    assert records[3]["time"] == "1970-01-01T00:16:40.000Z"
    assert records[0]["version"] == "1.2.3"


def test_events_of_the_chosen_classes_are_records(make: Callable[..., Log]) -> None:
    """A container's end is recorded with names; a class that was not chosen is not."""
    started = make()
    for class_ in ("container", "packet_drop"):
        started.audit.tap(KeptEvent(5.0, class_, "die", CLASSES[class_], container_id=A, details={"runtime": "docker"}))
    started.audit.stop()
    (record,) = started.records("event")
    assert (record["class"], record["kind"], record["pod"], record["container"]) == ("container", "die", "web-0", "app")
    assert record["details"] == {"runtime": "docker"}


def test_every_text_passes_the_gate(make: Callable[..., Log]) -> None:
    """A token is in no record, wherever it stands: names, details, paths, clients, the exporter's own facts."""
    started = make()
    writer = started.audit.witness(started.written)
    writer.replace({INFO: {info(A, TOKEN): 1.0}, LABELS: {(A, TOKEN, "x"): 1.0}})
    started.audit.tap(KeptEvent(5.0, "container", TOKEN, "info", command=TOKEN, details={TOKEN: TOKEN}))
    started.audit.served(scrape(TOKEN, f"/{TOKEN}"))
    started.audit.note("reload", {"node": TOKEN})
    started.audit.stop()
    text = started.path.read_text()
    assert TOKEN not in text
    assert text.count(REDACTED) == 9


def test_the_rate_is_bounded_and_the_rest_is_counted(make: Callable[..., Log]) -> None:
    """A flood of events leaves room for scrapes: as many as the rate allows are records, the others are counted."""
    started = make(rate=5)
    for number in range(1000):
        started.audit.tap(KeptEvent(float(number), "container", "start", "critical"))
    started.audit.served(scrape())
    started.audit.stop()
    recorded = len(started.records("event"))
    assert 100 <= recorded < 200
    assert started.dropped() == {("rate",): 1000.0 - recorded}
    assert sum(record["count"] for record in started.records("lost")) == 1000 - recorded
    assert len(started.records("scrape")) == 1


def test_a_disk_that_hangs_holds_nobody(
    make: Callable[..., Log], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a write does not return, whoever feeds the log does: bounded queue, counted loss, an end in time."""
    hangs, on = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        on.wait(30)

    monkeypatch.setattr(AppendOnly, "append", hang)
    monkeypatch.setattr(audit, "QUEUE", 100)
    monkeypatch.setattr(audit, "_STOP", 0.05)
    started = make()
    assert hangs.wait(10)
    for _ in range(500):
        started.audit.served(scrape())
    for _ in range(50):
        started.audit.witness(started.written).replace({INFO: {info(A): 1.0}})
    assert started.dropped() == {("queue",): 500.0 - 100 + 50}
    started.audit.stop()
    on.set()
    assert "does not answer" in caplog.text


def test_snapshots_that_wait_are_few(make: Callable[..., Log], monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots hold whole families: few may wait, however much room there is for smaller things."""
    hangs, on = threading.Event(), threading.Event()
    monkeypatch.setattr(AppendOnly, "append", lambda *_: (hangs.set(), on.wait(30)))
    started = make()
    assert hangs.wait(10)
    for _ in range(audit.WRITES + 7):
        started.audit.witness(started.written).replace({INFO: {info(A): 1.0}})
    assert started.dropped() == {("queue",): 7.0}
    on.set()


def test_without_a_start_nothing_is_kept(tmp_path: Path) -> None:
    """Commands that look once, such as `topology`, write no audit log."""
    idle = Log(tmp_path / "a")
    idle.audit.witness(idle.written).replace({INFO: {info(A): 1.0}})
    idle.audit.served(scrape())
    idle.audit.stop()
    assert not (tmp_path / "a").exists()
    assert idle.families.snapshots == {}


@given(st.dictionaries(st.tuples(st.text(max_size=8), *[st.text()] * 5), st.just(1.0), max_size=5), st.text())
def test_any_text_makes_a_line(containers: dict[Key, float], label: str) -> None:
    """Whatever containers call themselves: one line of valid UTF-8 and JSON each."""
    log = Log(Path("/nowhere"))
    snapshots: Snapshot = {INFO: containers, LABELS: {(key[0], label, label): 1.0 for key in containers}}
    for record in Reads().records(snapshots):
        line = log.audit._encode(record)
        assert line.count(b"\n") == 1
        assert json.loads(line)["record"] == "read"
