"""Finding out what a set holds: manifest, sidecar headers, completeness. No sample is read."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from common.errors import AppError, DataError, MachineError, reason
from common.faults import disk_fault
from shards.files.frozen import FrozenSet, Shard, hash_set
from shards.files.manifest import Manifest, check_uncond_hash, decode_manifest
from shards.files.names import MANIFEST, UNCOND, parse_shard_name, parse_sidecar_name, shard_name, sidecar_name
from shards.files.sidecar import HEADER_READ_BYTES, SidecarHeader, decode_header, decode_table
from shards.reading.damage import Damage, verify_shard
from shards.reading.store import Store

logger = logging.getLogger(__name__)

_NAMED = 5
_CHUNK = 32
"""Sidecars that a thread reads at a time."""

PLANNED_ONLY = "planned, not written"
"""Ends the line about a shard that is not there yet."""

OnDamage = Literal["raise", "collect", "exclude"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSet:
    """What a set holds."""

    manifest: Manifest
    uncond: bytes
    """Checked bytes of uncond.safetensors."""
    headers: tuple[SidecarHeader, ...]
    """Of every shard with samples, by name."""
    excluded: dict[str, list[str]] = field(default_factory=dict)
    """Damaged shard to its keys left out."""
    left_out: tuple[str, ...] = ()
    """Why something was left out, one line each."""
    replaces: tuple[str, ...] = ()
    """Hashes of the sets that a run had before something was left out of them."""
    unread: tuple[str, ...] = ()
    """What could not be reached, so that nothing is known of it, one line each; only where damage is collected."""

    def count(self, header: SidecarHeader) -> int:
        """Samples of a shard that are in the set."""
        return header.count - len(self.excluded.get(header.shard, ()))

    @property
    def set_hash(self) -> str:
        """Identifies exactly these samples, hence their order in training."""
        shards = [(header.shard, header.sha256, header.count) for header in self.headers]
        return hash_set(self.manifest.identity_sha256, shards, self.excluded)


def find_set(store: Store, *, allow_incomplete: bool, damage: OnDamage) -> OpenedSet:
    """Find all committed shards of a set; see `ShardSet.open`.

    Args:
        store: where to look.
        allow_incomplete: take what is committed although the plan has more.
        damage: "raise" the first; "collect" those of whole shards in `left_out` and `unread`; or read everything
            and "exclude" what is damaged.
    """
    manifest, uncond = _read_manifest(store)
    sizes = store.sizes()
    shards = sorted(name for name in sizes if parse_shard_name(name) is not None)
    sidecars = sorted(name for name in sizes if parse_sidecar_name(name) is not None)
    damages: list[Damage] = []
    headers = []
    unread: list[MachineError] = []
    for name, header in _read_headers(store, sidecars):
        try:
            headers.append(_check_header(store, name, header, manifest, sizes, any_size=damage != "raise"))
        except DataError as error:
            if damage == "raise":
                raise
            damages.append(Damage(shard=name, sample=None, whole=True, message=str(error)))
        except MachineError as error:
            if damage != "collect":
                raise
            unread.append(error)
    missing = list(_missing(store, shards, sidecars, sizes))
    if missing and not allow_incomplete and damage == "raise":
        raise _incomplete(store, missing)
    damages += [Damage(shard=n, sample=None, whole=True, message=f"{n}: {problem}") for n, problem in missing]
    excluded: dict[str, list[str]] = {}
    if damage == "exclude":
        headers, excluded = _exclude(store, headers, damages)
    opened = OpenedSet(
        manifest=manifest,
        uncond=uncond,
        headers=tuple(header for header in headers if header.count),
        excluded=excluded,
        left_out=tuple(found.message for found in damages),
        unread=tuple(map(str, unread)),
    )
    if unread and not opened.headers:
        raise unread[0]
    _say_left_out(store, opened)
    return opened


def select_frozen(store: Store, frozen: FrozenSet, *, exclude_damaged: bool = False) -> OpenedSet:
    """Find the shards of a frozen set; see `ShardSet.open_frozen`."""
    manifest, uncond = _read_manifest(store)
    if manifest.identity_sha256 != frozen.identity_sha256:
        raise DataError(
            f"{store.location}: another set than the run was started on; give the set it was started on"
        )
    sizes = store.sizes()
    names = [sidecar_name(name) for name, _sha256, _count in frozen.shards]
    lost = [name for name in names if name not in sizes]
    if lost and not exclude_damaged:
        raise DataError(
            f"{store.location}: {_list(lost)} of the run's set are missing; restore them, go on without by "
            "--exclude-damaged, or start a new run"
        )
    headers: list[SidecarHeader] = []
    damages: list[Damage] = []
    for (name, header), shard in zip(_read_headers(store, names), frozen.shards, strict=True):
        any_size = exclude_damaged or shard[0] in frozen.excluded
        try:
            checked = _check_header(store, name, header, manifest, sizes, any_size=any_size)
            headers.append(_check_frozen(store, checked, shard))
        except DataError as error:
            if not exclude_damaged:
                raise
            damages.append(Damage(shard=shard[0], sample=None, whole=True, message=str(error)))
    opened = OpenedSet(
        manifest=manifest,
        uncond=uncond,
        headers=tuple(headers),
        excluded=frozen.excluded,
        replaces=frozen.replaces,
    )
    return _exclude_more(store, opened, frozen, damages) if exclude_damaged else opened


def _check_frozen(store: Store, header: SidecarHeader, shard: Shard) -> SidecarHeader:
    name, sha256, _count = shard
    if (header.shard, header.sha256, header.count) != shard:
        raise DataError(
            f"{store.location}, {name}: its content is not that which the run was started on (SHA-256 "
            f"{header.sha256[:12]}..., expected {sha256[:12]}...); restore it, go on without by "
            "--exclude-damaged, or start a new run"
        )
    return header


def _exclude_more(store: Store, opened: OpenedSet, frozen: FrozenSet, damages: list[Damage]) -> OpenedSet:
    """Leave out of a frozen set what is damaged now; if that is nothing new, it stays the same set."""
    headers, found = _exclude(store, opened.headers, damages)
    excluded = {}
    for header in headers:
        keys = {*frozen.excluded.get(header.shard, ()), *found.get(header.shard, ())}
        if keys or header.shard in frozen.excluded:
            excluded[header.shard] = sorted(keys)
    left = dataclasses.replace(
        opened,
        headers=tuple(headers),
        excluded=excluded,
        left_out=tuple(damage.message for damage in damages),
    )
    _say_left_out(store, left)
    if left.set_hash == frozen.set_hash:
        return left
    return dataclasses.replace(left, replaces=(*frozen.replaces, frozen.set_hash))


def _say_left_out(store: Store, opened: OpenedSet) -> None:
    """Log what was left out.

    Raises:
        DataError: that is everything.
    """
    if sum(map(opened.count, opened.headers)) == 0:
        why = f" ({opened.left_out[0]})" if opened.left_out else ""
        raise DataError(f"{store.location}: the set has no committed sample{why}; run precompute first")
    for message in opened.left_out[:_NAMED]:
        logger.warning("left out: %s", message)
    if len(opened.left_out) > _NAMED:
        logger.warning("left out: and %d more", len(opened.left_out) - _NAMED)


def _read_manifest(store: Store) -> tuple[Manifest, bytes]:
    missing = f"not a set of shards: there is no {MANIFEST}; make one with precompute"
    manifest = decode_manifest(_read(store, MANIFEST, missing), f"{MANIFEST} in {store.location}")
    uncond = _read(store, UNCOND, f"{UNCOND} is missing; restore it from a copy: it is part of the set")
    check_uncond_hash(uncond, manifest, f"{UNCOND} in {store.location}")
    return manifest, uncond


def _read(store: Store, name: str, missing: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        raise DataError(f"{store.location}: {missing}") from None


def _read_headers(store: Store, names: Sequence[str]) -> Iterator[tuple[str, SidecarHeader | AppError]]:
    """Read the first line of many sidecars; waiting for a file server is done side by side."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(8) as pool:
        for chunk, found in zip(
            chunks, pool.map(lambda chunk: [_read_header(store, name) for name in chunk], chunks), strict=True
        ):
            yield from zip(chunk, found, strict=True)


