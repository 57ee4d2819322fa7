"""Real container runtimes for tests: a dockerd and a containerd of our own, away from any that the machine has.

Flows in: a temporary directory. Flows out: `Dockerd` and `Containerd`, which start, stop, are killed and restarted, and
run busybox containers and pods. Needs root; pods get their network from CNI's bridge plugin.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import docker
import psutil
import pytest
from busybox import IMAGE, PATH, archive
from cri_control import Control, pod_config

T = TypeVar("T")

_START = 30.0
_CNI = ("/opt/cni/bin", "/usr/lib/cni")


def until(holds: Callable[[], T], seconds: float = 10.0, step: float = 0.02) -> T:
    """Wait until `holds()` is true and give its answer. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        answer = holds()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {getattr(holds, '__name__', holds)}")
        time.sleep(step)


class Daemon:
    """A process that can be started, stopped, killed and started again."""

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PATH": PATH}
            )

    def end(self, number: signal.Signals) -> None:
        """Signal the process and wait for its end; by force after 20 s."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    def alive(self) -> None:
        """Raise RuntimeError with the end of the log where the process ended."""
        if self.process and self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text(errors='replace')[-3000:]}")


class Containerd:
    """A containerd with its CRI on, whose pods are on a bridge of their own."""

    def __init__(self, directory: Path, *, cri: bool = True, subnet: str = "10.251.0.0/24") -> None:
        """Keep everything below `directory`, which must be short: socket paths are bounded."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.socket = str(directory / "containerd.sock")
        self.bridge = f"cri{os.getpid() % 100000}"
        self._subnet = subnet
        self._cri = cri
        self._calls: Control | None = None
        config = directory / "config.toml"
        config.write_text(self._config())
        self._daemon = Daemon("containerd", ["containerd", "-c", str(config)], directory / "containerd.log")

    def start(self) -> None:
        """Start it and load the image."""
        self._daemon.start()
        until(self._answers, _START)
        if self._cri:
            image = self.directory / "image.tar"
            image.write_bytes(archive())
            self.ctr("-n", "k8s.io", "images", "import", str(image))
            image.unlink()

    def stop(self) -> None:
        """Remove every pod, end the daemon, and remove what it left."""
        with contextlib.suppress(Exception):
            self._clear()
        self._close_calls()
        self._daemon.end(signal.SIGTERM)
        _end_shims(self.socket)
        _delete_link(self.bridge)
        _unmount(self.directory)

    def kill(self) -> None:
        """Kill the daemon; its containers run on."""
        self._close_calls()
        self._daemon.end(signal.SIGKILL)

    def restart(self) -> None:
        """Start the daemon again after `kill`, or stop it gently and start it."""
        self._close_calls()
        self._daemon.end(signal.SIGTERM)
        self._daemon.start()
        until(self._answers, _START)

    def pause_daemon(self) -> None:
        """Let the daemon hang: it accepts and never answers."""
        assert self._daemon.process
        self._daemon.process.send_signal(signal.SIGSTOP)

    def resume_daemon(self) -> None:
        """Let the daemon go on."""
        assert self._daemon.process
        self._daemon.process.send_signal(signal.SIGCONT)

    def ctr(self, *arguments: str) -> str:
        """Call containerd's own client."""
        command = ["ctr", "--address", self.socket, *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, "PATH": PATH})
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def run_pod(
        self,
        name: str,
        namespace: str = "default",
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
    ) -> str:
        """Start a pod's sandbox, with its network; the answer is the sandbox's id."""
        config = pod_config(name, namespace, labels, annotations)
        return str(self._control().call("RunPodSandbox", {"config": config})["pod_sandbox_id"])

    def create(  # the parameters are those of the CRI
        self,
        sandbox: str,
        name: str,
        *command: str,
        pod: str = "",
        namespace: str = "default",
        environment: dict[str, str] | None = None,
        mounts: list[dict[str, Any]] | None = None,
        memory: int = 0,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
    ) -> str:
        """Create a container in a sandbox; the answer is its id."""
        standard = {
            "io.kubernetes.container.name": name,
            "io.kubernetes.pod.name": pod or name,
            "io.kubernetes.pod.namespace": namespace,
        }
        config = {
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": list(command) or ["/bin/sleep", "100000"],
            "envs": [{"key": key, "value": value} for key, value in (environment or {}).items()],
            "mounts": mounts or [],
            "labels": {**standard, **(labels or {})},
            "annotations": annotations or {},
            "linux": {"resources": {"memory_limit_in_bytes": memory}},
        }
        request = {
            "pod_sandbox_id": sandbox,
            "config": config,
            "sandbox_config": pod_config(pod or name, namespace, None),
        }
        return str(self._control().call("CreateContainer", request)["container_id"])

    def start_container(self, container_id: str) -> None:
        """Start a created container."""
        self._control().call("StartContainer", {"container_id": container_id})

    def stop_container(self, container_id: str, timeout: int = 0) -> None:
        """Stop a container."""
        self._control().call("StopContainer", {"container_id": container_id, "timeout": timeout})

    def remove_container(self, container_id: str) -> None:
        """Remove a container, running or not."""
        self._control().call("RemoveContainer", {"container_id": container_id})

    def remove_pod(self, sandbox: str) -> None:
        """Stop and remove a pod with its containers."""
        self._control().call("StopPodSandbox", {"pod_sandbox_id": sandbox})
        self._control().call("RemovePodSandbox", {"pod_sandbox_id": sandbox})

    def run(self, pod: str, name: str, namespace: str = "default", *command: str) -> tuple[str, str]:
        """Start a pod with one container; the answer is the ids of sandbox and container."""
        sandbox = self.run_pod(pod, namespace)
        container = self.create(sandbox, name, *command, pod=pod, namespace=namespace)
        self.start_container(container)
        return sandbox, container

    def status(self) -> dict[str, str]:
        """Give what the daemon tells about itself: texts in JSON, by name."""
        return dict(self._control().call("Status", {"verbose": True}).get("info", {}))

    def remove_all(self) -> None:
        """Remove every pod."""
        for item in self._control().call("ListPodSandbox", {}).get("items", []):
            self.remove_pod(item["id"])

    def _clear(self) -> None:
        """Remove every pod; a daemon that a test killed is started for it, or their networks would stay."""
        if self._cri:
            if self._daemon.process is None:
                self.restart()
            self.remove_all()

    def _answers(self) -> bool:
        self._daemon.alive()
        if not Path(self.socket).exists():
            return False
        if not self._cri:
            return _connects(self.socket)
        try:
            self._control().call("Version", {})
        except Exception:  # noqa: BLE001 - any failure means: not yet
            self._close_calls()
            return False
        return True

    def _control(self) -> Control:
        if self._calls is None:
            self._calls = Control(self.socket)
        return self._calls

    def _close_calls(self) -> None:
        if self._calls:
            self._calls.close()
            self._calls = None

    def _config(self) -> str:
        plugins = next((path for path in _CNI if Path(path, "bridge").exists()), _CNI[0])
        network = self.directory / "net.d"
        network.mkdir(exist_ok=True)
        addresses = {"dataDir": str(self.directory / "ipam"), "ranges": [[{"subnet": self._subnet}]]}
        bridge = {"type": "bridge", "bridge": self.bridge, "ipam": {"type": "host-local", **addresses}}
        conflist = {"cniVersion": "0.4.0", "name": "test", "plugins": [bridge]}
        (network / "10-test.conflist").write_text(json.dumps(conflist))
        return f"""version = 2
root = "{self.directory}/root"
state = "{self.directory}/state"
disabled_plugins = [{"" if self._cri else '"io.containerd.grpc.v1.cri"'}]
[grpc]
address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
sandbox_image = "{IMAGE}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{network}"
"""


