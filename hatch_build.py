"""What is made when the project is built: messages, and machine code where wanted."""

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
"""Set to 1, modules on the way of a request go into the wheel as machine code, too."""
INTERPRETED = "\n# interpreted: "
"""How a module says, with a reason, that it is not to be compiled."""
COMPILE_NEEDS = ("mypy[mypyc]>=1.14", "types-protobuf", "hpack", "structlog")
"""Types of what those modules import among it."""
COMPILED = "flowcontrol.compiled"
"""Names the module with the machine code of all; by default it would be a top-level one."""
ENVOY = "server/flowcontrol_server/common/envoy_messages.binpb"
ENVOY_ROOTS = (
    "envoy.service.accesslog.v3.als_pb2",
    "envoy.service.ext_proc.v3.external_processor_pb2",
    "xds.data.orca.v3.orca_load_report_pb2",
)
"""Modules of xds-protos with the messages that are used."""


class Generate(BuildHookInterface[Any]):
    """Runs protoc and mypyc before files are collected; nothing generated is kept in git.

    mypyc makes C of the same typed Python, and needs a C compiler. The source tree is left alone:
    compiled modules in it would hide what is edited. pyproject.toml says which are compiled. Not
    those with dataclasses that are read by their hints (ledger, settings): compiled, they have no
    hints of generic fields. In the others, beyond what mypy asks for: a name has one type in a
    function, `except ... as` included; no tuple is known by its identity; what is `final` cannot be
    patched, so tests that plant a bug in it are marked `interpreted`.
    """

    PLUGIN_NAME = "custom"
    _scratch: "TemporaryDirectory[str] | None" = None

    def dependencies(self) -> list[str]:
        """Return what a build needs beyond what every build needs."""
        return list(COMPILE_NEEDS) if _compiles() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make what is wanted, or stop the build."""
        root = Path(self.root)
        _messages(root)
        _envoy_messages(root / ENVOY)
        if self.target_name == "wheel" and version == "standard" and _compiles():
            self._scratch = TemporaryDirectory(prefix="flowcontrol-")
            made = _extensions(root, self.config, Path(self._scratch.name))
            build_data["force_include"].update(made)
            build_data.update(pure_python=False, infer_tag=True)

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact: str) -> None:
        """Leave nothing behind."""
        if self._scratch is not None:
            self._scratch.cleanup()


def compiled_modules(root: Path, config: dict[str, Any]) -> list[str]:
    """Return the modules that the hook's settings choose to compile, by their paths from the root.

    Raises:
        ValueError: a pattern matches nothing.
    """
    chosen = _named(root, config, "compiled") - _named(root, config, "interpreted")
    return sorted(name for name in chosen if INTERPRETED not in (root / name).read_text())


def make_c(modules: list[str], into: Path) -> list[Any]:
    """Make C of modules; return them as extensions to be built. To be called in the root."""
    from mypyc.build import mypycify  # noqa: PLC0415 - only a build that compiles needs it

    options = ["--no-warn-unused-ignores", f"--cache-dir={into / 'mypy'}"]
    made: list[Any] = mypycify(
        [*options, *modules],
        opt_level="2",
        debug_level="0",
        target_dir=str(into),
        group_name=COMPILED,
    )
    for extension in made:  # direct calls among them; they may share a list
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
    """Write messages, type stubs and services beside each other."""
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
    """Write what xds-protos knows of Envoy's messages, each file after those it needs.

    A build without isolation has no xds-protos: it takes what the installation has written.
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
    """Add a file behind those it needs; protobuf itself brings its own."""
    if file.name not in needed and not file.name.startswith("google/protobuf/"):
        for dependency in file.dependencies:
            _add(dependency, needed)
        needed[file.name] = file


def _extensions(root: Path, config: dict[str, Any], scratch: Path) -> dict[str, str]:
    """Compile; return what was made, with where it goes in the wheel."""
    from setuptools import Distribution  # noqa: PLC0415 - only a build that compiles needs it

    os.chdir(root)  # modules are named from here, and mypy's settings found
    made, c = scratch / "made", scratch / "c"
    extensions = make_c(compiled_modules(root, config), c)
    build = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    build.build_lib, build.build_temp = str(made), str(c)
    build.ensure_finalized()
    build.run()
    return {str(path): str(path.relative_to(made)) for path in made.rglob("*.so")}