def _read_header(store: Store, name: str) -> SidecarHeader | AppError:
    where = f"{name} in {store.location}"
    try:
        data = store.read(name, HEADER_READ_BYTES)
        if b"\n" not in data:
            data = store.read(name)
        return decode_header(data, where)
    except OSError as error:
        return disk_fault(error, where) or DataError(f"{where}: cannot be read ({reason(error)})")
    except (DataError, MachineError) as error:
        return error


def _check_header(
    store: Store,
    name: str,
    header: SidecarHeader | AppError,
    manifest: Manifest,
    sizes: dict[str, int],
    *,
    any_size: bool,
) -> SidecarHeader:
    where = f"{name} in {store.location}"
    if not isinstance(header, SidecarHeader):
        raise header
    if sidecar_name(header.shard) != name:
        raise DataError(f"{where}: it is the sidecar of {header.shard}, renamed; give both files their names back")
    if header.identity_sha256 != manifest.identity_sha256:
        raise DataError(f"{where}: the sidecar belongs to another set than this manifest; remove it and its shard")
    size = sizes.get(header.shard)
    if size != header.bytes and not (any_size and size):
        state = "missing" if size is None else "empty" if size == 0 else f"{size} bytes, expected {header.bytes}"
        raise DataError(
            f"{header.shard} in {store.location}: the shard is {state}; run precompute again to write it anew, "
            "or train with --exclude-damaged"
        )
    return header


