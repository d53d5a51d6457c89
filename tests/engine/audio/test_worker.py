"""A decoder process returns the same samples; a crash, a hang or too much memory costs one request."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from engine.audio import decoder as decoder_module
from engine.audio.decode import decode, probe
from engine.audio.decoder import Decoder
from engine.audio.recordings import WatchedFile
from engine.errors import AudioError, DecodeError
from engine.passes.decode import decode_rows
from engine.storage.files import write_bytes
from engine.storage.retry import is_transient, retried
from tests.support import ROOT
from tests.support.wav import write_wav

pytest_plugins = ["tests.support.s3_server"]
RATE_HZ = 8000


@pytest.fixture(scope="module")
def decoder():
    one = Decoder(time_limit_s=30.0)
    yield one
    one.close()


@pytest.fixture(scope="module")
def tone():
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE_HZ) / RATE_HZ)).astype("f4")


@pytest.fixture(scope="module")
def wav(tmp_path_factory, tone):
    path = tmp_path_factory.mktemp("wav") / "a.wav"
    write_wav(path, tone, sample_rate_hz=RATE_HZ)
    return str(path)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """An MP3, and then 200 GB of nothing in which a decoder looks for the next frame; such a file takes no space."""
    path = tmp_path_factory.mktemp("mp3") / "endless.mp3"
    sf.write(path, np.zeros(2 * RATE_HZ), RATE_HZ)
    os.truncate(path, 200_000_000_000)
    return str(path)


def is_alive(pid):
    """True if a process exists, or one of its threads after its main thread has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" or len(threads) > 1


def wait_until(true, *, within_s):
    end = time.monotonic() + within_s
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def started(call):
    """Start a call in another thread; the returned function waits for its result or error."""
    found = []

    def run():
        try:
            found.append(call())
        except AudioError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(30)
        return found[0]

    return result


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_the_samples_are_the_same_as_in_this_process(decoder, tmp_path, tone, kind):
    path = str(tmp_path / f"a.{kind}")
    sf.write(path, np.stack([tone, tone[::-1]], 1), RATE_HZ)
    assert decoder.probe(path) == probe(path)
    for segment in ({"start_s": 0.0, "duration_s": None}, {"start_s": 0.3, "duration_s": 0.71}):
        samples_T = decoder.decode(path, sample_rate_hz=16000, **segment)
        assert np.array_equal(samples_T, decode(path, sample_rate_hz=16000, **segment))
        assert samples_T.dtype == np.float32 and samples_T.flags.writeable


@pytest.mark.parametrize(
    "name", ["a b.wav", "new\nline.wav", "'\"\\.wav", "😀é.wav", "x" * 200 + ".wav", os.fsdecode(b"\xff\xfe.wav"), "-"]
)
def test_any_name_works(decoder, tmp_path, tone, name):
    write_wav(tmp_path / "plain", tone, sample_rate_hz=RATE_HZ)
    (tmp_path / "plain").rename(tmp_path / name)
    assert np.array_equal(decoder.decode(str(tmp_path / name), sample_rate_hz=RATE_HZ), tone)


def test_an_error_is_the_same_as_in_this_process(decoder, tmp_path):
    (tmp_path / "empty.wav").touch()
    for path in (tmp_path / "empty.wav", tmp_path / "missing.wav", tmp_path, tmp_path / "\ud800.wav"):
        with pytest.raises(AudioError) as here:
            probe(str(path))
        with pytest.raises(DecodeError) as there:
            decoder.probe(str(path))
        assert str(there.value) == str(here.value)
        assert there.value.error_class == "AudioError" and not there.value.transient


def test_a_name_longer_than_any_path_starts_no_process():
    idle = Decoder()
    with pytest.raises(DecodeError, match="at most 4096 bytes"):
        idle.probe("x" * 10_000_000)
    assert idle.pid is None


def test_only_one_process_is_used(decoder, wav):
    decoder.probe(wav)
    pid = decoder.pid
    decoder.decode(wav, sample_rate_hz=RATE_HZ)
    with pytest.raises(DecodeError):
        decoder.probe("missing")
    assert decoder.pid == pid


REAL_TIME = signal.SIGRTMIN + 3  # a signal without a name


