"""Sets on a real S3 server process, through a proxy that cuts connections."""

from __future__ import annotations

import itertools
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import DataError, MachineError, UsageError
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet
from shards.remote import connection as remote_module
from shards.remote.cache import FileCache
from shards.remote.cached_store import CachedStore
from shards.remote.connection import RemoteFolder
from shards.remote.upload import upload_set
from tests.shards.builders import assert_same_record, flip_bit, input_ids, make_record, write_set

IDS = input_ids(12)


class CuttingProxy:
    """A TCP proxy that cuts connections after some bytes of an answer or a request."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.cuts = 0
        self._budget: dict[str, int | None] = {"up": None, "down": None}
        self._times = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, direction: str, after: int, times: int) -> None:
        """Cut `times` connections once more than `after` bytes went up or down."""
        self.cuts, self._times = 0, times
        self._budget = {"up": None, "down": None, direction: after}

    def heal(self) -> None:
        self._times = 0

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for direction, source, sink in (("up", client, server), ("down", server, client)):
                threading.Thread(target=self._pump, args=(direction, source, sink), daemon=True).start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                passed += len(data)
                after = self._budget[direction]
                if self._times > 0 and after is not None and passed > after:
                    self._times -= 1
                    self.cuts += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server did not start"
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CuttingProxy:
    made = CuttingProxy(s3_port)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{made.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "SHARD_CACHE_DIR": str(tmp_path / "cache"),
        "NO_PROXY": "*",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "_FIRST_WAIT_SECONDS", 0.01)
    return made


@pytest.fixture
def url(proxy: CuttingProxy, tmp_path: Path) -> str:
    bucket = f"s3://bucket-{abs(hash(str(tmp_path)))}"
    fs, root = RemoteFolder(bucket).connect()
    fs.mkdir(root)
    return f"{bucket}/set"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", IDS)
    return tmp_path / "set"


def assert_whole(location: str) -> None:
    shards = ShardSet.open(location)
    assert len(shards) == 12
    for record, input_id in zip(shards, IDS, strict=True):
        assert_same_record(record, make_record(input_id))


def test_a_set_goes_up_and_comes_back_bit_by_bit(folder: Path, url: str) -> None:
    assert upload_set(folder, url) == [f"shard-{n:06d}.tar" for n in range(3)]
    assert_whole(url)
    assert ShardSet.open(url).set_hash == ShardSet.open(folder).set_hash
    assert upload_set(folder, url) == []
    write_set(folder, [*IDS, "new1"])
    assert upload_set(folder, url) == ["shard-000003.tar"]
    assert len(ShardSet.open(url)) == 13


@pytest.mark.parametrize("after", [300, 3000, 20_000])
def test_a_download_that_is_cut_starts_again(folder: Path, url: str, proxy: CuttingProxy, after: int) -> None:
    upload_set(folder, url)
    shards = ShardSet.open(url)
    proxy.cut("down", after, times=2)
    for index in range(12):
        assert_same_record(shards[index], make_record(IDS[index]))
    assert proxy.cuts == 2


@pytest.mark.parametrize("after", [300, 3000, 20_000])
def test_an_upload_that_is_cut_starts_again(folder: Path, url: str, proxy: CuttingProxy, after: int) -> None:
    proxy.cut("up", after, times=2)
    upload_set(folder, url)
    assert proxy.cuts == 2
    assert_whole(url)


def test_a_connection_that_stays_cut_leaves_nothing_half(
    folder: Path, url: str, proxy: CuttingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_TRIES", 2)  # s3fs tries each of them several times
    proxy.cut("up", 20_000, times=10**6)  # small files pass, shards do not
    with pytest.raises(MachineError, match=r"uploading shard-000000\.tar failed 2 times"):
        upload_set(folder, url)
    with pytest.raises(DataError, match="no committed sample"):
        ShardSet.open(url, allow_incomplete=True)
    proxy.heal()
    upload_set(folder, url)
    shards = ShardSet.open(url)
    proxy.cut("down", 200, times=10**6)
    store = CachedStore(url)
    with pytest.raises(MachineError, match=r"downloading shard-000000\.tar failed 2 times"):
        store.shard_path(shards.headers[0])
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []
    proxy.heal()
    assert_whole(url)


def test_damage_on_the_server_is_found_before_use(folder: Path, url: str) -> None:
    upload_set(folder, url)
    flip_bit(folder / "shard-000001.tar", 8 * 600)
    fs, _root = RemoteFolder(url).connect()
    fs.put_file(str(folder / "shard-000001.tar"), f"{url}/shard-000001.tar")
    shards = ShardSet.open(url)
    with pytest.raises(DataError, match=r"shard-000001\.tar: SHA-256 of the download"):
        shards[4]
    assert_same_record(shards[0], make_record(IDS[0]))
    with pytest.raises(DataError, match="damaged, so it is not uploaded"):
        fs.rm_file(f"{url}/shard-000001.json")
        upload_set(folder, url)


def test_another_set_under_the_url_is_refused(folder: Path, url: str, tmp_path: Path) -> None:
    upload_set(folder, url)
    other = tmp_path / "other"
    write_set(other, IDS)
    (other / "manifest.json").write_bytes((other / "manifest.json").read_bytes() + b" ")
    with pytest.raises(DataError, match="of another set"):
        upload_set(other, url)


def test_training_from_a_url_gives_the_same_batches_as_from_a_folder(
    folder: Path, url: str, tmp_path: Path
) -> None:
    upload_set(folder, url)
    streams = []
    for location, workers in ((str(folder), 0), (url, 0), (url, 2)):
        loader = ShardLoader(ShardSet.open(location), seed=0, batch_size=5, window_shards=2, num_workers=workers)
        streams.append([batch.indices.tolist() for batch in itertools.islice(loader, 6)])
    assert streams[0] == streams[1] == streams[2]
    ShardSet.open(url).freeze(tmp_path / "run")
    assert ShardSet.open_frozen(tmp_path / "run").set_hash == ShardSet.open(folder).set_hash


def test_the_next_window_is_fetched_before_it_is_asked_for(folder: Path, url: str, tmp_path: Path) -> None:
    upload_set(folder, url)
    loader = ShardLoader(ShardSet.open(url), seed=0, batch_size=4, window_shards=1, num_workers=0)
    next(iter(loader))  # of the first window, one shard
    for _ in range(200):
        if sum(path.suffix == ".tar" for path in (tmp_path / "cache").iterdir()) >= 2:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the shard of the next window never came")


def test_old_shards_leave_the_cache_when_it_is_full(folder: Path, url: str, tmp_path: Path) -> None:
    upload_set(folder, url)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    store = CachedStore(url, tmp_path / "small", cache_bytes=int(2.5 * size))
    headers = ShardSet.open(url).headers
    for header in (headers[0], headers[1], headers[0], headers[2]):
        assert store.shard_path(header).stat().st_size == header.bytes
        time.sleep(0.01)
    kept = {path.name.partition("-")[2] for path in (tmp_path / "small").iterdir() if path.suffix == ".tar"}
    assert kept == {headers[0].shard, headers[2].shard}


def _ask(folder: Path, log: Path, barrier: float) -> None:
    time.sleep(max(0, barrier - time.time()))

    def make(path: Path) -> None:
        with log.open("ab") as file:
            file.write(b"x")
        time.sleep(0.2)
        path.write_bytes(b"content")

    assert FileCache(folder, 0).get("name", make).read_bytes() == b"content"


def test_many_processes_that_ask_for_one_file_fetch_it_once(tmp_path: Path) -> None:
    context, barrier = multiprocessing.get_context("fork"), time.time() + 0.3
    tasks = [context.Process(target=_ask, args=(tmp_path / "c", tmp_path / "log", barrier)) for _ in range(6)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    assert (tmp_path / "log").read_bytes() == b"x"


def test_a_failed_fetch_leaves_the_cache_empty_and_can_be_repeated(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "c", 0)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        cache.get("name", fail)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".name.lock"]
    assert cache.get("name", lambda path: path.write_bytes(b"whole")).read_bytes() == b"whole"


def test_an_unknown_protocol_is_an_error_that_says_so() -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        ShardSet.open("nosuch://bucket/set")
