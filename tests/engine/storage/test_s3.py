"""Objects in S3 behave like files, tested against a real server of the protocol."""

import io
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

import engine.storage.s3
import engine.storage.s3_client
from engine.storage.files import (
    atomic_path,
    parquet_file,
    read_json,
    remove_tree,
    sha256_file,
    write_bytes,
    write_json,
    write_parquet,
)
from engine.storage.paths import location, relative_name, resolve_name
from engine.storage.s3 import S3Path
from engine.storage.s3_client import arrow_filesystem, client

pytest_plugins = ["tests.support.s3_server"]

RATE_HZ = 16000
MB = 1 << 20


@pytest.fixture
def bucket(s3):
    return S3Path(s3.root)


def noise_bytes(num_bytes, *, seed=0):
    return random.Random(seed).randbytes(num_bytes)


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        ("s3://b/a/c.wav", "b", "a/c.wav"),
        ("s3:/b/a/c.wav", "b", "a/c.wav"),  # Path removes one slash
        ("s3://b/a//c/", "b", "a//c"),
        ("s3://b//a/c", "b", "/a/c"),
        ("s3://b/a//", "b", "a/"),
        ("s3://b/./a/../c", "b", "./a/../c"),
        ("s3://b/a\\b\nc", "b", "a\\b\nc"),
        ("s3://b/..a/c..", "b", "..a/c.."),
        ("s3://b", "b", ""),
        ("s3://b/", "b", ""),
        ("s3://b/a/..", "b", "a/.."),
        ("s3://b/a b%20?#é.wav", "b", "a b%20?#é.wav"),
    ],
)
def test_an_address_names_a_bucket_and_a_key(uri, bucket, key):
    path = S3Path(uri)
    assert (path.bucket, path.key) == (bucket, key)
    assert S3Path(str(path)) == path == location(uri)


@pytest.mark.parametrize("uri", ["s3://b/a/../../c", "s3://b/..", "s3://b/../c", "s3://b/a/../../b/c"])
def test_a_name_that_climbs_out_of_its_bucket_is_refused(uri):
    with pytest.raises(ValueError, match="must stay in its bucket"):
        S3Path(uri).resolve()


def test_resolving_a_path_does_what_it_does_on_disk():
    for tail in ("x/../y", "./x/./y", "../c/x", "x"):
        assert str((S3Path("s3://b/a") / tail).resolve()) == f"s3:/{(Path('/b/a') / tail).resolve()}"
    assert resolve_name("../stems", folder=S3Path("s3://b/a//run/tracks")) == S3Path("s3://b/a//run/stems")
    for path, folder in (("s3://b/a//x", "s3://b/a//y"), ("s3://b/a//x", "s3://b/c"), ("s3://b/a/x", "s3://b/a/y")):
        name = relative_name(S3Path(path), folder=S3Path(folder))
        assert resolve_name(name, folder=S3Path(folder)) == S3Path(path)