def _incomplete(store: Store, missing: Sequence[tuple[str, str]]) -> DataError:
    named = "; ".join(f"{name}: {problem}" for name, problem in missing[:_NAMED])
    more = f"; and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return DataError(
        f"{store.location}: the set is incomplete ({named}{more}); run precompute until it is done, or pass "
        "--allow-incomplete to use what is committed"
    )


def _missing(
    store: Store, shards: Sequence[str], sidecars: Sequence[str], sizes: dict[str, int]
) -> Iterator[tuple[str, str]]:
    committed = set(sidecars)
    planned = {shard_name(index) for index in range(_count_planned(store, sizes))}
    for name in sorted(planned | set(shards)):
        if sidecar_name(name) not in committed:
            yield name, "it has no sidecar, so it was never committed" if name in sizes else PLANNED_ONLY


def _count_planned(store: Store, sizes: dict[str, int]) -> int:
    """Count the shards of the plan from the first line of its last segment."""
    segments = sorted(name for name in sizes if name.startswith("plan/") and name.endswith(".txt"))
    if not segments:
        return 0
    try:
        header = json.loads(store.read(segments[-1], HEADER_READ_BYTES).partition(b"\n")[0])
        return int(header["first_shard"]) + -(-int(header["count"]) // int(header["samples_per_shard"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise DataError(
            f"{segments[-1]} in {store.location}: the plan is damaged; restore it from a copy"
        ) from None


def _exclude(
    store: Store, headers: Sequence[SidecarHeader], damages: list[Damage]
) -> tuple[list[SidecarHeader], dict[str, list[str]]]:
    """Verify every shard; append what is found to `damages`."""
    kept, excluded = [], {}
    for header in headers:
        try:
            name = sidecar_name(header.shard)
            found = verify_shard(store.shard_path(header), header, decode_table(store.read(name), header, name))
        except DataError as error:
            found = [Damage(shard=header.shard, sample=None, whole=True, message=str(error))]
        damages += [damage for damage in found if damage.whole or damage.sample is not None]
        if any(damage.whole for damage in found):
            continue
        kept.append(header)
        if found:  # perhaps without any lost sample: what is damaged is named all the same
            excluded[header.shard] = sorted({damage.sample for damage in found if damage.sample is not None})
    return kept, excluded


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
