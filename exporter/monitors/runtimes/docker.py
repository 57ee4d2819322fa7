"""Docker through the Engine API: a list, then every lifecycle event as it happens.

Flows in: the daemon's answers and its stream of events (Docker Engine API, /containers/json and /events). Flows out:
records into the table of containers, counts of lifecycle events, and these events.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.contract import Context, Source, Unsupported
from exporter.monitors.runtimes import docker_stream, sockets
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.docker_answers import RUNTIME, STATE_AFTER, Event, read_container
from exporter.monitors.runtimes.docker_stream import EventStream
from exporter.monitors.runtimes.record import Metadata, Record, lifecycle, tell

if TYPE_CHECKING:
    import docker

_COUNTED = {
    **{name: name for name in ("create", "start", "stop", "die", "oom", "pause", "unpause")},
    "destroy": "remove",
}
"""Docker's names of events, and ours."""
_RELIST = 60.0
_PING = 5.0
_FEW = 100
"""Containers that are listed by id; more of them are a full list."""
_INSPECTING = 0.5
"""Seconds of one update that go into asking for variables."""


class DockerEvents(Source):
    """Docker by its events; a full list at the start, then every minute, corrects whatever was missed."""

    mode = "events"

    def __init__(self, table: Containers, metadata: Metadata, paths: Iterable[str], cursor: dict[str, int]) -> None:
        """Look for the daemon at `paths`; `cursor` keeps the time of the last event from one source to the next."""
        self._table = table
        self._metadata = metadata
        self._paths = tuple(paths)
        self._cursor = cursor
        self._client: docker.APIClient | None = None
        self._stream: EventStream | None = None
        self._next_list = self._next_ping = 0.0
        self._again: set[str] = set()
        self._unasked: dict[str, None] = {}

    def open(self, context: Context) -> None:
        """Connect. Raises Unsupported where no daemon is to be found, docker.errors or OSError where it is silent."""
        super().open(context)
        try:
            path = sockets.find(self._paths, RUNTIME)
            client = _client(path)
        except Unsupported:
            self._table.absent(RUNTIME)
            raise
        self._client = client
        since = self._cursor.get("nanoseconds", time.time_ns()) + 1
        # The stream first, so that nothing is lost between the list and the first event.
        self._stream = EventStream(path, client.api_version, since, context)
        for name in _COUNTED.values():
            context.families.add("cni_container_events_total", (RUNTIME, name), 0)
        self._list(client)
        self._table.up(RUNTIME, self)

    def update(self) -> None:
        """Apply the events. Raises ConnectionError where the stream ended, requests' errors where nobody answers."""
        client, stream = self._client, self._stream
        if client is None or stream is None:
            raise ConnectionError("the Docker source is not open")
        events = stream.take()
        touched = self._apply(events)
        self._table.publish(self.context.families)  # an event tells enough for the names; the rest may take longer
        self._tell(events)
        now = time.monotonic()
        if stream.overflowed() or now >= self._next_list or len(touched) > _FEW:
            self._list(client, touched)
        elif touched or self._again:
            # Docker announces some changes before its list shows them, so each is looked at twice.
            self._look_at(client, touched | self._again)
            self._again = touched
        elif now >= self._next_ping:
            client.ping()
            self._next_ping = now + _PING
        if stream.ended:
            raise ConnectionError(f"Docker closed its event stream: {stream.reason}")
        self._inspect(client)
        self._table.publish(self.context.families)

    def close(self) -> None:
        """End the stream and its thread, close the connections."""
        self._table.down(RUNTIME, self)
        if self._stream:
            self._stream.close()
        if self._client:
            self._client.close()

    def _apply(self, events: Iterable[Event]) -> set[str]:
        """Do at once what an event alone tells; answer whom to look at more closely."""
        touched: set[str] = set()
        for event in events:
            self._cursor["nanoseconds"] = max(event.nanoseconds, self._cursor.get("nanoseconds", 0))
            if event.action in _COUNTED:
                self.context.families.add("cni_container_events_total", (RUNTIME, _COUNTED[event.action]))
            if event.action == "destroy":
                self._table.remove(RUNTIME, event.container_id)
                touched.discard(event.container_id)
                self._again.discard(event.container_id)
                continue
            touched.add(event.container_id)
            known = self._table.get(RUNTIME, event.container_id) or event.record
            if known and event.action in STATE_AFTER:
                self._put(replace(known, state=STATE_AFTER[event.action]))
        return touched

    def _tell(self, events: Iterable[Event]) -> None:
        """Pass the events on to those who watch, when the names are known."""
        for event in events:
            if event.action in _COUNTED:
                kind, seconds = _COUNTED[event.action], event.nanoseconds / 1e9
                tell(self.context.events, lifecycle(RUNTIME, kind, event.container_id, seconds))

    def _put(self, record: Record) -> None:
        if not self._table.put(RUNTIME, record):
            self.context.dropped()

    def _list(self, client: "docker.APIClient", touched: Collection[str] = ()) -> None:
        records = list(self._records(client.containers(all=True), touched))
        self._shed(self._table.reconcile(RUNTIME, records))
        now = time.monotonic()
        self._next_list, self._next_ping = now + _RELIST, now + _PING
        self._again = set(touched)
        self._ask_for_environment(records)

    def _look_at(self, client: "docker.APIClient", touched: Collection[str]) -> None:
        """List a few. The list is answered from a snapshot: unlike inspect it waits for no container's lock."""
        answer = client.containers(all=True, filters={"id": list(touched)})
        records = list(self._records(answer, touched))
        for record in records:
            self._put(record)
        for gone in set(touched) - {record.container_id for record in records}:
            self._table.remove(RUNTIME, gone)
        self._ask_for_environment(records)

    def _records(self, answer: object, touched: Collection[str]) -> Iterator[Record]:
        """Read a list; what is malformed is counted and skipped.

        What only inspect tells is carried over. So is the state of those that an event has just `touched`: the list
        may be older than the event.
        """
        if not isinstance(answer, list):
            self.context.error("docker_answer", f"Docker's list of containers is a {type(answer).__name__}")
            return
        for item in answer:
            try:
                record = read_container(item, self._metadata, self._shed)
            except (TypeError, ValueError, AttributeError) as error:
                self.context.error("docker_answer", f"a container in Docker's list cannot be read: {error}")
                continue
            known = self._table.get(RUNTIME, record.container_id)
            if known:
                state = known.state if record.container_id in touched else record.state
                record = replace(record, environment=known.environment, state=state)
            yield record

    def _shed(self, count: int) -> None:
        if count:
            self.context.dropped(count)

    def _ask_for_environment(self, records: Iterable[Record]) -> None:
        if self._metadata.wants_environment:
            self._unasked.update((record.container_id, None) for record in records if not record.environment)

    def _inspect(self, client: "docker.APIClient") -> None:
        """Ask for the variables of those that are new, for a bounded time; the rest at the next update."""
        import docker.errors  # noqa: PLC0415 - a client is imported where it is used, and only then
        import requests  # noqa: PLC0415 - as above

        until = time.monotonic() + _INSPECTING
        while self._unasked and time.monotonic() < until:
            container_id = next(iter(self._unasked))
            del self._unasked[container_id]
            try:
                answer: Any = client.inspect_container(container_id)
                entries = answer["Config"]["Env"]
            except docker.errors.NotFound:
                continue
            except (requests.RequestException, docker.errors.APIError, TypeError, KeyError) as error:
                self.context.error("docker_inspect", f"container {container_id[:12]}: {error}")
                continue
            known = self._table.get(RUNTIME, container_id)
            if known:
                self._put(replace(known, environment=self._metadata.keep_environment(entries, self._shed)))
        if self._unasked:
            self.context.wake()


def _client(path: str) -> "docker.APIClient":
    try:
        import docker  # noqa: PLC0415 - 9 MB that only a machine with Docker pays
    except ImportError as error:
        raise Unsupported(f"the docker package is missing: {error}", "install docker>=7.1") from error
    return docker.APIClient(base_url=f"unix://{path}", timeout=max(int(docker_stream.TIMEOUT), 1), version="auto")