KEYS = ["c/a//b.wav", "c//a.wav", "c/./a.wav", "c/x/../a.wav", "c/a\\b.wav", "c/100%.wav", "c/a%20b.wav", "c/a b+c.wav"]
KEYS += ["c/é\u0301?#&=.wav", "c/..wav", "c/a/"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_the_key_as_listed(s3, bucket, key):
    client().put_object(Bucket=s3.bucket, Key=key, Body=b"12345")
    client().put_object(Bucket=s3.bucket, Key="c/a.wav", Body=b"another")
    address = f"{s3.root}/{key}" + ("/" if key.endswith("/") else "")
    assert S3Path(address).read_bytes() == b"12345" and S3Path(str(S3Path(address))).key == key
    if not key.endswith("/"):  # the empty object of a folder is not listed
        assert sorted(S3Path(f"{s3.root}/c").files()) == sorted([key[2:], "a.wav"])
        assert (S3Path(f"{s3.root}/c") / key[2:]).read_bytes() == b"12345"


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3:/"])
def test_an_address_without_a_bucket_is_refused(uri):
    with pytest.raises(ValueError, match="without a bucket"):
        S3Path(uri)


@pytest.mark.parametrize("tail", ["a.wav", "a/b.tar.gz", "a/.hidden", "a/b", "deep/er/c.d/e"])
def test_parts_of_an_address_are_those_of_a_path(tail):
    ours, theirs = S3Path("s3://b") / tail, Path("/b") / tail
    assert (ours.name, ours.stem, ours.suffix) == (theirs.name, theirs.stem, theirs.suffix)
    assert str(ours.parent) == f"s3:/{theirs.parent}"
    assert str((ours / "x" / "../y").resolve()) == f"s3:/{theirs}/y"


def test_addresses_sort_compare_and_can_be_keys():
    names = ["s3://b/c", "s3://b/a", "s3://a/z"]
    assert sorted(map(S3Path, names)) == [S3Path(name) for name in sorted(names)]
    assert len({S3Path("s3://b/a"), S3Path("s3://b/a/"), S3Path("s3://c/a")}) == 2
    with pytest.raises(TypeError):
        open(S3Path("s3://b/a"))


def test_glob_finds_what_a_path_finds(s3, bucket, tmp_path):
    names = ["a.wav", "b.flac", "x/a.wav", "x/part-1.parquet", "y/part-2.parquet", "y/z/part-3.parquet", "w[1]/a.wav"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        s3.put(name)
    s3.put("marker/")  # some tools write this for a folder
    for pattern in ("*.wav", "*", "x/*", "*/part-*.parquet", "*/*/*", "y/part-[0-9].parquet", "none/*"):
        wanted = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file())
        assert sorted(path.key for path in bucket.glob(pattern)) == wanted, pattern
    assert sorted((child.name, child.is_file) for child in bucket.children()) == [
        *(("a.wav", True), ("b.flac", True), ("marker", False), ("w[1]", False), ("x", False), ("y", False))
    ]


def test_objects_and_prefixes_exist(s3, bucket):
    s3.put("x/a.wav", b"12345")
    assert (bucket / "x").is_dir() and (bucket / "x").exists() and not (bucket / "x").is_file()
    assert (bucket / "x/a.wav").is_file() and not (bucket / "x/a.wav").is_dir()
    assert not (bucket / "x/a").exists() and not (bucket / "x/a.wav/b").exists()
    with (bucket / "x/a.wav").open() as file:
        assert file.seek(0, io.SEEK_END) == 5


def test_many_objects_are_listed_in_pages_and_deleted(s3, bucket, monkeypatch):
    monkeypatch.setattr(engine.storage.s3, "_PAGE_KEYS", 100)
    names = [f"clip {number:03d}.wav" for number in range(350)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: s3.put(f"many/{name}", b"x"), [*names, "deep/er/y.wav"]))
    s3.put("many-others/z.wav")
    assert list((bucket / "many").files()) == [*names, "deep/er/y.wav"]
    assert [request.method for request in s3.proxy.requests] == ["GET"] * 4, "a page has 100 keys"
    assert [child.name for child in (bucket / "many").children() if child.is_file] == names
    s3.proxy.reset()
    remove_tree(bucket / "many")
    assert [request.method for request in s3.proxy.requests].count("POST") == 4
    assert list(bucket.files()) == ["many-others/z.wav"]


def test_the_end_of_a_large_object_is_read_without_the_rest(s3, bucket):
    data = noise_bytes(3 * MB)
    s3.put("large", data)
    with (bucket / "large").open() as file:
        file.seek(-100, io.SEEK_END)
        assert file.read() == data[-100:]
    assert s3.proxy.num_bytes() == 100


