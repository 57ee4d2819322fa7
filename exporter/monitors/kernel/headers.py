"""The directory that bcc takes for kernel headers: a dozen small files, the kernel's types among them.

Flows in: BTF and the names of structs. Flows out: files below a directory of the loader's own. What bcc asks for:
its helpers.h and proto.h, and `-include ./include/linux/kconfig.h`.
"""

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from exporter.host.btf import Btf

_EMPTY = ("linux/bpf_common.h", "linux/log2.h", "uapi/linux/if_ether.h", "uapi/linux/if_packet.h")
_ALSO_EMPTY = ("uapi/linux/bpf.h", "uapi/linux/ptrace.h")
_TYPES = "#define __aligned_u64 __u64 __attribute__((aligned(8)))\n"


def write(directory: Path, types: Btf, structs: Iterable[str], override: str = "") -> None:
    """Write the files; `override` is a header to use in place of the structs' definitions. Raises OSError."""
    base, definitions = types.base_and_header(structs)
    if override:
        definitions = Path(override).read_text(encoding="utf-8")
    version = re.findall(r"\d+", platform.release())[:3]
    contents = {
        "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
        "linux/types.h": f"#pragma once\n{base}{_TYPES}",
        "linux/version.h": (
            "#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
            f"#define LINUX_VERSION_CODE KERNEL_VERSION({','.join(version)})\n"
        ),
        "asm/page.h": f"#define PAGE_SIZE {os.sysconf('SC_PAGE_SIZE')}\n",
        "kernel_types.h": f"#pragma once\n{definitions}",
        **dict.fromkeys((*_EMPTY, *_ALSO_EMPTY), ""),
    }
    for name, text in contents.items():
        path = directory / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
