"""Which configuration is active, asked of a real containerd that watches the same directory."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtimes import Containerd, running, until

from exporter.monitors.cni_config.active import Rule, active
from exporter.monitors.cni_config.files import Reader

NONE = "(none)"


@pytest.fixture(scope="module")
def daemon(need: Callable[[str], str]) -> Iterator[Containerd]:
    """One containerd for all cases."""
    for component in ("root", "containerd", "ctr", "busybox", "ip", "cni-plugins"):
        need(component)
    with running(Containerd) as daemon:
        yield daemon


def _list(name: str, *kinds: str) -> str:
    return json.dumps({"cniVersion": "0.4.0", "name": name, "plugins": [{"type": kind} for kind in kinds or ("ptp",)]})


def _one(name: str, **more: object) -> str:
    return json.dumps({"cniVersion": "0.4.0", "name": name, "type": "bridge", **more})


Files = dict[str, str | Path | None]
"""Content by name; a path: a link that leads there; None: a directory."""

CASES: dict[str, tuple[Files, str]] = {
    "a single configuration before a list": ({"10.conf": _one("one"), "20.conflist": _list("two")}, "one"),
    "a list before a single configuration": ({"10.conflist": _list("one"), "20.conf": _one("two")}, "one"),
    "names are compared by bytes, not as numbers": ({"9.conf": _one("nine"), "10.conf": _one("ten")}, "ten"),
    "capitals before small letters": ({"a.conf": _one("small"), "Z.conf": _one("capital")}, "capital"),
    "hidden files count": ({".z.conf": _one("hidden"), "0.conf": _one("shown")}, "hidden"),
    "json is a single configuration": ({"1.json": _one("json"), "2.conf": _one("conf")}, "json"),
    "other extensions are passed over": (
        {"0.yaml": "x", "1.conf.bak": "x", "2.conf~": "x", "3.CONF": "x", "9.conflist": _list("last")},
        "last",
    ),
    "a directory with such a name is passed over": ({"0.conf": None, "9.conf": _one("file")}, "file"),
    "one that is no JSON stops it": ({"1.conf": "{", "2.conf": _one("good")}, NONE),
    "one that is empty stops it": ({"1.conflist": "", "2.conf": _one("good")}, NONE),
    "a list in a file for one plugin stops it": ({"1.conf": _list("list"), "2.conf": _one("good")}, NONE),
    "one plugin in a file for a list stops it": ({"1.conflist": _one("one"), "2.conf": _one("good")}, NONE),
    "a list without a name stops it": ({"1.conflist": '{"plugins": [{"type": "ptp"}]}', "2.conf": _one("x")}, NONE),
    "a list with nothing in it stops it": ({"1.conflist": '{"name": "a", "plugins": []}'}, NONE),
    "a plugin without a type stops it": ({"1.conflist": '{"name": "a", "plugins": [{}]}'}, NONE),
    "a wrong type of address plugin stops it": ({"1.conf": _one("a", ipam={"type": 1}), "2.conf": _one("b")}, NONE),
    "a capability that is no truth stops it": ({"1.conf": _one("a", capabilities={"x": "yes"})}, NONE),
    "servers that are no list stop it": ({"1.conf": _one("a", dns={"nameservers": "10.0.0.1"})}, NONE),
    "a link that leads nowhere stops it": ({"1.conf": Path("/nowhere"), "2.conf": _one("good")}, NONE),
    "no version is no obstacle": ({"1.conf": '{"type": "bridge", "name": "bare"}', "2.conf": _one("x")}, "bare"),
    "keys of a plugin in any case": ({"1.conf": '{"TYPE": "bridge", "Name": "cased"}', "2.conf": _one("x")}, "cased"),
    "a plugin that is not there is no obstacle": ({"1.conflist": _list("absent", "no-such-plugin")}, "absent"),
    "a link to a file elsewhere": ({"1.conf": Path("../elsewhere"), "2.conf": _one("x")}, "elsewhere"),
    "nothing at all": ({}, NONE),
}


@pytest.mark.parametrize("case", CASES)
def test_containerd_agrees(daemon: Containerd, case: str) -> None:
    """The network that containerd has loaded is that of the file which we call active; both are what we expect."""
    contents, expected = CASES[case]
    directory = daemon.directory / "net.d"
    (daemon.directory / "elsewhere").write_text(_one("elsewhere"))
    _fill(directory, {"0.conf": _one(f"before {case}")})
    until(lambda: _loaded(daemon) == f"before {case}")
    _fill(directory, contents)
    until(lambda: _loaded(daemon) == expected)
    (tree,) = Reader().trees((str(directory),))
    chosen = active(tree.files, Rule(), {})
    networks = [found.configuration.network for found in tree.files if found.path in chosen]
    assert networks == ([] if expected == NONE else [expected])


def _fill(directory: Path, contents: Files) -> None:
    """Put these files there and no others, and make containerd look: it does not when something is created."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for name, content in contents.items():
        if content is None:
            (directory / name).mkdir()
        elif isinstance(content, Path):
            (directory / name).symlink_to(content)
        else:
            (directory / name).write_text(content)
    (directory / "look").touch()
    (directory / "look").unlink()


def _loaded(daemon: Containerd) -> str:
    """Give the network that containerd gives to pods."""
    networks = json.loads(daemon.status()["cniconfig"])["Networks"] or []
    names = [network["Config"]["Name"] for network in networks if network["Config"]["Name"] != "cni-loopback"]
    assert len(names) <= 1
    return names[0] if names else NONE
