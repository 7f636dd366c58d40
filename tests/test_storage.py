"""Runs in an object store, on a local S3 server: files, failures, the lease, and the order of uploads."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore, object_store

from spartan_ray.errors import InputError, RunError
from spartan_ray.run import storage
from spartan_ray.run.place import Place, fetch, in_report, last_epoch, reading
from spartan_ray.run.storage import Lease, Store

URL = f"s3://{BUCKET}/runs"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(autouse=True)
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    """Return the server, empty and without failures. Retries do not wait."""
    for name in server.names():
        server.client().delete_object(Bucket=BUCKET, Key=name)
    monkeypatch.setattr(storage, "RETRIES", (0.0,) * 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield server
    server.fails = server.fails_after = lambda method, path: False


def scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("spartan-ray-*"))


def test_reading_a_store_leaves_no_file_open(s3: ObjectStore) -> None:
    def opened() -> list[str]:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return [link for link in links if link.startswith(tempfile.gettempdir())]

    Store(f"{URL}/x").write("config.yaml", b"one")
    with reading(f"{URL}/x") as folder:
        assert (folder / "config.yaml").read_bytes() == b"one"
        assert len(opened()) == 1  # the lock of the copy
    assert not opened()


def test_files_are_read_and_written_by_their_names(s3: ObjectStore) -> None:
    store = Store(f"{URL}/x")
    assert set(store.sizes()) == set()
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"two")
    store.write("c", bytes(3_000_000))
    assert set(store.sizes()) == {"a/b.txt", "c"}
    assert store.read("a/b.txt") == b"two" == s3.content("runs/x/a/b.txt")
    assert store.read("c") == bytes(3_000_000)
    with pytest.raises(FileNotFoundError):
        store.read("b.txt")
    store.delete("a/b.txt")
    store.delete("a/b.txt")
    assert set(Store(f"{URL}/x").sizes()) == {"c"}


def test_only_one_process_creates_a_file() -> None:
    """Eight threads try at the same time, each with its own connection."""
    made: list[bytes] = []
    together = threading.Barrier(8)

    def create(content: bytes) -> None:
        store = Store(f"{URL}/x")
        together.wait()
        if store.create("lease/000001.json", content):
            made.append(content)

    threads = [threading.Thread(target=create, args=(f"{number}".encode(),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [Store(f"{URL}/x").read("lease/000001.json")] == made


def test_a_store_that_errs_is_tried_again_and_then_is_an_error_that_names_the_file(s3: ObjectStore) -> None:
    store, left = Store(f"{URL}/x"), [3]

    def few(method: str, path: str) -> bool:
        left[0] -= 1
        return left[0] >= 0

    for action in (lambda: store.write("a", b"1"), lambda: store.read("a"), store.sizes, lambda: store.delete("a")):
        left[0] = 3
        s3.fails = few
        action()
        assert left[0] < 0
    s3.fails = lambda method, path: method == "PUT"
    with pytest.raises(RunError, match=rf"^{URL}/x/a: cannot write: ") as caught:
        store.write("a", b"1")
    assert "\n" not in str(caught.value)
    assert set(store.sizes()) == set()


def test_what_was_created_by_a_try_that_seemed_to_fail_is_ours(s3: ObjectStore) -> None:
    store, left = Store(f"{URL}/x"), [1]

    def once(method: str, path: str) -> bool:
        left[0] -= method == "PUT"
        return method == "PUT" and left[0] >= 0

    s3.fails_after = once
    assert store.create("a", b"mine")
    assert left[0] < 0
    assert not store.create("a", b"another's")


def test_a_server_that_does_not_answer_is_an_error(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(storage, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(storage, "RETRIES", ())
    s3.fails = lambda method, path: answered.wait()
    try:
        with pytest.raises(RunError, match=r"cannot write: TimeoutError: no answer in 1 s$"):
            Store(f"{URL}/x").write("a", b"1")
    finally:
        answered.set()


def test_a_bucket_that_is_not_there_or_not_ours_is_an_error_at_once() -> None:
    with pytest.raises(RunError, match=r"s3://nobucket/x/spartan-.*: cannot create: .*bucket does not exist"):
        Store("s3://nobucket/x").check()
    Store(f"{URL}/y").check()
    assert Store(f"{URL}/y").sizes() == {}


def test_a_package_that_a_url_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(InputError, match=r"^s3://bucket/x: needs the package s3fs$"):
        Store("s3://bucket/x")


def test_a_lease_is_one_process_s_until_it_is_released_or_no_longer_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.02)
    store = Store(f"{URL}/x")
    first = Lease.take(store)
    with pytest.raises(InputError, match=f"another process writes this run: process {os.getpid()} on"):
        Lease.take(Store(f"{URL}/x"))
    first.hold()
    first.release()
    second = Lease.take(store)
    # Its process dies, and nothing renews the lease.
    second.ended.set()
    second.thread.join()
    monkeypatch.setattr(storage, "LEASE_SECONDS", 0.1)
    third = Lease.take(store)
    third.hold()
    assert third.number == 3
    with pytest.raises(RunError, match=f"^{URL}/x: another process has taken this run over$"):
        second.hold()
    third.release()


def test_of_those_who_wait_for_a_lease_one_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.02)
    dead = Lease.take(Store(f"{URL}/x"))
    dead.ended.set()
    dead.thread.join()
    got: list[Lease] = []
    refused: list[InputError] = []

    def take() -> None:
        try:
            got.append(Lease.take(Store(f"{URL}/x")))
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)
    got[0].release()


def test_what_changed_is_sent_and_checksums_follow_what_they_are_of(s3: ObjectStore) -> None:
    before = scratch_folders()
    place = Place.new(URL, "x")
    assert place.where == f"{URL}/x"
    (place.path / "checkpoints").mkdir()
    for name in ("a.safetensors", "a.sha256", "b.safetensors"):
        (place.path / "checkpoints" / name).write_bytes(name.encode())
    (place.path / "metrics.jsonl").write_bytes(b"1\n")
    (place.path / "final.safetensors.tmp").write_bytes(b"torn")
    s3.requests.clear()
    place.push()
    written = [path.removeprefix(f"/{BUCKET}/runs/x/") for method, path in s3.requests if method == "PUT"]
    assert written == [
        "checkpoints/a.safetensors",
        "checkpoints/b.safetensors",
        "metrics.jsonl",
        "checkpoints/a.sha256",
    ]
    s3.requests.clear()
    with (place.path / "metrics.jsonl").open("ab") as file:
        file.write(b"2\n")
    for name in ("a.safetensors", "a.sha256"):
        (place.path / "checkpoints" / name).unlink()
    place.push()
    done = [(method, path.removeprefix(f"/{BUCKET}/runs/x/")) for method, path in s3.requests if method != "GET"]
    assert done == [
        ("PUT", "metrics.jsonl"),
        ("DELETE", "checkpoints/a.sha256"),
        ("DELETE", "checkpoints/a.safetensors"),
    ]
    (place.path / "log.txt").write_text("the end")
    place.close()
    assert s3.content("runs/x/log.txt") == b"the end"
    assert scratch_folders() == before
    with reading(f"{URL}/x", in_report) as folder:
        assert folder.name == "x"
        assert {path.name for path in folder.rglob("*")} == {"metrics.jsonl", "log.txt"}
        assert (folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert scratch_folders() == before


def test_a_store_that_stays_away_leaves_the_copy_and_the_last_checkpoint(s3: ObjectStore) -> None:
    place = Place.new(URL, "x")
    (place.path / "1.sha256").write_bytes(b"1")
    place.push()
    (place.path / "2.sha256").write_bytes(b"2")
    s3.fails = lambda method, path: method == "PUT"
    with pytest.raises(RunError, match=f"2.sha256: cannot write: .*; unsent files are in {place.path.parent}"):
        place.push()
    place.close()
    s3.fails = lambda method, path: False
    assert "2.sha256" not in s3.names("runs/x/")
    assert (place.path / "2.sha256").read_bytes() == b"2"
    shutil.rmtree(place.path.parent)


def test_who_has_lost_the_lease_writes_no_more(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was suspended for longer than its lease lasts."""
    place = Place.new(URL, "x")
    assert isinstance(place.lock, Lease)
    place.lock.ended.set()
    place.lock.thread.join()
    (place.path / "metrics.jsonl").write_bytes(b"first")
    place.push()
    monkeypatch.setattr(storage, "LEASE_SECONDS", 0.1)
    other = Place.existing(f"{URL}/x", 0.0)
    assert (other.path / "metrics.jsonl").read_bytes() == b"first"
    (place.path / "metrics.jsonl").write_bytes(b"another one")
    with pytest.raises(RunError, match="another process has taken this run over"):
        place.push()
    place.close()
    other.lock.hold()  # type: ignore[union-attr]
    assert s3.content("runs/x/metrics.jsonl") == b"first"
    other.close()
    shutil.rmtree(place.path.parent)


