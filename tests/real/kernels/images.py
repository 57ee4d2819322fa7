"""What a virtual machine boots: a kernel with its modules, a root file system, the working tree.

Flows in: Debian's archive, the requirements in pyproject.toml, this repository's files. Flows out: a kernel image and
ext4 disks, kept in the build directory under names that change with what they are made of. Debian's cloud kernels have
NVMe and ext4 built in, so they need no initial RAM disk, whose unpacking would take 10 s of each boot in an emulator.
"""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernels.debian import KEYRING, Release, Unavailable

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "kernels"
_INIT = Path(__file__).with_name("init")

_PACKAGES = (
    # usr-is-merged satisfies a dependency that would bring all of Perl.
    *("base-files", "base-passwd", "usr-is-merged", "netbase", "libc-bin"),
    *("bash", "dash", "coreutils", "util-linux", "mount", "grep", "sed", "procps", "busybox-static", "kmod"),
    *("python3-bpfcc", "libbpf1", "bpftool"),
    *("iproute2", "iptables", "nftables", "containernetworking-plugins"),
)
_UNWANTED = "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/zoneinfo", "usr/lib/x86_64-linux-gnu/gconv"

_PYTHON = "3.11"  # Debian 12's
_SITE = f"usr/local/lib/python{_PYTHON}/dist-packages"
# What the tests of the kernel import; which versions stands in pyproject.toml.
_PYTHON_PACKAGES = {
    *("click", "prometheus_client", "psutil", "pydantic", "PyYAML"),
    *("hypothesis", "pytest", "pytest-timeout"),
}

# What maintainers' scripts would have made, and how the guest finds the repository.
_LINKS = {"usr/sbin/iptables": "iptables-nft", "usr/sbin/ip6tables": "ip6tables-nft"}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    # Modules that make devices of themselves when they are loaded.
    "etc/modprobe.d/devices.conf": "options dummy numdummies=0\noptions ifb numifbs=0\noptions bonding max_bonds=0\n",
    f"{_SITE}/repository.pth": "/run/guest/repository\n",
}
_PROGRAMS = {
    "init": _INIT.read_text(),
    "usr/bin/cni-exporter": "#!/usr/bin/python3\nfrom exporter.cli import main\nmain()\n",
}

_TREE = ("exporter", "bpf", "tests", "pyproject.toml")
_LEFT_OUT = ("__pycache__", "*.pyc", "kernels", "test_kernels.py")  # the last two: this lane itself

SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
"""Where commands are looked for: an ordinary user's path leaves the administrator's out."""
_COMMAND_TIMEOUT = 300.0
_BLOCK = 4096
_FREE = 128 << 20
_SECTOR = 512
_START = 2048


ROOT_PARTITION = f"{zlib.crc32(b'root'):08x}-01"
"""PARTUUID of the root file system, as the kernel's parameter `root` names it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted: its image, and a disk that holds what belongs on /lib/modules."""

    version: str
    image: Path
    modules: Path


def kernel(release: Release, pattern: str) -> Kernel:
    """Fetch and unpack the newest kernel whose package name matches; nothing is installed. Raises Unavailable."""
    package = release.newest(pattern)
    version = package.removeprefix("linux-image-")
    made = BUILD / f"kernel-{version}"
    if not made.exists():
        with _workshop() as work:
            unpacked, result = work / "unpacked", work / "result"
            _run("dpkg-deb", "--extract", release.download(package, work), unpacked)
            _run("depmod", "--basedir", unpacked, version)
            result.mkdir()
            shutil.copy(unpacked / f"boot/vmlinuz-{version}", result / "vmlinuz")
            _disk(unpacked / "lib/modules", result / "modules.disk", "modules")
            result.rename(made)
    return Kernel(version, made / "vmlinuz", made / "modules.disk")


def root_file_system() -> Path:
    """Make the disk with Debian 12, bcc, and the Python packages that the tests import. Raises Unavailable."""
    inputs = "\n".join((Path(__file__).read_text(), _INIT.read_text(), *_requirements()))
    made = BUILD / f"root-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}.disk"
    if not made.exists():
        with _workshop() as work:
            root = work / "root"
            _bootstrap(root)
            _install_python(root)
            _complete(root)
            _disk(root, work / "root.disk", "root")
            for old in BUILD.glob("root-*.disk"):
                old.unlink()
            (work / "root.disk").rename(made)
    return made