@pytest.fixture
def struck(decoder, wav, monkeypatch):
    """Lets the next children get a signal in the middle of their request: ``struck(signal, times)``."""
    monkeypatch.setattr("engine.storage.retry.time.sleep", lambda seconds: None)
    send, left = Decoder._send, []

    def send_and_strike(self, child, request):
        if left:
            sent = left.pop()
            os.kill(child.pid, signal.SIGSTOP)
            strike = threading.Timer(0.1, lambda: [os.kill(child.pid, number) for number in (sent, signal.SIGCONT)])
            strike.start()
        return send(self, child, request)

    monkeypatch.setattr(Decoder, "_send", send_and_strike)
    decoder.probe(wav)
    return lambda sent, times: left.extend([sent] * times)


def error_of(call):
    with pytest.raises(DecodeError) as caught:
        call()
    return caught.value


OUTSIDE = [signal.SIGKILL, signal.SIGTERM, REAL_TIME]
CRASHES = [signal.SIGSEGV, signal.SIGABRT]


@pytest.mark.parametrize("sent", [*OUTSIDE, *CRASHES])
def test_a_good_file_is_decoded_although_its_decoder_died_once(decoder, wav, tone, struck, sent):
    struck(sent, 1)
    assert np.array_equal(decoder.decode(wav, sample_rate_hz=RATE_HZ), tone)


@pytest.mark.parametrize("sent", [signal.SIGKILL, REAL_TIME])
def test_a_decoder_that_is_killed_from_outside_again_and_again_is_not_the_fault_of_the_file(decoder, wav, struck, sent):
    struck(sent, 4)
    error = error_of(lambda: decoder.probe(wav))
    assert (error.error_class, error.transient, error.attempts) == ("DecoderKilled", True, 4)
    assert "the file may be good" in str(error) and "remove" not in str(error) and repr(wav) in str(error)
    assert decoder.probe(wav).duration_s == 2.0


@pytest.mark.parametrize("sent", CRASHES)
def test_a_crash_that_repeats_is_the_fault_of_the_file_and_costs_that_file_alone(decoder, wav, endless, struck, sent):
    struck(sent, 3)
    error = error_of(lambda: decoder.probe(endless))
    assert (error.error_class, error.transient, error.attempts) == ("DecoderCrash", False, 2)
    assert repr(endless) in str(error) and sent.name in str(error) and not is_transient(error)
    assert error_of(lambda: decoder.probe(endless)).attempts == 1, "its next clip is not tried twice"
    assert decoder.probe(wav).duration_s == 2.0


def test_an_alarm_is_the_time_limit(decoder, wav, struck):
    struck(signal.SIGALRM, 1)
    error = error_of(lambda: decoder.probe(wav))
    assert (error.error_class, error.transient) == ("DecoderTimeout", False) and "longer than 30 s" in str(error)


def test_a_process_that_ends_between_requests_is_replaced(decoder, wav):
    decoder.probe(wav)
    os.kill(decoder.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(decoder.pid), within_s=5)
    assert decoder.probe(wav).duration_s == 2.0


@pytest.mark.timeout(60)
def test_a_hang_costs_one_request_and_its_time(wav, endless):
    slow = Decoder(time_limit_s=1.0)
    for stop in (False, True):
        slow.probe(wav)
        before, begin = slow.pid, time.monotonic()
        if stop:
            os.kill(before, signal.SIGSTOP)
        with pytest.raises(DecodeError, match=r"longer than 1 s\); replace") as caught:
            slow.probe(wav if stop else endless)
        assert caught.value.error_class == "DecoderTimeout" and not caught.value.transient
        assert 0.9 < time.monotonic() - begin < 5 and not is_alive(before)
    assert np.isfinite(slow.decode(wav, sample_rate_hz=RATE_HZ)).all()
    slow.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_time_limit_is_one_for_ten_minutes_of_audio(tmp_path):
    path = tmp_path / "long.aac"
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        for i in range(100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "f4"), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE_HZ, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(4000 * path.read_bytes())
    begin, decoder = time.monotonic(), Decoder(time_limit_s=3.0)
    assert decoder.probe(str(path)).duration_s > 14 * 3600
    assert time.monotonic() - begin > 3.0, "the file must take longer than the limit"
    decoder.close()


