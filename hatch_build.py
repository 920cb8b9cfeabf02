"""The build hook: generates messages, and machine code if requested."""

import os
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILE = "FLOWCONTROL_COMPILE"
"""Set to 1, the wheel also contains the modules that handle each request as machine code."""
INTERPRETED = "\n# interpreted: "
"""Mark of a module that must not be compiled; the reason follows."""
COMPILE_NEEDS = ("mypy[mypyc]>=1.14", "types-protobuf", "hpack", "structlog")
"""Requirements of the compilation, including types of modules that are imported."""
COMPILED = "flowcontrol.compiled"
"""Name of the module with all machine code; by default it would be a top-level module."""
ENVOY = "server/flowcontrol_server/common/envoy_messages.binpb"
ENVOY_ROOTS = (
    "envoy.service.accesslog.v3.als_pb2",
    "envoy.service.ext_proc.v3.external_processor_pb2",
    "xds.data.orca.v3.orca_load_report_pb2",
)
"""Modules of xds-protos with the messages that the service uses."""


class Generate(BuildHookInterface[Any]):
    """Runs protoc and mypyc before files are collected; generated files are not kept in git.

    mypyc translates the typed Python to C, and needs a C compiler. It writes nothing into the
    source tree, where compiled modules would hide edited ones. pyproject.toml lists the modules to
    compile. Modules with dataclasses that are read by their type hints (ledger, settings) are
    excluded: compiled, they have no hints of generic fields. Compiled modules have rules beyond
    those of mypy: a name has one type in a function, including `except ... as`; no tuple is
    compared by identity; `final` names cannot be patched, so tests that plant a bug there are
    marked `interpreted`.
    """

    PLUGIN_NAME = "custom"
    _scratch: "TemporaryDirectory[str] | None" = None

    def dependencies(self) -> list[str]:
        """Return the requirements of a build that compiles."""
        return list(COMPILE_NEEDS) if _compiles() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate everything needed, or fail the build."""
        root = Path(self.root)
        _messages(root)
        _envoy_messages(root / ENVOY)
        if self.target_name == "wheel" and version == "standard" and _compiles():
            self._scratch = TemporaryDirectory(prefix="flowcontrol-")
            made = _extensions(root, self.config, Path(self._scratch.name))
            build_data["force_include"].update(made)
            build_data.update(pure_python=False, infer_tag=True)

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact: str) -> None:
        """Remove temporary files."""
        if self._scratch is not None:
            self._scratch.cleanup()


def compiled_modules(root: Path, config: dict[str, Any]) -> list[str]:
    """Return the modules that the hook's settings select, as paths relative to the root.

    Raises:
        ValueError: a pattern matches nothing.
    """
    chosen = _named(root, config, "compiled") - _named(root, config, "interpreted")
    return sorted(name for name in chosen if INTERPRETED not in (root / name).read_text())


def make_c(modules: list[str], into: Path) -> list[Any]:
    """Translate modules to C; return the extensions to build. Must be called in the root."""
    from mypyc.build import mypycify  # noqa: PLC0415 - only a build that compiles needs it

    options = ["--no-warn-unused-ignores", f"--cache-dir={into / 'mypy'}"]
    made: list[Any] = mypycify(
        [*options, *modules],
        opt_level="2",
        debug_level="0",
        target_dir=str(into),
        group_name=COMPILED,
    )
    for extension in made:  # for direct calls between them; extensions may share a list
        extension.extra_compile_args = [*extension.extra_compile_args, "-fvisibility=hidden"]
    return made


def _compiles() -> bool:
    return os.environ.get(COMPILE) == "1"


def _named(root: Path, config: dict[str, Any], option: str) -> set[str]:
    found = {glob: list(root.glob(glob)) for glob in config[option]}
    for glob in (glob for glob, paths in found.items() if not paths):
        message = f"tool.hatch.build.hooks.custom.{option}: no file is named {glob}"
        raise ValueError(message)
    return {str(path.relative_to(root)) for paths in found.values() for path in paths}


def _messages(root: Path) -> None:
    """Write messages, type stubs and services into one package."""
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


def _envoy_messages(path: Path) -> None:
    """Write the descriptors of Envoy's messages from xds-protos, each after those it needs.

    A build without isolation has no xds-protos and uses the file that the installation has written.
    """
    try:
        roots = [import_module(name).DESCRIPTOR for name in ENVOY_ROOTS]
    except ModuleNotFoundError as error:
        if path.exists():
            return
        message = f"{error.name} is missing: build with isolation, or install xds-protos"
        raise RuntimeError(message) from error
    needed: dict[str, FileDescriptor] = {}
    for file in roots:
        _add(file, needed)
    descriptors = FileDescriptorSet()
    for file in needed.values():
        file.CopyToProto(descriptors.file.add())
    path.write_bytes(descriptors.SerializeToString(deterministic=True))


def _add(file: FileDescriptor, needed: dict[str, FileDescriptor]) -> None:
    """Add a file after the files it needs; those of protobuf itself are not needed."""
    if file.name not in needed and not file.name.startswith("google/protobuf/"):
        for dependency in file.dependencies:
            _add(dependency, needed)
        needed[file.name] = file


def _extensions(root: Path, config: dict[str, Any], scratch: Path) -> dict[str, str]:
    """Compile; return the paths of the libraries, with their paths in the wheel."""
    from setuptools import Distribution  # noqa: PLC0415 - only a build that compiles needs it

    os.chdir(root)  # module names and mypy's settings are relative to it
    made, c = scratch / "made", scratch / "c"
    extensions = make_c(compiled_modules(root, config), c)
    build = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    build.build_lib, build.build_temp = str(made), str(c)
    build.ensure_finalized()
    build.run()
    return {str(path): str(path.relative_to(made)) for path in made.rglob("*.so")}
