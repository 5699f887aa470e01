"""The table of GPUs: how long a task takes on each, and what an hour costs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pydantic

from vidgen import contracts
from vidgen.contracts import FieldError, Stage

TABLE = Path(__file__).with_name("gpus.toml")


class Gpu(pydantic.BaseModel):
    """One kind of GPU; None is what nobody measured or told."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    edit_s: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    i2v_s: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    dollars_per_hour: float | None = pydantic.Field(default=None, ge=0, allow_inf_nan=False)

    def seconds(self, stage: Stage) -> float | None:
        return self.edit_s if stage == "edit" else self.i2v_s


def table(path: Path | None = None) -> tuple[dict[str, Gpu], list[FieldError]]:
    """The table that comes with vidgen, with what the file at `path` says put over it; and what is wrong there."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    wrong: list[FieldError] = []
    if path is not None:
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            return {}, [FieldError(field=str(path), message=f"it cannot be read: {exc.strerror}")]
        except ValueError as exc:  # no TOML, or no text
            return {}, [FieldError(field=str(path), message=f"it is not TOML: {exc}")]
        for kind, row in given.items():
            if isinstance(row, dict):
                rows[kind] = rows.get(kind, {}) | row
            else:
                wrong.append(FieldError(field=f"{path}, {kind}", message=f"write the values under a heading: [{kind}]"))
    found: dict[str, Gpu] = {}
    for kind, row in rows.items():
        try:
            found[kind] = Gpu.model_validate(row)
        except pydantic.ValidationError as exc:
            errors = contracts.field_errors(exc)
            wrong += (FieldError(field=f"{path}, {kind}.{one.field}", message=one.message) for one in errors)
    return found, wrong
