"""The CRI calls that make and remove pods, for tests.

Flows in: dictionaries. Flows out: dictionaries. The exporter's own messages hold only what it reads, so these are
described here, by the names and numbers of Kubernetes' cri-api, runtime/v1/api.proto.
"""

import uuid
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

_LABELS = "map"
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "VersionRequest": {"version": (1, "string")},
    "VersionResponse": {"runtime_name": (2, "string")},
    "Metadata": {"name": (1, "string"), "uid": (2, "string"), "namespace": (3, "string"), "attempt": (4, "uint32")},
    "StatusRequest": {"verbose": (1, "bool")},
    "StatusResponse": {"info": (2, _LABELS)},
    "PodConfig": {
        "metadata": (1, "Metadata"),
        "hostname": (2, "string"),
        "log_directory": (3, "string"),
        "labels": (6, _LABELS),
        "annotations": (7, _LABELS),
    },
    "RunPodSandboxRequest": {"config": (1, "PodConfig")},
    "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxResponse": {},
    "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "RemovePodSandboxResponse": {},
    "ListPodSandboxRequest": {},
    "Item": {"id": (1, "string")},
    "ListPodSandboxResponse": {"items": (1, "repeated Item")},
    "Name": {"name": (1, "string"), "attempt": (2, "uint32")},
    "Image": {"image": (1, "string")},
    "KeyValue": {"key": (1, "string"), "value": (2, "string")},
    "Mount": {"container_path": (1, "string"), "host_path": (2, "string"), "readonly": (3, "bool")},
    "Resources": {"cpu_period": (1, "int64"), "cpu_quota": (2, "int64"), "memory_limit_in_bytes": (4, "int64")},
    "Linux": {"resources": (1, "Resources")},
    "ContainerConfig": {
        "metadata": (1, "Name"),
        "image": (2, "Image"),
        "command": (3, "repeated string"),
        "envs": (6, "repeated KeyValue"),
        "mounts": (7, "repeated Mount"),
        "labels": (9, _LABELS),
        "annotations": (10, _LABELS),
        "linux": (15, "Linux"),
    },
    "CreateContainerRequest": {
        "pod_sandbox_id": (1, "string"),
        "config": (2, "ContainerConfig"),
        "sandbox_config": (3, "PodConfig"),
    },
    "CreateContainerResponse": {"container_id": (1, "string")},
    "StartContainerRequest": {"container_id": (1, "string")},
    "StartContainerResponse": {},
    "StopContainerRequest": {"container_id": (1, "string"), "timeout": (2, "int64")},
    "StopContainerResponse": {},
    "RemoveContainerRequest": {"container_id": (1, "string")},
    "RemoveContainerResponse": {},
}


def pod_config(
    name: str, namespace: str, labels: dict[str, str] | None, annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """Describe a pod as the kubelet does."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{namespace}/{name}"))
    standard = {"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.uid": uid}
    return {
        "metadata": {"name": name, "namespace": namespace, "uid": uid, "attempt": 0},
        "hostname": name,
        "labels": {**standard, **(labels or {})},
        "annotations": annotations or {},
    }


class Control:
    """Calls of the CRI by name, with dictionaries for messages."""

    def __init__(self, path: str) -> None:
        options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"unix:{path}", options=options)
        self._messages = _message_classes()

    def call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Make a call; every wait ends after 60 s."""
        message = json_format.ParseDict(request, self._messages[f"{name}Request"]())
        method = self._channel.unary_unary(
            f"/runtime.v1.RuntimeService/{name}",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=self._messages[f"{name}Response"].FromString,
        )
        return dict(json_format.MessageToDict(method(message, timeout=60), preserving_proto_field_name=True))

    def close(self) -> None:
        self._channel.close()


def _message_classes() -> dict[str, Any]:
    package = "cni.control"
    file = descriptor_pb2.FileDescriptorProto(name="cni_control.proto", package=package, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _describe(message, field, number, kind, package)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in _MESSAGES
    }


def _describe(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str, package: str) -> None:
    scalars = {"string": 9, "bool": 8, "int64": 3, "uint32": 13}  # FieldDescriptorProto.Type
    repeated, kind = kind.startswith("repeated "), kind.removeprefix("repeated ")
    if kind == _LABELS:
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        for index, part in enumerate(("key", "value"), 1):
            entry.field.add(name=part, number=index, label=1, type=9)
        kind, repeated = f"{message.name}.{entry.name}", True
    field = message.field.add(name=name, number=number, label=3 if repeated else 1, type=scalars.get(kind, 11))
    if kind not in scalars:
        field.type_name = f".{package}.{kind}"
