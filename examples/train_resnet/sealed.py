"""Renames a checkpoint to its final name after Orbax and the checksums are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orbax.checkpoint import path as orbax_path

from train_resnet import checksums

AtomicRenameTemporaryPath = orbax_path.atomicity.AtomicRenameTemporaryPath
TemporaryPath = orbax_path.atomicity_types.TemporaryPath
UNSEALED = ".unsealed"


class SealedPath(TemporaryPath):
    """Orbax's temporary path, with another folder between it and the checkpoint.

    Orbax's last writes, a time stamp and a marker of completion, come right before it renames the
    folder. Here, it renames the folder to `STEP.unsealed`. Then the checksums are written, and the
    folder is renamed to `STEP`.
    """

    def __init__(self, inner: AtomicRenameTemporaryPath, final: Any):
        self._inner, self._final = inner, final

    @classmethod
    async def validate(cls, temporary_path: Any) -> None:
        """Raises an error if a path is not temporary."""
        await AtomicRenameTemporaryPath.validate(temporary_path)

    @classmethod
    async def validate_final(cls, final_path: Any) -> None:
        """Raises an error if a path is not a checkpoint."""
        await AtomicRenameTemporaryPath.validate_final(final_path)

    @classmethod
    def from_temporary(cls, temporary_path: Any, **options: Any) -> TemporaryPath:
        """Returns Orbax's path, since folders that another process left are never finalized."""
        return AtomicRenameTemporaryPath.from_temporary(temporary_path, **options)

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> TemporaryPath:
        """Returns a path for a checkpoint, and Orbax's path for the items in it."""
        if not final_path.name.isdigit():
            return AtomicRenameTemporaryPath.from_final(final_path, **options)
        unsealed = final_path.parent / (final_path.name + UNSEALED)
        return cls(AtomicRenameTemporaryPath.from_final(unsealed, **options), final_path)

    def get(self) -> Any:
        """Returns the folder to write to."""
        return self._inner.get()

    def get_final(self) -> Any:
        """Returns the folder of the checkpoint."""
        return self._final

    async def create(self) -> Any:
        """Creates the folder to write to."""
        return await self._inner.create()

    async def finalize(self) -> None:
        """Writes the checksums, and renames the folder to its final name."""
        await self._inner.finalize()
        unsealed = Path(self._inner.get_final())
        checksums.write(unsealed)
        os.rename(unsealed, self._final)
