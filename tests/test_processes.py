"""Several processes at one folder, kills between two writes, permissions, and files that claim too much.

Real processes that begin together at a barrier. `STDG_ROUNDS=100` repeats each meeting so often."""
import errno
import multiprocessing
import os
import shutil
import stat
import threading
import time

import numpy as np
import pytest

from stdg.datasets.visual_genome import Database
from stdg.depth import precompute
from stdg.io import files, locks, packed
from stdg.io.files import atomic_path, write_json
from stdg.io.locks import locked
from stdg.rooms import build
from stdg.rooms.build import make_rooms
from stdg.testing import toy_database

rounds = int(os.environ.get('STDG_ROUNDS', 3))
fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None
needs_fork = pytest.mark.skipif(fork is None, reason='needs fork')


def together(*works, patience=120):
    """Run the functions `works` in a process each, begun at one moment; their exit codes: 0, 1 for
    an exception, whose text is printed, negative for a signal."""
    barrier = fork.Barrier(len(works))
    def body(work):
        barrier.wait()
        try: work()
        except BaseException as error:
            print(f'{type(error).__name__}: {error}', flush=True)
            os._exit(1)
        os._exit(0)
    processes = [fork.Process(target=body, args=(work,)) for work in works]
    for process in processes: process.start()
    for process in processes: process.join(patience)
    for process in processes:
        if process.is_alive(): process.kill()
    return [process.exitcode for process in processes]


def killed_at(work, owner, name, number=1):
    """Run `work` in a process that is killed at the `number`-th call of `owner.name`; asserts that
    it was."""
    def body():
        left, real = [number], getattr(owner, name)
        def deadly(*args, **how):
            left[0] -= 1
            if not left[0]: os._exit(9)
            return real(*args, **how)
        setattr(owner, name, deadly)
        work()
    assert together(body) == [9]


@needs_fork
def test_writers_of_one_file_that_have_equal_process_ids(tmp_path, monkeypatch):
    "Two containers at one volume number their processes alike."
    monkeypatch.setattr(os, 'getpid', lambda: 17)
    texts = [letter * 50_000 for letter in 'abcdefgh']
    def writer(text):
        def write():
            for _ in range(5):
                with atomic_path(tmp_path/'one.txt') as partial: partial.write_text(text)
                files.writable_folder(tmp_path)
        return write
    for _ in range(rounds):
        assert together(*map(writer, texts)) == [0] * 8
        assert (tmp_path/'one.txt').read_text() in texts
        assert [path.name for path in tmp_path.iterdir()] == ['one.txt']


def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    did, flush, rename = [], os.fsync, os.replace
    def fsync(handle):
        did.append('folder' if stat.S_ISDIR(os.fstat(handle).st_mode) else 'file')
        flush(handle)
    def replace(a, b):
        did.append('rename')
        rename(a, b)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    write_json(tmp_path/'a.json', {})
    assert did == ['file', 'rename'] + ['folder'] * (os.name != 'nt')


def test_a_folder_that_cannot_be_flushed_is_no_error_a_broken_disk_is(tmp_path, monkeypatch):
    flush, code = os.fsync, errno.EINVAL
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(code, os.strerror(code))
        flush(handle)
    monkeypatch.setattr(os, 'fsync', fsync)
    write_json(tmp_path/'a.json', {})
    code = errno.EIO
    with pytest.raises(OSError, match='a.json could not be written: Input/output error'):
        write_json(tmp_path/'a.json', {})


