"""The manifest: what a set is. Made once by whichever task comes first; every later task must agree with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.differences import require_same
from common.errors import DataError
from common.files import canonical_json, create_once, read_bytes
from shards.files.names import MANIFEST, SCHEMA, UNCOND
from shards.records.codec import decode_uncond, encode_uncond
from shards.records.tensor_file import load_metadata

if TYPE_CHECKING:
    from common.anytext2.conditioning import Uncond


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Identity and provenance of a set."""

    identity: dict[str, Any]
    """Everything that decides what the records are: hashed, and compared between tasks. No paths."""
    provenance: dict[str, Any]
    """Versions, host, time: where it came from; never compared."""

    @property
    def identity_sha256(self) -> str:
        """SHA-256 of the identity's canonical JSON."""
        return hash_identity(self.identity)


def hash_identity(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity's canonical JSON."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def create_or_check(
    folder: Path,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    make_uncond: Callable[[], Uncond],
) -> tuple[Manifest, Uncond]:
    """Join a set: create its uncond and manifest, or check that this task would write the same set.

    `schema` and `uncond_sha256` are added to the identity here. Tasks may race: one of them wins, the others read.

    Args:
        folder: the set's; created if missing.
        identity: JSON values only.
        provenance: JSON values only.
        make_uncond: called only if the set has no unconditional contexts yet.

    Returns:
        The set's manifest and its stored unconditional contexts (not recomputed ones).

    Raises:
        DataError: the set was made with other settings; the message names up to eight differences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = check_if_there(folder, identity)
    if manifest is not None:
        return manifest, read_uncond(folder, manifest)
    wanted = _stored(identity)
    settings_sha256 = hash_identity(wanted)
    if not (folder / UNCOND).exists():
        create_once(folder / UNCOND, encode_uncond(make_uncond(), {"settings_sha256": settings_sha256}))
    data = read_bytes(folder / UNCOND)
    if load_metadata(data, str(folder / UNCOND)).get("settings_sha256") != settings_sha256:
        raise DataError(
            f"{folder}: {UNCOND} was made with other settings by a run that stopped before its manifest; "
            "use another folder, or delete that file if no other task is running"
        )
    wanted["uncond_sha256"] = hashlib.sha256(data).hexdigest()
    create_once(folder / MANIFEST, _encode(Manifest(identity=wanted, provenance=dict(provenance))))
    manifest = read_manifest(folder)
    _check_same(folder, wanted, manifest)
    return manifest, read_uncond(folder, manifest)


def check_if_there(folder: Path, identity: Mapping[str, Any]) -> Manifest | None:
    """Check that this task would write the same set, where there is one; needs no torch.

    Args:
        folder: the set's.
        identity: JSON values only.

    Returns:
        The set's manifest; None if there is none yet.

    Raises:
        DataError: the set was made with other settings; the message names up to eight differences.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    _check_same(folder, _stored(identity), manifest)
    return manifest


def _stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(canonical_json({**identity, "schema": SCHEMA}))
    return values


def read_manifest(folder: Path) -> Manifest:
    """Read a set's manifest.

    Raises:
        DataError: no manifest, or a damaged one.
    """
    path = folder / MANIFEST
    try:
        return decode_manifest(read_bytes(path), str(path))
    except FileNotFoundError:
        kind = "an empty folder" if folder.is_dir() and not any(folder.iterdir()) else "not a set of shards"
        kind = kind if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {kind}: there is no {MANIFEST}; make one with precompute") from None


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse a manifest.

    Raises:
        DataError: damaged (its identity does not match its hash), or of another schema.
    """
    try:
        values = json.loads(data)
        identity, provenance = values["identity"], values["provenance"]
        intact = hash_identity(identity) == values["identity_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{where}: the manifest is {'damaged' if data else 'empty'}; restore it from a copy")
    if identity.get("schema") != SCHEMA:
        raise DataError(f"{where}: shard format {identity.get('schema')!r}, this version reads {SCHEMA}")
    return Manifest(identity=identity, provenance=provenance)


def read_uncond(folder: Path, manifest: Manifest) -> Uncond:
    """Read a set's unconditional contexts.

    Raises:
        DataError: missing, or not those that the manifest names.
    """
    path = folder / UNCOND
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it from a copy: it is part of the set") from None
    check_uncond_hash(data, manifest, str(path))
    return decode_uncond(data, str(path))


def check_uncond_hash(data: bytes, manifest: Manifest, where: str) -> None:
    """Check the bytes of the unconditional contexts against the manifest.

    Raises:
        DataError: not those that the manifest names.
    """
    received, expected = hashlib.sha256(data).hexdigest(), manifest.identity.get("uncond_sha256")
    if received != expected:
        raise DataError(
            f"{where}: SHA-256 is {received[:12]}..., the manifest says {str(expected)[:12]}...; "
            "the file is damaged or from another set"
        )


def _check_same(folder: Path, wanted: Mapping[str, Any], manifest: Manifest) -> None:
    # uncond_sha256: made by the set's first task, perhaps on another device; never compared
    received, expected = (
        {name: value for name, value in identity.items() if name != "uncond_sha256"}
        for identity in (wanted, manifest.identity)
    )
    what = f"{folder}: the set was made with other settings"
    require_same(received, expected, what, "use the same settings or another --out folder")


def _encode(manifest: Manifest) -> bytes:
    values = {
        "identity": manifest.identity,
        "identity_sha256": manifest.identity_sha256,
        "provenance": manifest.provenance,
    }
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
