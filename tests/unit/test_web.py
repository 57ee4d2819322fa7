"""HTTP: routes, manners, limits, and a good scrape beside every kind of bad client; all on loopback."""

import contextlib
import json
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import TOPOLOGY, Served, until

from exporter.http1 import HEAD_LIMIT, Refused, Request, parse


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers that are stopped behind the test, and leave no thread."""
    running: list[Served] = []

    def start(*arguments: str, **options: float) -> Served:
        running.append(Served(*arguments, **options))
        return running[-1]

    yield start
    for served in running:
        served.server.stop()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("web")] == []


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve()


# Routes


def test_metrics_passes_negotiation_on_and_the_answer_back(served: Served) -> None:
    """The application sees Accept and Accept-Encoding, repeated ones joined; its headers and body come back."""
    answer = served.raw(
        b"GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\nAccept: text/plain\r\naccept: */*\r\nAccept-Encoding: gzip\r\n\r\n"
    )
    assert served.application.asked == [("text/plain, */*", "gzip")]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/plain; version=0.0.4" in head
    assert body == b"cni_veths 3\n"


def test_server_says_no_more_than_its_name(served: Served) -> None:
    """The Server header has no versions of Python or of ours."""
    response = served.get()
    assert response.getheader("Server") == "cni-exporter"
    assert response.getheader("Date")


@pytest.mark.parametrize("path", ["/-/healthy", "/-/ready"])
def test_probes_answer_by_status(served: Served, path: str) -> None:
    """200 where all is well, 503 where not, with the explanation in both."""
    assert served.get(path).status == 200
    served.application.good = False
    response = served.get(path)
    assert response.status == 503
    assert response.read() == b"links: netlink\ndocker: api\n"


def test_page_forbids_scripts_and_caching(served: Served) -> None:
    """The landing page is UTF-8, and a browser is told to run nothing, guess nothing and keep nothing."""
    response = served.get("/")
    policy = response.getheader("Content-Security-Policy", "")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert response.getheader("X-Content-Type-Options") == "nosniff"
    assert response.getheader("Cache-Control") == "no-store"
    assert "caf\N{LATIN SMALL LETTER E WITH ACUTE}" in response.read().decode()


def test_topology_is_json(served: Served) -> None:
    """/topology.json serves what the callback gives."""
    assert json.loads(served.get("/topology.json").read()) == TOPOLOGY


@pytest.mark.parametrize("address", ["127.0.0.1:0", ":0"], ids=["IPv4", "both families"])
def test_who_was_told_what_is_known(serve: Callable[..., Served], address: str) -> None:
    """Each request that could be read is told with the client's address in its plain form, path, status and size."""
    served = serve(address)
    with socket.create_connection(("127.0.0.1", served.server.address[1]), timeout=10) as sock:
        sock.sendall(b"GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n\r\nGET /no HTTP/1.1\r\nHost: h\r\n\r\nnonsense\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    assert until(lambda: len(served.answered) == 2)
    assert served.answered[0] == ("127.0.0.1", "/metrics", 200, 12)
    assert served.answered[1][:3] == ("127.0.0.1", "/no", 404)


def test_unknown_path_is_not_found(served: Served) -> None:
    """404 names the paths there are."""
    response = served.get("/metrics/../etc/passwd")
    assert response.status == 404
    assert b"/metrics" in response.read()


def test_head_has_the_length_and_no_body(served: Served) -> None:
    """HEAD answers as GET would, without the body."""
    answer = served.raw(b"HEAD /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
    assert b"Content-Length: 12\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE", "CONNECT", "get"])
def test_other_methods_are_refused(served: Served, method: str) -> None:
    """405 says what is allowed."""
    response = served.get("/metrics", method)
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"
    assert served.application.asked == []


def test_a_failing_application_is_an_answer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """500 without details outside, the traceback in the log, a count; the next request is served."""

    def fail() -> NoReturn:
        raise RuntimeError("password=hunter2")

    served.application.page = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        response = served.get("/")
    assert response.status == 500
    assert b"hunter2" not in response.read()
    assert "Traceback" in caplog.text
    assert served.dropped == {"error": 1}
    assert served.get().status == 200


# The protocol


def test_a_connection_serves_many_requests(served: Served) -> None:
    """HTTP/1.1 keeps the connection; requests sent ahead are answered in their order."""
    with served.connect() as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n\r\nGET /none HTTP/1.1\r\nHost: h\r\n\r\n")
        sock.sendall(b"GET /-/ready HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200"]


