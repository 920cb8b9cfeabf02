"""Settings of what is kept and shown of the engine's decisions."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from server.sections import Section, SizeFrom1, broken, written


class LedgerSection(Section):
    """The decision ledger: every fact and every decision, to be decided again by `replay`."""

    file: Path
    """Newest part; older ones are called the same with .1, .2 and so on. A relative path starts at
    the configuration file."""
    max_bytes: SizeFrom1 = written("64Mi")
    """Size of a part, some 400 bytes a request; then the next begins."""
    files: int = Field(default=4, ge=1, strict=True)
    """Parts kept. Only a ledger with its first part can be decided again exactly."""
    hide_flow_ids: bool = Field(default=False, strict=True)
    """Write hashes in place of tenants' ids, salted anew in each run."""

    @field_validator("file")
    @classmethod
    def _in_a_folder(cls, value: Path, info: ValidationInfo) -> Path:
        path: Path = (info.context or {}).get("directory", Path()) / value
        if not path.parent.is_dir():
            rule = f"must lie in a folder that is there, got {str(path)!r}"
            raise broken(rule)
        return path


class ShadowSection(Section):
    """Another configuration, run beside this one on the same traffic without effect."""

    config: Path
    """Configuration file of which picker, saturation and flowControl count. A relative path starts
    at this file."""

    @field_validator("config")
    @classmethod
    def _is_a_file(cls, value: Path, info: ValidationInfo) -> Path:
        path: Path = (info.context or {}).get("directory", Path()) / value
        if not path.is_file():
            rule = f"must be a file, got {str(path)!r}"
            raise broken(rule)
        return path
