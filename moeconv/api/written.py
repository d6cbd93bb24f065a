"""What a conversion has written or, in a dry run, would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.checkpoint import Checkpoint
from moeconv.io.carried import Content, size_of
from moeconv.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a conversion has written; with `dry_run`, what it would write."""

    out: Path
    "The folder."
    dry_run: bool
    tensors: int
    "Tensors in the files."
    files: Mapping[str, int] = field(default_factory=dict)
    "Bytes of each file of tensors, by name."
    carried: Mapping[str, int] = field(default_factory=dict)
    "Bytes of each file beside them (config, tokenizer), by name."
    nbytes: int
    "Bytes of `files`."
    seconds: float
    dropped: Sequence[str] = ()
    "What of the source is not converted, with the reason."
    notes: Sequence[str] = ()
    "What else there is to know, such as which weights were rounded."
    details: Mapping[str, Any] = field(default_factory=dict)
    "What a conversion finds out besides, as JSON values: an upcycling's check and report, a merge's proof."

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        out: Path,
        *,
        seconds: float | None,
        carried: Mapping[str, Content],
        dropped: Sequence[str] = (),
        notes: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> Written:
        """Sum up a plan that was carried out, or with `seconds` None was not."""
        return cls(
            out=out,
            dry_run=seconds is None,
            tensors=len(plan.jobs),
            files={file.name: file.size for file in plan.files},
            carried={name: size_of(content) for name, content in carried.items()},
            nbytes=plan.nbytes,
            seconds=round(seconds or 0.0, 3),
            dropped=dropped,
            notes=notes,
            details=details or {},
        )

    def open(self) -> Checkpoint:
        """Open what was written.

        Returns:
            The checkpoint.

        Raises:
            SourceError: nothing was, in a dry run.
        """
        from moeconv.formats import open_any  # here: conversions don't read what they wrote

        return open_any(self.out)