@pytest.mark.parametrize(("line", "kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)])
def test_http_1_0_ends_the_connection_unless_asked(served: Served, line: bytes, kept: bool) -> None:  # noqa: FBT001
    """HTTP/1.0 has one request per connection, but for `keep-alive`."""
    with served.connect() as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n" + line + b"\r\n")
        sock.settimeout(0.5)
        answer = b""
        with contextlib.suppress(TimeoutError):
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
            assert not kept
            assert b"Connection: close" in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /met rics HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : h\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\nHost: h\n\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"y" * HEAD_LIMIT, 431),
    ],
)
def test_malformed_requests_are_told_so(served: Served, data: bytes, status: int) -> None:
    """Each gets its status and a sentence, at once, and the connection ends; the application is not asked."""
    begun = time.monotonic()
    answer = served.raw(data)
    assert answer.split()[1] == str(status).encode()
    assert b"Connection: close" in answer
    assert answer.endswith(b".\n")
    assert served.application.asked == []
    assert time.monotonic() - begun < 3


def test_a_body_is_not_the_next_request(served: Served) -> None:
    """A request with a body is answered once and ends the connection: what follows is not read as a request."""
    inner = b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"
    for header in (b"Content-Length: %d" % len(inner), b"Transfer-Encoding: chunked", b"Content-Length: x"):
        answer = served.raw(b"GET /-/ready HTTP/1.1\r\nHost: h\r\n" + header + b"\r\n\r\n" + inner)
        assert answer.count(b"HTTP/1.1 ") == 1
    assert served.application.asked == []


@given(st.binary(max_size=200))
def test_parse_answers_or_refuses(head: bytes) -> None:
    """No bytes make the parser fail in another way than by refusing."""
    with contextlib.suppress(Refused):
        assert isinstance(parse(head), Request)


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=50))
def test_headers_come_through_or_are_refused(value: str) -> None:
    """A header's value is what was sent but for the space around it, or the request is refused."""
    with contextlib.suppress(Refused):
        request = parse(f"GET / HTTP/1.1\r\nhost: h\r\nAccept:{value}".encode("latin-1"))
        assert request.headers["accept"] == value.strip(" \t")


# Limits


def test_a_request_that_trickles_in_meets_its_deadline(serve: Callable[..., Served]) -> None:
    """Bytes that keep coming do not prolong the time for a request's head."""
    served = serve(request_timeout=0.5)
    begun = time.monotonic()
    with served.connect() as sock:
        sock.settimeout(0.05)
        answer = b""
        for byte in b"GET /metrics HTTP/1.1\r\n" + b"X" * 1000:
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.sendall(bytes([byte]))
                answer = sock.recv(4096)
                break
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.4 < time.monotonic() - begun < 3
    assert served.drops("slow")


def test_a_client_that_says_nothing_is_let_go_silently(serve: Callable[..., Served]) -> None:
    """A connection without a request, such as a browser opens ahead, ends without answer and is no loss."""
    served = serve(request_timeout=0.3)
    with served.connect() as sock:
        assert sock.recv(100) == b""
    assert not served.dropped


def test_a_slow_reader_meets_its_deadline(serve: Callable[..., Served]) -> None:
    """A response that is not read in time is given up, however many bytes went out before."""
    served = serve(response_timeout=0.5)
    served.application.body = b"x" * 30_000_000
    with served.connect() as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        begun = time.monotonic()
        while not served.dropped and time.monotonic() < begun + 5:
            sock.recv(1)
            time.sleep(0.02)
        assert time.monotonic() - begun < 3
        with pytest.raises(ConnectionResetError):  # not a plain end: the kernel keeps nothing for this client
            b"".join(iter(lambda: sock.recv(1 << 20), b""))
    assert served.dropped == {"slow": 1}