def test_the_reason_of_a_write_that_fails_is_the_right_one(tmp_path):
    def fail(error):
        with atomic_path(tmp_path/'out.txt'): raise error
    with pytest.raises(OSError, match='out.txt could not be written: No space.* Is the disk full'):
        fail(OSError(errno.ENOSPC, 'No space left on device'))
    with pytest.raises(PermissionError, match="'/in.txt'") as caught:  # of what the block reads
        fail(PermissionError(errno.EACCES, 'Permission denied', '/in.txt'))
    assert 'disk' not in str(caught.value)
    with pytest.raises(PermissionError, match='Choose another place, or change its') as caught:
        fail(PermissionError(errno.EACCES, 'Permission denied', str(tmp_path/'out.txt')))
    assert 'disk' not in str(caught.value) and not list(tmp_path.iterdir())
    (tmp_path/('x' * 250)).touch()
    write_json(tmp_path/('x' * 250), {})  # a name that leaves no room for a longer one


@needs_fork
def test_one_at_a_time_and_nobody_is_left_out(tmp_path):
    counter = tmp_path/'count'
    def count():
        for _ in range(10):
            with locked(tmp_path/'sub'/'.lock'):
                value = int(counter.read_text())
                time.sleep(.001)
                counter.write_text(str(value + 1))
    for _ in range(rounds):
        counter.write_text('0')
        assert together(*[count] * 4) == [0] * 4
        assert counter.read_text() == '40' and not list((tmp_path/'sub').iterdir())


@needs_fork
def test_a_killed_holder_lets_the_next_go_on_and_a_file_without_locks_warns(tmp_path, monkeypatch):
    def hold():
        with locked(tmp_path/'.lock'): os._exit(9)
    assert together(hold) == [9] and (tmp_path/'.lock').exists()
    with locked(tmp_path/'.lock', 0): pass
    def unsupported(*_): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(locks.fcntl, 'lockf', unsupported)
    with pytest.warns(UserWarning, match='cannot be locked .No locks available.: this file system'):
        with locked(tmp_path/'.lock', 0): pass


def small_rooms(folder, n=3): return make_rooms(folder, n, 0, 0, size=64, samples=1, workers=1)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope='module')
def rooms(tmp_path_factory):
    return small_rooms(tmp_path_factory.mktemp('rooms')/'alone')


@needs_fork
def test_two_runs_make_the_same_rooms(tmp_path, rooms):
    for i in range(rounds):
        folder = tmp_path/str(i)
        assert together(*[lambda: small_rooms(folder)] * 2) == [0, 0]
        assert bytes_of(folder) == bytes_of(rooms), 'the same files, and nothing else'


@needs_fork
def test_rooms_go_on_where_a_killed_run_was(tmp_path, rooms):
    for name in ('write_images', 'write_annotations', 'remove_folder'):
        folder = tmp_path/name
        killed_at(lambda: small_rooms(folder), build, name)
        small_rooms(folder)
        shutil.rmtree(folder/'shards', ignore_errors=True)  # all that a kill at the very end leaves
        assert {n: b for n, b in bytes_of(folder).items() if n[0] != '.'} == bytes_of(rooms)


@needs_fork
def test_who_waits_goes_on_when_the_first_is_killed(tmp_path, rooms):
    began, folder = fork.Event(), tmp_path/'rooms'
    def first():
        build.room = lambda *_: (began.set(), time.sleep(60))
        small_rooms(folder)
    process = fork.Process(target=first)
    process.start()
    assert began.wait(60)
    threading.Timer(.5, process.kill).start()
    small_rooms(folder)
    process.join()
    assert process.exitcode < 0 and bytes_of(folder) == bytes_of(rooms)


@needs_fork
def test_two_runs_with_other_settings_one_is_refused(tmp_path):
    for i in range(rounds):
        codes = together(lambda: small_rooms(tmp_path/str(i), 1), lambda: small_rooms(tmp_path/str(i), 2))
        assert sorted(codes) == [0, 1]


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    return toy_database(tmp_path_factory.mktemp('toy')/'db', 6)


def copy_of(database, folder):
    shutil.copytree(database.folder, folder)
    return Database(folder)


