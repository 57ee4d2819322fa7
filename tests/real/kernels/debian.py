"""Debian's archive, read without touching the host's own package lists and without installing anything.

Flows in: the name of a release, patterns of package names. Flows out: downloaded packages, a list of sources.
"""

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LISTS_MAX_AGE = 86400.0
_TIMEOUT = 180.0


class Unavailable(Exception):  # noqa: N818 - an answer, not a failure
    """The archive does not answer, or does not hold what was asked for; the text says which."""


@dataclass(frozen=True, slots=True)
class Release:
    """One release of Debian for amd64, with apt's state in a directory of its own."""

    name: str
    directory: Path

    def sources(self) -> str:
        """Give the lines of a sources.list: the release and its security updates, from the host's own mirrors."""
        main, security = _mirrors()
        option = f"[arch=amd64 signed-by={KEYRING}]"
        return f"deb {option} {main} {self.name} main\ndeb {option} {security} {self.name}-security main\n"

    def newest(self, pattern: str) -> str:
        """Name the package of the highest number whose whole name matches. Raises Unavailable."""
        self._refresh()
        found = self._apt("apt-cache", "search", "--names-only", f"^{pattern}$").splitlines()
        names = [line.split()[0] for line in found]
        if not names:
            raise Unavailable(f"Debian {self.name} has no package {pattern}")
        return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def download(self, package: str, directory: Path) -> Path:
        """Fetch a package into `directory`, which may hold nothing else that ends in .deb. Raises Unavailable."""
        directory.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "download", package, cwd=directory)
        return next(directory.glob("*.deb"))

    def _refresh(self) -> None:
        """Renew the lists when they are older than a day."""
        stamp = self.directory / "refreshed"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < _LISTS_MAX_AGE:
            return
        if not KEYRING.exists():
            raise Unavailable(f"{KEYRING} is missing; as root: apt install debian-archive-keyring")
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        (self.directory / "sources.list").write_text(self.sources())
        self._apt("apt-get", "update", "--error-on=any")
        stamp.touch()

    def _apt(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        options = (
            f"Dir::State={self.directory}/state",
            f"Dir::State::status={self.directory}/status",
            f"Dir::Cache={self.directory}/cache",
            f"Dir::Etc::SourceList={self.directory}/sources.list",
            "Dir::Etc::SourceParts=/dev/null",
            "APT::Architecture=amd64",
            "APT::Sandbox::User=root",  # else apt's own user must be able to enter the directory
            "Acquire::Languages=none",
            "Acquire::Check-Valid-Until=false",  # the security suite of an old release is signed no more
            "Acquire::Retries=3",
            "Acquire::http::Timeout=20",
        )
        call = [command, "--quiet=2", *(f"--option={option}" for option in options), *arguments]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=_TIMEOUT, check=True, cwd=cwd)
        except FileNotFoundError as error:
            raise Unavailable(f"{command} is not on this machine: the kernels come from Debian's archive") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"Debian {self.name}: the archive did not answer within {_TIMEOUT:.0f} s") from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"Debian {self.name}: {command}: {error.stderr.strip()}") from error
        return done.stdout


def _mirrors() -> tuple[str, str]:
    """Addresses of Debian and of its security updates: those that this host uses, else the public ones."""
    format_ = "$(ORIGIN) $(RELEASE) $(REPO_URI)"
    call = ["apt-get", "indextargets", f"--format={format_}", "Created-By: Packages"]
    listing = subprocess.run(call, capture_output=True, text=True, timeout=_TIMEOUT, check=False).stdout
    targets = [fields for line in listing.splitlines() if (fields := line.split())[:1] == ["Debian"]]
    main = next((uri.rstrip("/") for _, release, uri in targets if "-" not in release), None)
    if main is None:
        raise Unavailable("apt knows no archive of Debian here: add one to its sources")
    security = next((uri.rstrip("/") for _, release, uri in targets if release.endswith("-security")), None)
    return main, security or f"{main}-security"