def test_the_longest_waiting_connection_makes_room(serve: Callable[..., Served]) -> None:
    """At the limit a new client is served; the one that has been silent longest is closed, the others are not."""
    served = serve(max_connections=4)
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(4)]
        for sock in (first, *others):  # each is known to be accepted before the next says a word
            sock.sendall(b"GET /-/ready HTTP/1.1\r\nHost: h\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        assert served.get().status == 200
        assert first.recv(100) == b""
        assert served.dropped == {"idle": 1}
        for sock in others:
            sock.sendall(b"GET /-/ready HTTP/1.1\r\nHost: h\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_server_whose_places_are_all_busy_says_so(serve: Callable[..., Served]) -> None:
    """Where nobody waits, nobody is thrown out: the new client gets 503, counted; later there is room again."""
    served = serve(max_connections=2)
    served.application.hold = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(served.get) for _ in range(2)]
        assert until(lambda: len(served.application.asked) == 2)
        with served.connect() as sock:
            assert sock.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert served.dropped == {"limit": 1}
        served.application.hold.set()
        assert [response.result().status for response in busy] == [200, 200]
    assert served.get("/-/ready").status == 200


# Addresses


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", ":0", "localhost:0"])
def test_addresses_of_both_families(
    serve: Callable[..., Served], lacking: Callable[[str], NoReturn], address: str
) -> None:
    """IPv4, IPv6, every address, and names; `address` tells the port that was had."""
    try:
        served = serve(address)
    except OSError as error:
        if "::" in address:
            lacking(f"no IPv6 here: {error}")
        raise
    assert served.server.address[1] > 0
    assert served.get().status == 200


def test_every_address_means_both_families(serve: Callable[..., Served], lacking: Callable[[str], NoReturn]) -> None:
    """A listener on `:port` answers IPv4 and IPv6 clients."""
    served = serve(":0")
    port = served.server.address[1]
    for host in ("127.0.0.1", "::1"):
        try:
            sock = socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if ":" in host:
                lacking(f"no IPv6 here: {error}")
            raise
        with sock:
            sock.sendall(b"GET /-/ready HTTP/1.0\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("address", ["", "10266", "localhost", "127.0.0.1:http", "127.0.0.1:70000", "127.0.0.1:-1"])
def test_a_bad_address_is_told_with_the_form_that_is_expected(address: str) -> None:
    """What is no address is a ValueError that shows it and says what would be one."""
    with pytest.raises(ValueError, match="expected host:port"):
        Served(address)


def test_an_address_in_use_is_told_with_the_remedy(served: Served) -> None:
    """The error names the address and what to do."""
    host, port = served.server.address
    with pytest.raises(OSError, match=rf"{host}:{port}.*another program listens there"):
        Served(f"{host}:{port}")


def test_an_address_of_another_host_is_told_with_the_remedy() -> None:
    """192.0.2.1 (TEST-NET-1, RFC 5737) is nobody's."""
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0.*not an address of this host"):
        Served("192.0.2.1:0")


# Life and load


def test_stop_is_bounded_and_leaves_nothing(serve: Callable[..., Served]) -> None:
    """With idle clients, a slow reader and one that is being answered, stop ends within its bound, threads too."""
    served = serve()
    served.application.body = b"x" * 30_000_000
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(20)]
        for sock in clients[:5]:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        assert until(lambda: len(served.application.asked) == 5)
        begun = time.monotonic()
        served.server.stop()
        assert time.monotonic() - begun < 5
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("web")] == []
    with pytest.raises(OSError, match="refused"):
        served.connect()


def test_an_answer_in_progress_is_finished_before_the_end(serve: Callable[..., Served]) -> None:
    """A scrape that runs when stop is called gets its answer."""
    served = serve()
    served.application.hold = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        scrape = pool.submit(served.get)
        assert until(lambda: len(served.application.asked) == 1)
        threading.Timer(0.2, served.application.hold.set).start()
        served.server.stop()
        assert scrape.result().read() == served.application.body


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for both ends of some six hundred connections in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("the limit of open files is below 2,000")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_scrape_is_quick_beside_bad_clients(many_descriptors: None, serve: Callable[..., Served]) -> None:
    """500 idle clients, one that reads and one that sends a byte at a time, 32 scrapers: a scrape is not stuck.

    All of them share this process; how long it takes beside clients of other processes is shown in tests/real.
    """
    served = serve()
    served.application.body = b"cni_veth_receive_bytes_total 1\n" * 50_000
    request = b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"
    done = threading.Event()

    def trickle(sock: socket.socket, step: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            while not done.wait(0.1):
                step()
        sock.close()

    def scrape() -> float:
        begun = time.monotonic()
        response = served.get()
        assert response.read() == served.application.body
        return time.monotonic() - begun

    reader, sender = served.connect(), served.connect()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.sendall(request)
    sender.sendall(request[:1])
    with ThreadPoolExecutor(34) as pool, contextlib.ExitStack() as stack:
        stack.callback(done.set)
        pool.submit(trickle, reader, lambda: reader.recv(1))
        pool.submit(trickle, sender, lambda: sender.sendall(b"X"))
        idle = [stack.enter_context(served.connect()) for _ in range(500)]
        assert scrape() < 5
        crowd = [pool.submit(scrape) for _ in range(32)]
        alone = scrape()
        slowest = max(future.result() for future in crowd)
    assert alone < 5
    assert slowest < 2
    assert len(idle) == 500
    assert set(served.dropped) <= {"idle"}