def test_a_new_run_has_a_name_of_its_own(s3: ObjectStore) -> None:
    places = [Place.new(URL, "x") for _ in range(3)]
    assert [place.where for place in places] == [f"{URL}/x", f"{URL}/x-2", f"{URL}/x-3"]
    for place in places:
        place.close()


def test_a_name_that_leads_out_of_the_folder_is_refused(s3: ObjectStore, tmp_path: Path) -> None:
    s3.client().put_object(Bucket=BUCKET, Key="runs/x/../../evil", Body=b"")
    with pytest.raises(InputError, match="is not a file of a run"):
        fetch(Store(f"{URL}/x"), tmp_path / "x", lambda name: True)
    assert not list(tmp_path.iterdir())


def test_a_store_that_writes_over_what_is_to_be_created_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, name, content, **mode: put(self, name, content))
    with pytest.raises(InputError, match=f"^{URL}/x: this store overwrites existing files on create"):
        Place.new(URL, "x")
    assert Store(URL).sizes() == {}
    with pytest.raises(InputError, match=r"^ftp://host/x: expected a path, s3:// or gs://$"):
        Store("ftp://host/x")


def test_who_is_patient_waits_for_one_that_is_still_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.01)
    ending = Lease.take(Store(f"{URL}/x"))
    seen: list[int] = []

    def pause(seconds: float) -> None:
        """Release the lease after a few renewals."""
        seen.append(ending.renewals)
        if ending.renewals > 3:
            ending.release()

    notes: list[str] = []
    lease = Lease.take(Store(f"{URL}/x", pause), patience=600.0, note=notes.append)
    assert lease.number == 2
    assert max(seen) > 3
    assert notes == [
        f"{URL}/x: watching for 45 s if process {os.getpid()} on {os.uname().nodename} still writes this run"
    ]
    lease.release()


