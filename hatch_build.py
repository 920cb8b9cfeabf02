"""Compiles protos/ into flowcontrol/v1 whenever the project is built or installed, editable too."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileProtos(BuildHookInterface[Any]):
    """Runs protoc before files are collected; nothing generated is kept in git."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Write messages, type stubs and services beside each other, or stop the build."""
        root = Path(self.root)
        sources = sorted(str(path) for path in (root / "protos").rglob("*.proto"))
        arguments = [
            "protoc",
            f"--proto_path={root / 'protos'}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={root}",
            f"--pyi_out={root}",
            f"--grpc_python_out={root}",
            *sources,
        ]
        if protoc.main(arguments) != 0:
            message = f"protoc failed on {sources}"
            raise RuntimeError(message)
        (root / "flowcontrol" / "v1" / "__init__.py").write_text(
            '"""Generated from protos/flowcontrol/v1: our own gRPC API."""\n'
        )