@pytest.mark.timeout(60)
def test_the_time_limit_of_a_file_that_hangs_is_waited_for_once(wav, endless):
    slow = Decoder(time_limit_s=1.5)
    rows = [
        {"clip_id": f"{i}", "path": path, "labels": ["a"], "start_s": start_s, "end_s": start_s + 1}
        for i, (path, start_s) in enumerate([(endless, 50000.0), (endless, 50001.0), (endless, 50002.0), (wav, 0.0)])
    ]
    slow.probe(wav)
    begin = time.monotonic()
    clips, failures = decode_rows(rows, root="/", sample_rate_hz=RATE_HZ, clip_s=1.0, decoder=slow)
    assert time.monotonic() - begin < 4.5
    assert [clip.row["clip_id"] for clip in clips] == ["3"]
    assert [(row["clip_id"], row["error_class"], row["attempts"]) for row in failures] == [
        (f"{i}", "DecoderTimeout", 1) for i in range(3)
    ]
    slow.close()


def test_too_much_memory_costs_one_request(tmp_path, tone, wav, monkeypatch):
    monkeypatch.setattr(decoder_module, "MEMORY_BYTES", 100 << 20)
    write_wav(tmp_path / "long.wav", np.zeros(1, "f4"), sample_rate_hz=48000)
    head = bytearray((tmp_path / "long.wav").read_bytes()[:-4])
    head[-4:] = (600 * 48000 * 4).to_bytes(4, "little")
    (tmp_path / "long.wav").write_bytes(head)
    os.truncate(tmp_path / "long.wav", len(head) + 600 * 48000 * 4)  # a sparse file takes no space on the disk
    small = Decoder()
    assert small.probe(str(tmp_path / "long.wav")).duration_s == 600
    with pytest.raises(DecodeError, match="more memory") as caught:
        small.decode(str(tmp_path / "long.wav"), sample_rate_hz=RATE_HZ)
    assert caught.value.error_class == "MemoryError" and not is_transient(caught.value)
    assert np.array_equal(small.decode(wav, sample_rate_hz=RATE_HZ), tone)
    assert not small.decode(str(tmp_path / "long.wav"), sample_rate_hz=RATE_HZ, start_s=500, duration_s=10).any()
    small.close()


