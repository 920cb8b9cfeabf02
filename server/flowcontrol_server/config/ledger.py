"""Settings of the decision ledger."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flowcontrol.replay.ledger import BEGINNING
from flowcontrol_server.common.parts import stranger_among
from flowcontrol_server.common.sections import (
    PathBeside,
    Section,
    SizeFrom1,
    broken,
    can_be_a_file,
    expect,
    written,
)


class LedgerSection(Section):
    """The decision ledger: every fact and every decision, for `replay`."""

    file: PathBeside
    """File with the newest part. Older parts have the same name with .1, .2 and so on; an empty
    .lock is kept beside them. A relative path starts at the configuration file."""
    max_bytes: SizeFrom1 = written("64Mi")
    """Size of a part, at about 400 bytes per request. Then the next part begins."""
    files: int = Field(default=4, ge=1, le=1000, strict=True)
    """Parts kept. Smaller parts are kept beyond this number while all fit into the same space: each
    start begins a part, and a small one displaces no other. Only a ledger that still has its first
    part can be replayed exactly."""
    hide_flow_ids: bool = Field(default=False, strict=True)
    """Writes hashes instead of tenant ids, with a different salt in each run."""

    @field_validator("file")
    @classmethod
    def _in_a_folder(cls, value: Path, info: ValidationInfo) -> Path:
        return expect(value, "must be a file in an existing folder", can_be_a_file, info)

    @model_validator(mode="after")
    def _writes_over_ledgers_alone(self) -> Self:
        try:
            stranger = stranger_among(self.file, self.files, BEGINNING)
        except OSError as error:
            rule = f"must have parts that can be read: {error}"
            raise broken(rule) from error
        if stranger is not None:
            rule = f"must not overwrite a file that is not a ledger, got {str(stranger)!r}"
            raise broken(rule)
        return self