def hha(database, **how):
    "HHA in parts of two pictures."
    real = precompute.Parts
    precompute.Parts = lambda path, name, keys, size, **settings: real(path, name, keys, 2, **settings)
    try: return precompute.prepare_hha(database, progress=False, **how)
    finally: precompute.Parts = real


def leftovers(folder): return sorted(path.name for path in folder.iterdir() if 'hha' in path.name)


@needs_fork
def test_two_runs_prepare_the_same_hha(tmp_path, database):
    alone = hha(copy_of(database, tmp_path/'alone')).read_bytes()
    for i in range(rounds):
        copy = copy_of(database, tmp_path/str(i))
        assert together(*[lambda: hha(copy)] * 3) == [0] * 3
        assert leftovers(copy.folder) == ['hha_64_metric.h5']
        assert (copy.folder/'hha_64_metric.h5').read_bytes() == alone


@needs_fork
def test_shards_twice_each_and_several_that_join(tmp_path, database):
    alone = hha(copy_of(database, tmp_path/'alone')).read_bytes()
    for i in range(rounds):
        copy = copy_of(database, tmp_path/str(i))
        shards = [(k, 2) for k in (0, 1, 0, 1)]
        assert together(*[lambda s=s: hha(copy, shard=s) for s in shards]) == [0] * 4
        assert together(*[lambda: precompute.merge_hha(copy)] * 3) == [0] * 3
        assert leftovers(copy.folder) == ['hha_64_metric.h5']
        assert (copy.folder/'hha_64_metric.h5').read_bytes() == alone


@needs_fork
def test_shards_beside_one_that_does_all(tmp_path, database):
    alone = hha(copy_of(database, tmp_path/'alone')).read_bytes()
    for i in range(rounds):
        copy = copy_of(database, tmp_path/str(i))
        works = [lambda s=s: hha(copy, shard=s) for s in ((0, 1), (0, 2), (1, 2))]
        assert together(*works) == [0] * 3
        assert (copy.folder/'hha_64_metric.h5').read_bytes() == alone


@needs_fork
@pytest.mark.parametrize('place', ['join', 'remove_folder', 'write_packed'])
def test_hha_goes_on_after_a_kill(tmp_path, database, place):
    alone = hha(copy_of(database, tmp_path/'alone')).read_bytes()
    copy = copy_of(database, tmp_path/'killed')
    owner = packed.Parts if place == 'join' else packed
    killed_at(lambda: hha(copy), owner, place, 2 if place == 'write_packed' else 1)
    assert hha(copy).read_bytes() == alone
    if place != 'remove_folder': return
    (copy.folder/'hha_64_metric.h5').unlink()  # to make it from something else
    with pytest.raises(ValueError, match='holds parts of something else'):
        precompute.prepare_hha(copy, 'metric', False, noise=.5)


def test_parts_that_nobody_describes_are_not_taken(tmp_path):
    "A folder half removed by an earlier version: its record gone, parts of other settings there."
    path, pieces = tmp_path/'a.h5', [np.zeros(1, np.uint8)]
    packed.Parts(path, 'x', [7], scale=1).write(0, pieces)
    (tmp_path/'a-parts'/'parts.json').unlink()
    assert packed.Parts(path, 'x', [7], scale=2).todo() == [0]


@needs_fork
def test_a_run_that_fails_does_not_pull_the_folder_from_under_a_shard(tmp_path):
    "The single worker removes the folder of its first failure; what a shard writes then counts."
    path, began = tmp_path/'a.h5', fork.Event()
    def fails():
        with packed.Parts(path, 'x', [7, 8], 1).share():
            began.wait(20)
            raise RuntimeError
    def shard():
        parts = packed.Parts(path, 'x', [7, 8], 1)
        with parts.share((0, 2)) as todo:
            began.set()
            time.sleep(.3)
            for k in todo: parts.write(k, [np.zeros(3, np.uint8)])
    assert together(fails, shard) == [1, 0]
    assert packed.started_parts(path, 'x', [7, 8]).todo() == [1]