PARENT = """
import sys, threading
from engine.audio.decoder import Decoder
decoder = Decoder(time_limit_s=300.0)
decoder.probe(sys.argv[1])
print(decoder.pid, flush=True)
decoder.probe(sys.argv[2])
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_busy", [False, True])
def test_the_process_ends_with_its_parent(wav, endless, tmp_path, is_busy):
    script = PARENT if is_busy else PARENT.replace("decoder.probe(sys.argv[2])", "sys.stdin.read()")
    command = [sys.executable, "-c", script, wav, endless]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert is_alive(child)
        parent.kill()
    assert wait_until(lambda: not is_alive(child), within_s=4)


def test_the_process_ends_with_the_object(wav):
    mine = Decoder()
    mine.probe(wav)
    pid = mine.pid
    mine.close()
    mine.close()
    assert mine.pid is None and not is_alive(pid)
    mine.probe(wav)
    pid = mine.pid
    del mine
    gc.collect()
    assert not is_alive(pid)


def test_the_decoder_imports_no_large_library():
    large = {"torch", "ray", "pyarrow", "boto3"}
    command = f"import engine.audio.decoder, sys; print(*{large} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_process_that_cannot_start_is_a_transient_error(monkeypatch, wav):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DecodeError, match="cannot start a decoder process") as caught:
        Decoder().probe(wav)
    assert caught.value.error_class == "DecoderStart" and is_transient(caught.value)


def test_an_error_can_be_pickled_and_says_whether_it_is_transient(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    error = DecodeError("why", "ConnectionError", transient=True)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.error_class, copy.transient) == ("why", "ConnectionError", True)
    calls = []

    def fail(transient):
        calls.append(transient)
        raise DecodeError("why", transient=transient)

    for transient, attempts in ((True, 3), (False, 1)):
        with pytest.raises(DecodeError) as caught:
            retried(lambda transient=transient: fail(transient), attempts=3)
        assert caught.value.attempts == attempts
    assert calls == [True, True, True, False]


@pytest.mark.parametrize("time_limit_s", [0.0, float("inf")])
def test_a_time_limit_that_cannot_work_raises(time_limit_s):
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        Decoder(time_limit_s=time_limit_s)


class Cut:
    """A file whose connection is cut after some bytes."""

    def __init__(self, path, good_bytes):
        self.file, self.good_bytes, self.num_bytes = open(path, "rb"), good_bytes, path.stat().st_size
        self.seek, self.tell = self.file.seek, self.file.tell

    def read(self, num_bytes):
        if min(self.tell() + num_bytes, self.num_bytes) > self.good_bytes:
            raise ConnectionError("cut")
        return self.file.read(num_bytes)


@pytest.mark.filterwarnings("ignore:Exception ignored from cffi callback")
@pytest.mark.parametrize("kind", ["wav", "flac", "m4a"])
def test_a_lost_connection_is_not_taken_for_the_end_of_the_file(tmp_path, kind):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * RATE_HZ).astype("f4")
    path = tmp_path / f"a.{kind}"
    if kind == "m4a":
        with av.open(str(path), "w", format="ipod") as container:
            stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
            for i in range(0, len(noise) - 1023, 1024):
                frame = av.AudioFrame.from_ndarray(noise[None, i : i + 1024].copy(), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = RATE_HZ, i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        sf.write(path, noise, RATE_HZ)
    whole = path.stat().st_size
    watched = WatchedFile(Cut(path, whole), "name")
    assert np.array_equal(decode(watched, sample_rate_hz=RATE_HZ), decode(path, sample_rate_hz=RATE_HZ))
    assert watched.error is None
    watched = WatchedFile(Cut(path, int(0.97 * whole)), "name")
    with pytest.raises(ConnectionError):  # also of the WAV, of which more than 95 % are there
        decode(watched, sample_rate_hz=RATE_HZ)
    assert isinstance(watched.error, ConnectionError)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")
def test_an_object_store_is_read_by_the_child(s3, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * RATE_HZ).astype("f4")
    sf.write(tmp_path / "a.flac", noise, RATE_HZ)
    address = f"{s3.root}/sounds/a b.flac"
    write_bytes(address, (tmp_path / "a.flac").read_bytes())
    there = Decoder(time_limit_s=60.0)
    assert there.probe(address) == probe(tmp_path / "a.flac")
    segment = {"sample_rate_hz": RATE_HZ, "start_s": 41.3, "duration_s": 2.0}
    assert np.array_equal(there.decode(address, **segment), decode(tmp_path / "a.flac", **segment))
    with pytest.raises(DecodeError, match=r"there is no object .*missing\.flac") as caught:
        there.probe(f"{s3.root}/missing.flac")
    assert caught.value.error_class == "FileNotFoundError" and not caught.value.transient
    monkeypatch.setattr("engine.storage.retry.time.sleep", lambda seconds: None)
    there.time_limit_s = 0.5
    s3.proxy.faults.unavailable_until_s = time.monotonic() + 30
    with pytest.raises(DecodeError) as caught:
        there.decode(address, **segment)
    assert caught.value.error_class == "DecoderTimeout" and caught.value.transient, "the network may recover"
    there.close()


def test_a_decoder_has_the_credentials_of_the_moment(tmp_path, monkeypatch):
    """Settings of S3 may be set, or rotated, after the first file was decoded."""
    sf.write(tmp_path / "a.wav", np.zeros(8000), 8000)
    decoder = Decoder()
    decoder.probe(str(tmp_path / "a.wav"))
    first = decoder.pid
    decoder.probe(str(tmp_path / "a.wav"))
    assert decoder.pid == first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    decoder.probe(str(tmp_path / "a.wav"))
    environ = Path(f"/proc/{decoder.pid}/environ").read_bytes().split(b"\0")
    assert b"AWS_ACCESS_KEY_ID=another" in environ
    decoder.close()


def test_a_relative_path_starts_at_the_current_folder_of_the_moment(tmp_path, monkeypatch):
    decoder = Decoder()
    for name, seconds in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        sf.write(tmp_path / name / "a.wav", np.zeros(8000 * seconds), 8000)
        monkeypatch.chdir(tmp_path / name)
        assert decoder.probe("a.wav").duration_s == seconds
    decoder.close()