def test_reading_and_seeking_give_the_bytes_that_are_there(s3, bucket):
    data = noise_bytes(MB + 17)
    s3.put("x", data)
    chance = random.Random(1)
    with (bucket / "x").open() as ours, io.BytesIO(data) as theirs:
        for _ in range(60):
            for whence in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
                offset = chance.randrange(len(data) + 10)
                start = {io.SEEK_SET: 0, io.SEEK_CUR: theirs.tell(), io.SEEK_END: len(data)}[whence]
                assert ours.seek(offset - start, whence) == theirs.seek(offset - start, whence) == ours.tell() == offset
            num_bytes = chance.choice((1, 100, 70_000, 400_000))
            assert ours.read(num_bytes) == theirs.read(num_bytes)
        with pytest.raises(OSError):
            ours.seek(-1)
        ours.seek(5)
        assert ours.read() == data[5:] and ours.read(1) == b""
    assert (bucket / "x").read_bytes() == data
    s3.put("empty")
    assert (bucket / "empty").open().read() == b""


def sound(kind):
    """A second of a tone as the bytes of a file."""
    samples_T = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ)).astype(np.float32)
    file = io.BytesIO()
    if kind != "m4a":
        soundfile.write(file, samples_T, RATE_HZ, format=kind, subtype="PCM_16")
        return file.getvalue()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples_T[None], format="fltp", layout="mono")
        frame.rate = RATE_HZ
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_soundfile_reads_an_object_as_it_reads_a_file(s3, bucket, kind):
    s3.put(f"a.{kind}", sound(kind))
    with (bucket / f"a.{kind}").open() as file:
        ours_T, rate_hz = soundfile.read(file)
        file.seek(0)
        middle_T, _ = soundfile.read(file, start=4000, frames=1000)
    theirs_T, _ = soundfile.read(io.BytesIO(sound(kind)))
    assert rate_hz == RATE_HZ and np.array_equal(ours_T, theirs_T) and np.array_equal(middle_T, theirs_T[4000:5000])


@pytest.mark.parametrize("kind", ["wav", "flac", "m4a"])
def test_av_reads_an_object_as_it_reads_a_file(s3, bucket, kind):
    def decoded(file):
        with av.open(file) as container:
            return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=-1)

    data = sound(kind)
    s3.put(f"a.{kind}", data)
    with (bucket / f"a.{kind}").open() as file:
        ours_T = decoded(file)
    assert ours_T.shape[-1] >= RATE_HZ and np.array_equal(ours_T, decoded(io.BytesIO(data)))


def test_an_object_written_in_parts_appears_completely_or_not_at_all(s3, bucket, tmp_path):
    data, seen, done = noise_bytes(40 * MB), set(), threading.Event()
    (tmp_path / "large").write_bytes(data)

    def look():
        while not done.is_set():
            head = (bucket / "large")._head()
            seen.add(head and head["ContentLength"])

    reader = threading.Thread(target=look)
    s3.proxy.faults.part_wait_s = 0.2
    reader.start()
    (bucket / "large").upload(tmp_path / "large")
    done.set()
    reader.join()
    assert sum("partNumber=" in request.query for request in s3.proxy.requests) == 3
    assert None in seen and seen <= {None, len(data)}
    assert s3.get("large") == data


KILLED_WRITER = """
import sys
from engine.storage.files import write_bytes
write_bytes(sys.argv[1], bytes(40 << 20))
"""


