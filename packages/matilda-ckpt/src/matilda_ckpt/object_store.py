"""Checkpoints in object storage: committed by the conditional creation of one object.

    claim a name (create `.claims/NAME`, fails when it exists) → upload files → MANIFEST.json
    → create COMMIT only where there is none (`If-None-Match: *`) → acknowledged → retention.

A reader sees a checkpoint when its COMMIT exists, and that seals the manifest by its hash. There is
no lock: writers that race get names of their own, no object is ever replaced, and each keeps the
newest. What a dead writer left is invisible, and removed by a later save after a day.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from matilda_ckpt import strict_json
from matilda_ckpt.catalog import QUARANTINE_NAME, CheckpointInfo, info_of
from matilda_ckpt.errors import CheckpointError, SaveError
from matilda_ckpt.fs import Entry
from matilda_ckpt.manifest import COMMIT_NAME, MANIFEST_NAME, FileEntry, StateEntry
from matilda_ckpt.object_fs import ObjectFs
from matilda_ckpt.retention import Keep
from matilda_ckpt.store import Draft, SaveRequest, Store

CLAIMS_NAME = ".claims"
ABANDONED_S = 24 * 3600.0
"""An uncommitted checkpoint this old has no living writer."""
_TRIES = 100


class ObjectStore(Store):
    """`Store` in a bucket. The `root` is a URL."""

    def __init__(
        self,
        url: str,
        *,
        run_id: str,
        threads: int = 1,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._objects = ObjectFs(url, storage_options)
        super().__init__(self._objects, url, run_id=run_id, threads=threads, share_bytes=None)

    def _listed(self) -> dict[str, tuple[Entry, ...] | None]:
        return self._objects.list_two(self.root)

    def acquire(self) -> None:
        """Nothing to take: racing writers cannot harm each other."""

    def release(self) -> None:
        return

    def begin(self, step: int) -> Draft:
        """Claim a name that nobody has used."""
        for _ in range(_TRIES):
            name = self._unclaimed(step)
            note = strict_json.dumps({"run_id": self.run_id, "nonce": self._nonce()})
            try:
                self._objects.put_new(f"{self.root}/{CLAIMS_NAME}/{name}", note)
            except FileExistsError:
                continue
            return Draft(name, f"{self.root}/{name}")
        raise SaveError(f"no free name for step {step} in `{self.root}` after {_TRIES} tries")

    def _unclaimed(self, step: int) -> str:
        base = f"step-{step:08d}"
        taken = {name.split("/")[0] for name in self._objects.names_below(self.root)}
        taken |= set(self._objects.names_below(f"{self.root}/{CLAIMS_NAME}"))
        if base not in taken:
            return base
        count = 1
        while f"{base}.{count}" in taken:
            count += 1
        return f"{base}.{count}"

    def finish(
        self,
        draft: Draft,
        request: SaveRequest,
        files: Mapping[str, FileEntry],
        state: Mapping[str, StateEntry],
    ) -> CheckpointInfo:
        manifest, data, commit = self._seal(draft, request, files, state)
        self.write_text(draft, MANIFEST_NAME, data)
        request.alive()
        self._publish(f"{draft.temp}/{COMMIT_NAME}", commit.to_bytes())
        self._verified[draft.name] = self._stamp(draft.name)
        return info_of(self.root, draft.name, manifest, commit.manifest_sha256)

    def _publish(self, path: str, seal: bytes) -> None:
        """Create COMMIT; when the answer was lost, what is there now decides."""
        try:
            self._objects.put_new(path, seal)
        except OSError:
            # A repeated request meets the object that its first try has made.
            try:
                found = self._objects.read_all(path)
            except OSError:
                found = b""
            if found != seal:
                raise

    def _discard(self, path: str) -> None:
        """Remove an uncommitted checkpoint; best effort."""
        try:
            names = self._objects.names_below(path)
            if COMMIT_NAME in names:
                # The create was refused to us and given to another, or the answer came too late.
                return
            for name in names:
                self.fs.unlink(f"{path}/{name}")
            self.fs.unlink(f"{self.root}/{CLAIMS_NAME}/{os.path.basename(path)}")  # noqa: PTH119
        except OSError:
            return

    def retire(self, keep: Keep) -> list[str]:
        doomed = self._doomed(keep)
        for name in doomed:
            self._verified.pop(name, None)
            # From here on it is no checkpoint; a reader that has it open sees damage.
            self.fs.unlink(f"{self.root}/{name}/{COMMIT_NAME}")
            self._discard(f"{self.root}/{name}")
        self._clear_abandoned()
        return doomed

    def _clear_abandoned(self) -> None:
        below = self._objects.names_below(self.root)
        claims = [n.split("/", 1)[1] for n in below if n.startswith(f"{CLAIMS_NAME}/")]
        for name in claims:
            aside = f"{QUARANTINE_NAME}/{name}.reason.json"
            if f"{name}/{COMMIT_NAME}" in below or aside in below:
                continue
            if self._objects.age_s(f"{self.root}/{CLAIMS_NAME}/{name}") > ABANDONED_S:
                self._discard(f"{self.root}/{name}")

    def quarantine(self, name: str, reason: str) -> str:
        """Take its COMMIT away and note it down; the data stays where it is."""
        self._verified.pop(name, None)
        path = f"{self.root}/{name}"
        try:
            seal = self._objects.read_all(f"{path}/{COMMIT_NAME}")
        except OSError:
            seal = b""
        note = {"checkpoint": name, "reason": reason, "commit": seal.decode("utf-8", "replace")}
        aside = f"{self.root}/{QUARANTINE_NAME}/{name}.reason.json"
        try:
            # Another reader may have been faster, here or below.
            with contextlib.suppress(FileExistsError):
                self._objects.put_new(aside, strict_json.dumps(note))
            with contextlib.suppress(FileNotFoundError):
                self.fs.unlink(f"{path}/{COMMIT_NAME}")
        except OSError as error:
            raise CheckpointError(f"`{path}` cannot be set aside: {error}") from error
        return path

    def quarantined(self) -> list[str]:
        found = self._objects.names_below(f"{self.root}/{QUARANTINE_NAME}")
        return sorted(name.removesuffix(".reason.json") for name in found)
