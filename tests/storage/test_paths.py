"""Object storage as a run's folder: the little that differs, on a real S3 server in a process of its own."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from upath import UPath

from bdpo.errors import UserError
from bdpo.models.loading import load_model, model_folder, weights_digest
from bdpo.storage import cache, lease, paths
from bdpo.storage.cache import drop_local_copy, local_copy, machine_lock
from bdpo.storage.lease import lock
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import (
    atomic_folder,
    discard,
    storage_path,
    update,
    upload,
    write_bytes,
    write_text,
)
from bdpo.storage.run_dir import RunDir, run_config
from tests.support import ROOT
from tests.support.helpers import save_model, tiny_config
from tests.support.s3_server import SECRET, new_filesystems


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, bucket):
    """A folder that is not there yet, of each kind."""
    name = tmp_path / "folder" if request.param == "local" else f"{bucket}/{tmp_path.name}"
    return storage_path(name, "run_dir")


def fail_after(stream_or_file):
    """Write something, then fail."""
    write = stream_or_file.write_text if isinstance(stream_or_file, Path) else stream_or_file.write
    write("new")
    raise OSError("disk full")


class TestPaths:
    def test_local_folders_stay_plain_paths(self, tmp_path):
        for name in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a"):
            assert storage_path(name, "run_dir") == tmp_path / "a"
        assert storage_path("a", "run_dir") == Path.cwd() / "a"

    def test_a_url_stays_a_url(self, bucket):
        run = RunDir(f"{bucket}/runs/first/")
        assert str(run.root) == f"{bucket}/runs/first"
        assert str(run.eval("base")) == f"{bucket}/runs/first/eval/base"
        assert RunDir(run.root).root == run.root

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("s4://a/b", "s4"),
            ("s3://key:" + SECRET + "@bucket/x", "credentials"),
            ("git://a", "git"),
            ("", ": is empty"),
            (" ", ": is empty"),
            *((f"s3://bucket/first{character}/run", "patterns") for character in "[]*?"),
        ],
    )
    def test_a_url_that_cannot_be(self, url, said):
        with pytest.raises(UserError, match=f"run_dir.*{said}") as error:
            RunDir(url)
        assert SECRET not in str(error.value)


class TestFolders:
    def test_a_folder_is_replaced_whole(self, folder):
        for names in (["a.txt", "sub/b.txt", "config.json"], ["a.txt", "c.txt"]):
            with atomic_folder(folder) as new:
                for name in names:
                    (new / name).parent.mkdir(exist_ok=True)
                    (new / name).write_text(name)
            found = {str(file).removeprefix(f"{folder}/") for file in folder.rglob("*") if file.is_file()}
            assert found == set(names)
            assert (folder / names[0]).read_text() == names[0]

    def test_one_that_fails_changes_nothing(self, folder):
        write_text(folder / "config.json", "old")
        with pytest.raises(OSError, match="disk full"), atomic_folder(folder) as new:
            fail_after(new / "config.json")
        assert (folder / "config.json").read_text() == "old"
        assert [file.name for file in folder.parent.glob("*") if "unfinished" in file.name] == []

    def test_the_marker_comes_last_and_goes_first(self, tmp_path, bucket, monkeypatch):
        """Whatever moment the upload, or the removal, is cut off at: a folder with marker is whole."""
        names = ["aaa", "config.json", "weights", "z"]
        for name in names:
            (tmp_path / name).write_text(name)
        to, seen = storage_path(f"{bucket}/{tmp_path.name}", "x"), []

        def watched(method):
            def call(*args, **kwargs):
                seen.append({Path(name).name for name in to.fs.find(to.path)})
                return method(*args, **kwargs)

            return call

        for name in ("put", "rm"):
            monkeypatch.setattr(to.fs, name, watched(getattr(to.fs, name)))
        upload(tmp_path, to)
        discard(to)
        rest = set(names) - {"config.json"}
        assert seen == [set(), rest, set(names), rest]
        assert list(to.glob("*")) == []

    def test_discard_takes_files_folders_and_nothing(self, folder):
        write_text(folder / "sub" / "manifest.json", "")
        write_text(folder / "file", "")
        discard(folder / "sub", folder / "file", folder / "not there")
        assert list(folder.glob("*")) == []

    def test_what_another_process_writes_is_seen_at_once(self, folder):
        write_text(folder / "a", "")
        assert paths.sorted_glob(folder, "*") == [folder / "a"]
        code = f"from bdpo.storage.paths import *; write_text(storage_path({str(folder)!r}, 'x') / 'b', 'b')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        assert paths.sorted_glob(folder, "*") == [folder / "a", folder / "b"]
        assert (folder / "b").is_file()

    def test_a_file_that_is_replaced_while_it_is_read_is_one_or_the_other(self, folder):
        """An object that is asked for its size first and for its content then may be another by then."""
        file, contents = folder / "file", ["a" * 10, "b" * 20]
        paths.write_text(file, contents[0])
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [paths.write_text(file, contents[n % 2]) for n in range(100)])
            while not writing.done():
                assert paths.read_text(file) in contents
            writing.result()

    def test_a_private_file_is_replaced_and_kept_when_its_writer_fails(self, folder):
        write_text(folder / "q.jsonl", "stale" * 100)
        with pytest.raises(OSError, match="disk full"), paths.private_file(folder / "q.jsonl") as stream:
            fail_after(stream)
        assert (folder / "q.jsonl").read_text() == "new"


class TestFiles:
    def test_two_hosts_may_write_the_same_file_at_once(self, tmp_path, monkeypatch):
        """Even if their processes have the same pid."""
        file = tmp_path / "file"

        def meanwhile(descriptor):
            monkeypatch.undo()
            write_bytes(file, b"theirs")

        monkeypatch.setattr(os, "fsync", meanwhile)
        write_bytes(file, b"ours")
        assert file.read_bytes() == b"ours"
        assert list(tmp_path.iterdir()) == [file]

    def test_content_and_name_are_on_the_disk(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
        write_bytes(tmp_path / "file", b"whole")
        assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


class TestFetch:
    def test_a_model_is_downloaded_once_and_again_when_it_changed(
        self, tmp_path, bucket, tiny_chat, monkeypatch
    ):
        monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
        local = save_model(tmp_path / "model", tiny_chat)
        config = tiny_config(tmp_path, f"{bucket}/{tmp_path.name}", local)
        remote = storage_path(config.model.name_or_path, "x")
        upload(local, remote)
        first = model_folder(config.model)
        assert weights_digest(first) == weights_digest(local)
        written = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
        assert model_folder(config.model) == first
        assert written == {file: file.stat().st_mtime_ns for file in first.rglob("*")}
        upload(save_model(tmp_path / "other", tiny_chat, seed=1), remote)
        assert weights_digest(model_folder(config.model)) == weights_digest(tmp_path / "other")
        load_model(model_folder(config.model), config.model)
        assert not first.exists()  # the disk of a node holds one copy of a model, not each that ever was

    def test_a_file_is_downloaded_alone_and_again_when_it_changed(self, tmp_path, bucket, monkeypatch):
        monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
        remote = storage_path(f"{bucket}/{tmp_path.name}/rows.jsonl", "x")
        write_text(remote.with_name("rows.jsonl.other"), "not asked for")
        for text in ("first", "second"):
            write_text(remote, text)
            copy = local_copy(remote)
            assert copy.name == "rows.jsonl"
            assert copy.read_text() == text
            assert list(copy.parent.iterdir()) == [copy]
        assert local_copy(remote) == copy

    def test_what_is_forgotten_leaves_others_alone(self, tmp_path, bucket, monkeypatch):
        monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
        one, other = (storage_path(f"{bucket}/{tmp_path.name}/{name}", "x") for name in ("one", "other"))
        write_text(one, "x")
        write_text(other, "x")
        gone, kept = local_copy(one), local_copy(other)
        drop_local_copy(one)
        drop_local_copy(kept)  # which is of this machine
        assert not gone.exists()
        assert kept.exists()

    def test_a_local_folder_is_its_own_copy(self, tmp_path):
        assert local_copy(tmp_path) == tmp_path

    def test_a_download_that_was_cut_off_does_not_count(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BDPO_CACHE", str(tmp_path))
        remote = UPath("memory://models/one")
        write_bytes(remote / "weights", b"whole")
        monkeypatch.setattr(type(remote.fs), "get", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            local_copy(remote)
        monkeypatch.undo()
        monkeypatch.setenv("BDPO_CACHE", str(tmp_path))
        assert (local_copy(remote) / "weights").read_bytes() == b"whole"

    def test_no_such_model_is_said(self, bucket, tmp_path):
        config = tiny_config(tmp_path, f"{bucket}/nothing", tmp_path)
        with pytest.raises(UserError, match=r"model\.name_or_path=.*nothing.*no such folder"):
            model_folder(config.model)


def test_a_lock_of_the_machine_that_nobody_releases_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    file = tmp_path / "lock"
    held_too_long = pytest.raises(UserError, match=rf"{file}: another process has held this lock")
    with machine_lock(file), held_too_long, machine_lock(file):
        raise AssertionError
    with machine_lock(file):
        pass


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=rf"^BDPO_CACHE: {tmp_path}/file/cache cannot be written \(Not a dir"),
        machine_lock(tmp_path / "file" / "cache" / "lock"),
    ):
        raise AssertionError


def test_a_user_without_a_home_has_to_name_the_cache(tmp_path, monkeypatch):
    """As in a container whose user is not in its /etc/passwd."""
    monkeypatch.delenv("BDPO_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UserError, match=r"^BDPO_CACHE: is not set, and the user has no home folder"):
        cache.cache_folder()
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path


class TestLock:
    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch):
        monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
        monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)

    def test_one_command_at_a_time(self, folder, tmp_path):
        config = tiny_config(folder, tmp_path, tmp_path)
        with RunDir(folder).open(config), pytest.raises(UserError, match="another command") as refused:
            RunDir(folder).open(config)
        assert f"(pid {os.getpid()} on {socket.gethostname()})" in str(refused.value)
        with RunDir(folder).open(config):
            pass
        assert run_config(RunDir(folder)) == config

    def test_a_command_that_cannot_write_gives_the_lock_back(self, folder, tmp_path, monkeypatch):
        config = tiny_config(folder, tmp_path, tmp_path)
        monkeypatch.setattr(RunDir, "record", lambda *_: fail_after(io.StringIO()))
        with pytest.raises(UserError, match="disk full"):
            RunDir(folder).open(config)
        monkeypatch.undo()
        with RunDir(folder).open(config):
            pass

    def test_the_lock_of_a_killed_command_is_taken(self, folder):
        code = f"""if True:
            import time
            from bdpo.storage import lease, paths
            lease.RENEWAL_SECONDS = 0.2
            folder = paths.storage_path({str(folder)!r}, "x")
            paths.write_text(folder / "a", "")
            with lease.lock(folder):
                print("held", flush=True)
                time.sleep(600)"""
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(lease.Timeout):
                lock(folder)
        finally:
            process.kill()
            process.wait()
        with lock(folder):
            pass

    def test_a_holder_shows_life_until_it_stands_still(self, folder, monkeypatch):
        """By a clock that stands still while a renewal is on its way, however long that takes."""
        clock, renewals = [0.0], []

        def sleep(seconds):
            clock[0] += seconds
            for renew in renewals:
                renew()

        monkeypatch.setattr(
            lease, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0], sleep=sleep)
        )
        assert lease.read_holder(folder) is None
        assert not lease.shows_life(folder)
        with lock(folder) as held:
            assert (lease.read_holder(folder).host, lease.read_holder(folder).pid) == (
                socket.gethostname(),
                os.getpid(),
            )
            held.released.set()  # it renews no more but when the clock moves
            held.renewal.join()
            renewals.append(held._show_life)
            assert lease.shows_life(folder)
            renewals.clear()
            assert not lease.shows_life(folder)
            assert lease.read_holder(folder) is not None
        assert lease.read_holder(folder) is None

    def test_a_lock_whose_sign_of_life_was_deleted_is_released(self, tmp_path):
        with lock(tmp_path) as held:
            held.released.set()
            held.renewal.join()  # it does not write another one
            held.file.unlink()
        with lock(tmp_path):
            pass

    def test_who_lost_its_lock_stops(self, bucket, tmp_path, monkeypatch):
        stopped = []
        monkeypatch.setattr(lease, "LOST", threading.Event())
        monkeypatch.setattr(lease, "interrupt_main", lambda: stopped.append(lease.LOST.is_set()))
        held = lock(storage_path(f"{bucket}/{tmp_path.name}", "x"))
        write_text(held.file, json.dumps({"token": "another's"}))
        held.renewal.join(60)
        assert stopped == [True]
        held.release()
        assert json.loads(held.file.read_bytes()) == {"token": "another's"}


def test_metrics_are_whole_at_every_checkpoint_and_resume_after_it(bucket, tmp_path):
    log = MetricsLog(storage_path(f"{bucket}/{tmp_path.name}/metrics.jsonl", "x"))
    log.keep(0)
    for step in (1, 2, 3):
        log.append({"step": step})
    log.flush()
    log.append({"step": 4})
    resumed = MetricsLog(log.file)
    assert [row["step"] for row in resumed.read()] == [1, 2, 3]
    resumed.keep(2)
    resumed.append({"step": 3, "again": 1})
    resumed.flush()
    assert [row["step"] for row in resumed.read()] == [1, 2, 3]
    assert resumed.read()[2]["again"] == 1


class TestErrors:
    """One line that names run_dir, never a key."""

    def said(self, run_dir, tmp_path):
        with pytest.raises(UserError, match=r"^run_dir=") as error:
            RunDir(run_dir).open(tiny_config(run_dir, tmp_path, tmp_path))
        assert "\n" not in str(error.value)
        assert SECRET not in str(error.value)
        return str(error.value)

    def test_no_such_bucket(self, bucket, tmp_path):
        assert "bucket does not exist" in self.said("s3://no-such-bucket/run", tmp_path)

    def test_the_endpoint_is_down(self, bucket, tmp_path, monkeypatch):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("BDPO_STORAGE_SECONDS", "1")
        with new_filesystems():
            assert "connect" in self.said(f"{bucket}/run", tmp_path)

    def test_a_prefix_of_something_else(self, bucket, tmp_path):
        folder = storage_path(f"{bucket}/{tmp_path.name}", "x")
        write_text(folder / "thesis.txt", "mine")
        assert "not a run folder" in self.said(folder, tmp_path)


PAIRS = 40


def test_a_file_is_updated_only_if_its_content_differs(tmp_path):
    file = tmp_path / "a" / "checksums.json"
    update(file, b"one")
    assert file.read_bytes() == b"one"
    written = file.stat().st_ino
    update(file, b"one")
    assert file.stat().st_ino == written  # a new file would replace it
    update(file, b"two")
    assert file.read_bytes() == b"two"


def test_the_folder_that_is_made_for_a_private_file_is_private(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "private" / "quarantine.jsonl", "", mode=0o600)
        write_text(tmp_path / "public" / "manifest.json", "")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*")}
    assert modes == {"private": 0o700, "quarantine.jsonl": 0o600, "public": 0o755, "manifest.json": 0o644}


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    """What a killed command, or one that failed, had begun is in no later folder."""
    folder, leftover = tmp_path / "model", tmp_path / ".model.unfinished"
    leftover.mkdir()
    (leftover / "old.bin").touch()

    def fail():
        with atomic_folder(folder) as unfinished:
            (unfinished / "half.bin").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    for name in ("first.bin", "second.bin"):
        with atomic_folder(folder) as unfinished:
            (unfinished / name).touch()
            assert not (folder / name).exists()
        assert [file.name for file in folder.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [folder]