def working_tree(path: Path, command: str) -> None:
    """Make the disk that is new in each run: a copy of the repository, and the shell command to run in it."""
    with _workshop() as work:
        content = work / "content"
        (content / "repository").mkdir(parents=True)
        (content / "command").write_text(f"{command}\n")
        for name in _TREE:
            source, target = ROOT / name, content / "repository" / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            elif source.exists():
                shutil.copy(source, target)
        _disk(content, path, "guest")


@contextmanager
def _workshop() -> Iterator[Path]:
    """Give a directory on the file system of the results, so that these are moved into place in one step."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="making-") as directory:
        yield Path(directory)


def _bootstrap(root: Path) -> None:
    """Unpack the packages and their dependencies; none is configured, so that a few seconds are enough."""
    if not KEYRING.exists():
        raise Unavailable(f"{KEYRING} is missing; as root: apt install debian-archive-keyring")
    release = Release("bookworm", BUILD / "apt-bookworm")
    tarball = root.with_suffix(".tar")
    options = ("--quiet", "--variant=extract", "--format=tar", "--architectures=amd64")
    apt = ("--aptopt=Acquire::Languages none", "--aptopt=Acquire::Retries 3", f"--include={','.join(_PACKAGES)}")
    _run("mmdebstrap", *options, *apt, release.name, tarball, "-", text=release.sources())
    root.mkdir()
    _run("tar", "--extract", f"--file={tarball}", f"--directory={root}", "--no-same-owner", "--exclude=./dev/*")
    for name in _UNWANTED:
        shutil.rmtree(root / name, ignore_errors=True)


def _install_python(root: Path) -> None:
    """Unpack wheels for the guest's Python, whatever the host's is."""
    platforms = ("--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64")
    wheels = ("--only-binary=:all:", "--no-compile", "--implementation=cp", f"--python-version={_PYTHON}")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, *wheels, *platforms, f"--target={root / _SITE}", *_requirements())
    if f"{sys.version_info.major}.{sys.version_info.minor}" == _PYTHON:  # once here, else slowly at each boot
        libraries = (root / _SITE, root / f"usr/lib/python{_PYTHON}", root / "usr/lib/python3/dist-packages")
        _run(sys.executable, "-m", "compileall", "-q", "-j0", "--invalidation-mode=unchecked-hash", *libraries)


def _complete(root: Path) -> None:
    """Add what the packages alone do not make."""
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    for name, content in (_FILES | _PROGRAMS).items():
        (root / name).write_text(content)
    for name in _PROGRAMS:
        (root / name).chmod(0o755)
    (root / "lib/modules").mkdir(exist_ok=True)


def _requirements() -> list[str]:
    """Give the requirements of pyproject.toml for the packages that the guest needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [line for line in lines if re.split(r"[<>=;\s]", line)[0] in _PYTHON_PACKAGES]


def _disk(content: Path, path: Path, label: str) -> None:
    """Make a disk with one partition, an ext4 file system of a directory's content.

    A kernel finds its root by the partition's identity and the guest the others by their labels, because NVMe name
    spaces are numbered in the order in which they happen to be scanned. No journal: nothing written outlives a run.
    """
    used = sum(file.lstat().st_size // _BLOCK + 1 for file in content.rglob("*")) * _BLOCK
    sectors = (used * 11 // 10 + _FREE) // _SECTOR
    with path.open("wb") as file:
        file.write(_partition_table(label, sectors))
        file.truncate((_START + sectors) * _SECTOR)
    placed = f"root_owner=0:0,offset={_START * _SECTOR}"
    size = f"{sectors * _SECTOR // 1024}k"
    _run(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal"),
        "-L",
        label,
        "-E",
        placed,
        "-d",
        content,
        path,
        size,
    )


def _partition_table(label: str, sectors: int) -> bytes:
    """Describe one Linux partition in a master boot record (UEFI specification, section 5.2.1)."""
    partition = struct.pack("<4xB3x2I", 0x83, _START, sectors)
    return struct.pack("<440xI2x16s48x2B", zlib.crc32(label.encode()), partition, 0x55, 0xAA)


def _run(*call: str | Path, text: str | None = None) -> None:
    """Run a command to its end. Raises Unavailable where it is missing or fails."""
    environment = {**os.environ, "PATH": SEARCH_PATH}
    try:
        subprocess.run(
            call, input=text, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=True, env=environment
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{call[0]} is missing") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{call[0]} did not end within {_COMMAND_TIMEOUT:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{call[0]} failed: {error.stderr.strip()[-2000:]}") from error