def test_copies_of_processes_that_are_gone_are_deleted_and_what_was_not_sent_stays(tmp_path: Path) -> None:
    mine = Place.new(URL, "x")
    for name, files in (("dead", ["lock"]), ("kept", ["lock", "kept"]), ("being-made", [])):
        folder = tmp_path / f"spartan-ray-{name}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    other = Place.new(URL, "y")
    left = {path.name for path in scratch_folders()}
    assert left == {"spartan-ray-kept", "spartan-ray-being-made", mine.path.parent.name, other.path.parent.name}
    for place in (mine, other):
        place.close()


def test_of_a_long_run_only_its_last_checkpoint_is_fetched_to_see_how_far_it_is() -> None:
    store = Store(f"{URL}/x")
    names = ["config.yaml", "metrics.jsonl", "final.safetensors", "journal/000005.npz"]
    names += [
        f"checkpoints/epoch-{epoch:06d}{end}" for epoch in (9, 10) for end in (".sha256", ".json", ".safetensors")
    ]
    names += ["checkpoints/epoch-000010.optimizer.safetensors", "checkpoints/epoch-000011.safetensors"]
    for name in names:
        store.write(name, b"1")
    wanted = last_epoch(f"{URL}/x")
    assert {name for name in names if wanted(name)} == {
        *names[:3], *(name for name in names if name.startswith("checkpoints/epoch-000010"))
    }  # fmt: skip
