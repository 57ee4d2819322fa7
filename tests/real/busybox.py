"""The image that tests run: busybox alone, made here because no registry is asked.

Flows in: the machine's busybox. Flows out: an archive that both Docker and containerd load.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import tarfile

IMAGE = "docker.io/local/busybox:latest"
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
"""Where commands are looked for: daemons are not in an ordinary user's path."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def archive() -> bytes:
    """Make the image: busybox, in the format of `docker save`."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "tmp", "proc", "sys", "dev", "etc"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        busybox = shutil.which("busybox", path=PATH)
        assert busybox
        tar.add(busybox, "bin/busybox")
        for applet in ("sh", "sleep", "nc", "ip", "dd", "cat", "env", "tail", "pause"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "100000"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    image = io.BytesIO()
    with tarfile.open(fileobj=image, mode="w") as tar:
        members = {"layer.tar": layer.getvalue(), "config.json": json.dumps(config).encode()}
        for name, content in {**members, "manifest.json": json.dumps(manifest).encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return image.getvalue()