def test_a_killed_writer_leaves_nothing_that_a_reader_sees(s3, bucket):
    s3.proxy.faults.part_wait_s = 0.5
    with subprocess.Popen([sys.executable, "-c", KILLED_WRITER, f"{s3.root}/x/large"]) as process:
        while not any("partNumber=" in request.query for request in s3.proxy.requests):  # a part is there
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    time.sleep(1.2)
    assert not any("uploadId=" in request.query and request.method == "POST" for request in s3.proxy.requests)
    assert not (bucket / "x").exists() and list(bucket.files()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_object(s3, bucket, error):
    s3.put("a.bin", b"old")
    asides = []
    with pytest.raises(error), atomic_path(bucket / "a.bin") as aside:
        asides.append(aside)
        aside.write_bytes(b"half of the n")
        raise error
    assert s3.get("a.bin") == b"old" and not asides[0].exists()
    write_bytes(bucket / "a.bin", b"new")
    assert s3.get("a.bin") == b"new"


def test_json_hash_and_deletion_work_as_for_files(s3, bucket):
    write_json(bucket / "a.json", {"x": 1.5})
    assert json.loads(s3.get("a.json")) == read_json(bucket / "a.json") == {"x": 1.5}
    s3.put("b", b"abc")
    assert sha256_file(bucket / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (bucket / "b").unlink(missing_ok=True)
    (bucket / "b").unlink(missing_ok=True)
    assert s3.get("b") is None
    s3.put("c.json", b"{")
    with pytest.raises(ValueError, match=f"cannot read {s3.root}/c.json as JSON"):
        read_json(bucket / "c.json")


def test_one_column_of_a_table_is_read_without_the_others(s3, bucket):
    audio = [noise_bytes(500_000, seed=number) for number in range(32)]
    write_parquet(bucket / "t.parquet", pa.table({"number": range(32), "audio": audio}), rows_per_group=16)
    size = len(s3.get("t.parquet"))
    s3.proxy.reset()
    with parquet_file(bucket / "t.parquet") as file:
        assert file.read(columns=["number"])["number"].to_pylist() == list(range(32))
        assert s3.proxy.num_bytes() < size / 16 and len(s3.proxy.requests) <= 5
        assert file.read_row_group(1, columns=["audio"])["audio"].to_pylist() == audio[16:]
    assert s3.proxy.num_bytes() < 0.6 * size


def test_arrow_writes_and_reads_the_same_objects(s3, bucket):
    table = pa.table({"number": range(10)})
    pq.write_table(table, f"{s3.bucket}/by/arrow.parquet", filesystem=arrow_filesystem())
    with parquet_file(bucket / "by/arrow.parquet") as file:
        assert file.read() == table


def test_a_conditional_write_returns_whether_it_was_done(s3, bucket):
    path = bucket / "x"
    assert not path.replace_version(b"1", etag='"0"'), "there is none"
    assert path.create(b"1") and not path.create(b"2")
    version = path.read_version()
    assert version.data == b"1" and 0 <= version.age_s <= 3
    assert path.replace_version(b"3", etag=version.etag) and not path.replace_version(b"4", etag=version.etag)
    assert s3.get("x") == b"3" and (bucket / "y").read_version() is None


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(s3, bucket):
    s3.put("x", bytes(MB))
    with (bucket / "x").open() as file:
        assert file.read(10) == bytes(10)
        s3.put("x", bytes([1]) * MB)
        with pytest.raises(OSError, match=f"cannot read on in {s3.root}/x .it was replaced while it was read"):
            file.read()


# ---- one client for a process


def test_there_is_one_client_for_a_process_and_endpoint(s3, monkeypatch):
    monkeypatch.setattr(engine.storage.s3_client, "_clients", {})
    made, make = [], engine.storage.s3_client._new_client
    monkeypatch.setattr(engine.storage.s3_client, "_new_client", lambda: made.append(1) or make())
    with ThreadPoolExecutor(8) as pool:
        assert len({id(found) for found in pool.map(lambda _: client(), range(64))}) == 1
    assert made == [1]
    started_s = time.perf_counter()
    for _ in range(1000):
        client()
    assert time.perf_counter() - started_s < 0.2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert client().meta.endpoint_url == "http://127.0.0.1:1" and made == [1, 1]


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_is_the_one_in_the_environment(s3, monkeypatch, name):
    monkeypatch.delenv("AWS_REGION")
    assert client().meta.region_name == "us-east-1"
    monkeypatch.setenv(name, "eu-north-1")
    assert client().meta.region_name == "eu-north-1"


def test_amazon_is_addressed_by_the_name_of_the_bucket_and_others_by_path(s3, monkeypatch):
    def url():
        return client().generate_presigned_url("get_object", Params={"Bucket": "our-bucket", "Key": "k"}).split("?")[0]

    assert url() == f"{s3.proxy.url}/our-bucket/k"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert url() == "https://our-bucket.s3.amazonaws.com/k"
