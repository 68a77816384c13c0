"""A set as a webdataset pipeline, for code of other people that streams: whole shards, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate

import webdataset

from shards.reading.reader import ShardSet
from shards.records.record import Record


def stream_records(shards: ShardSet, *, seed: int | None = None) -> webdataset.DataPipeline:
    """Make a pipeline that yields a set's records, each once.

    webdataset deals the shards out, first to nodes, then to a node's workers. Members are read as everywhere here:
    by the sidecar's table and against its crc32c.

    Args:
        shards: an open set; what it leaves out as damaged does not come.
        seed: shuffles the shards, on every node alike; give another each epoch. None keeps the set's order.

    Returns:
        Of `Record`s. Iterating raises DataError at one that is damaged, and names shard, sample and member.

    Example:
        records = stream_records(ShardSet.open("shards/laion"), seed=epoch)
        batches = records.compose(webdataset.shuffle(1000), webdataset.batched(16, collation_fn=collate))
        for batch in webdataset.WebLoader(batches, batch_size=None, num_workers=2):
            ...
    """
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([header.shard for header in shards.headers], seed),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        partial(_read_shards, shards),
    )


def _read_shards(shards: ShardSet, sources: Iterable[Mapping[str, str]]) -> Iterator[Record]:
    ends = list(accumulate(shards.counts))
    numbers = {header.shard: number for number, header in enumerate(shards.headers)}
    own = [numbers[source["url"]] for source in sources]
    for place, number in enumerate(own):
        shards.prefetch(own[place : place + 2])
        for index in range(ends[number] - shards.counts[number], ends[number]):
            yield shards[index]