class Dockerd:
    """A dockerd with a containerd and a bridge of its own; containers survive its death (live restore)."""

    def __init__(self, directory: Path, *, live_restore: bool = True, address: str = "172.31.250.1/24") -> None:
        """Keep everything below `directory`, which must be short: socket paths are bounded."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.socket = str(directory / "docker.sock")
        self.bridge = f"dkr{os.getpid() % 100000}"
        self._address = address
        self._containerd = Containerd(directory / "c", cri=False)
        self._client: docker.DockerClient | None = None
        config = directory / "daemon.json"
        config.write_text("{}")
        options = {
            "config-file": config,
            "host": f"unix://{self.socket}",
            "data-root": directory / "data",
            "exec-root": directory / "exec",
            "pidfile": directory / "pid",
            "containerd": self._containerd.socket,
            "bridge": self.bridge,
            "iptables": "false",
            "ip-forward": "false",
            "ip-masq": "false",
            "userland-proxy": "false",
            "live-restore": "true" if live_restore else "false",
        }
        arguments = ["dockerd", *(f"--{name}={value}" for name, value in options.items())]
        self._daemon = Daemon("dockerd", arguments, directory / "dockerd.log")

    @property
    def client(self) -> docker.DockerClient:
        """The Docker client (docker.DockerClient)."""
        if self._client is None:
            self._client = docker.DockerClient(base_url=f"unix://{self.socket}", timeout=60)
        return self._client

    def start(self) -> None:
        """Start it and load the image."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", self._address, "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        self._containerd.start()
        self._daemon.start()
        until(self._answers, _START)
        self.client.images.load(archive())

    def stop(self) -> None:
        """Remove every container, end the daemons, and remove what they left."""
        with contextlib.suppress(Exception):
            self._clear()
        self._close_client()
        self._daemon.end(signal.SIGTERM)
        self._containerd.stop()
        _delete_link(self.bridge)
        _unmount(self.directory)

    def kill(self) -> None:
        """Kill dockerd; its containers run on where it restores them."""
        self._close_client()
        self._daemon.end(signal.SIGKILL)

    def restart(self) -> None:
        """Start dockerd again after `kill`, or stop it gently and start it."""
        self._close_client()
        self._daemon.end(signal.SIGTERM)
        self._daemon.start()
        until(self._answers, _START)

    def pause_daemon(self) -> None:
        """Let dockerd hang: it accepts and never answers."""
        assert self._daemon.process
        self._daemon.process.send_signal(signal.SIGSTOP)

    def resume_daemon(self) -> None:
        """Let dockerd go on."""
        assert self._daemon.process
        self._daemon.process.send_signal(signal.SIGCONT)

    def create(self, name: str, *command: str, **options: Any) -> str:  # noqa: ANN401 - the client's own
        """Create a container; options are those of docker.DockerClient.containers.create. The answer is its id."""
        return str(self.client.containers.create(IMAGE, list(command) or None, name=name, **options).id)

    def run(self, name: str, *command: str, **options: Any) -> str:  # noqa: ANN401 - the client's own
        """Create and start a container; the answer is its id."""
        container_id = self.create(name, *command, **options)
        self.client.api.start(container_id)
        return container_id

    def remove(self, container: str) -> None:
        """Remove a container, running or not."""
        self.client.api.remove_container(container, force=True)

    def remove_all(self) -> None:
        """Remove every container."""
        for item in self.client.api.containers(all=True):
            self.remove(item["Id"])

    def _clear(self) -> None:
        """Remove every container; a daemon that a test killed is started for it."""
        if self._daemon.process is None:
            self.restart()
        self.remove_all()

    def _answers(self) -> bool:
        self._daemon.alive()
        if not _connects(self.socket):
            return False
        try:
            return bool(self.client.ping())
        except Exception:  # noqa: BLE001 - any failure means: not yet
            self._close_client()
            return False

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


