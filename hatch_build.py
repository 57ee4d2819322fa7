"""Build hook: generates the messages of the Container Runtime Interface from cri.proto.

Flows in: exporter/monitors/runtimes/cri.proto. Flows out: cri_pb2.py and its types beside it, in wheels and in editable
installations. The generated files are not kept under version control.
"""

from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DIRECTORY = "exporter/monitors/runtimes"
_GENERATED = ("cri_pb2.py", "cri_pb2.pyi")


def generate(root: Path) -> None:
    """Write cri_pb2.py and cri_pb2.pyi into the source tree at `root`. Raises RuntimeError where protoc refuses."""
    directory = root / _DIRECTORY
    arguments = ["protoc", f"-I{directory}", f"--python_out={directory}", f"--pyi_out={directory}", "cri.proto"]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {directory / 'cri.proto'}; its messages are above")
    types = directory / "cri_pb2.pyi"
    types.write_text(f"# mypy: ignore-errors\n{types.read_text()}")  # protoc leaves type arguments out


class CustomBuildHook(BuildHookInterface[Any]):
    """Generates before a wheel is packed; a source archive carries cri.proto alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Generate, and have the result packed although it is ignored by git."""
        if self.target_name == "wheel":
            generate(Path(self.root))
            build_data["artifacts"].extend(f"/{_DIRECTORY}/{name}" for name in _GENERATED)