@pytest.fixture
def dockerd(need: Callable[[str], str]) -> Iterator[Dockerd]:
    """A running dockerd."""
    for component in ("root", "dockerd", "containerd", "runc", "busybox", "ip"):
        need(component)
    with running(Dockerd) as daemon:
        yield daemon


@pytest.fixture
def containerd(need: Callable[[str], str]) -> Iterator[Containerd]:
    """A running containerd with its CRI."""
    for component in ("root", "containerd", "ctr", "runc", "busybox", "ip", "cni-plugins"):
        need(component)
    with running(Containerd) as daemon:
        yield daemon


@contextlib.contextmanager
def running(make: Callable[[Path], Any]) -> Iterator[Any]:
    """Start a daemon in a directory with a short path, and leave nothing of it."""
    with tempfile.TemporaryDirectory(prefix="cni-", ignore_cleanup_errors=True) as directory:
        daemon = make(Path(directory))
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.stop()


def _connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        return client.connect_ex(path) == 0


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=10, env={**os.environ, "PATH": PATH})


def _delete_link(name: str) -> None:
    command = ["ip", "link", "delete", name]
    subprocess.run(command, check=False, capture_output=True, timeout=10, env={**os.environ, "PATH": PATH})


def _end_shims(address: str) -> None:
    """Kill the shims that a killed containerd left with their containers, and wait for their end."""
    doomed: list[psutil.Process] = []
    for shim in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if shim.name().startswith("containerd-shim") and address in shim.cmdline():
                doomed += [shim, *shim.children(recursive=True)]
    for process in doomed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, 5)


def _unmount(directory: Path) -> None:
    """Unmount what is left below, the deepest first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((one for one in mounts if one.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False, capture_output=True, timeout=10)
