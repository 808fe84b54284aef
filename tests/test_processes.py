"""Several processes at one folder, kills between two writes, permissions, and files that claim too much.

Real processes that begin together at a barrier. `STDG_ROUNDS=100` repeats each meeting so often."""
import copy
import errno
import json
import multiprocessing
import os
import shutil
import stat
import threading
import time
import zipfile

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from stdg import checkpoint, model, prepare
from stdg.data import SceneGraphs
from stdg.datasets import vg_files, vg_raw
from stdg.datasets.visual_genome import Database
from stdg.depth import precompute
from stdg.depth.depth_file import DepthFile
from stdg.depth.hha_file import HHAFile, read_png
from stdg.depth.maps import read_pfm, write_pfm
from stdg.depth.sensors import read_depth
from stdg.evaluation import core
from stdg.graph import Vocabulary
from stdg.inference.hub import Model
from stdg.inference.predictor import read_image
from stdg.io import files, locks, packed
from stdg.io.archives import open_sources
from stdg.io.files import atomic_path, read_json, write_json
from stdg.io.locks import locked
from stdg.model import STDG
from stdg.released import read_released
from stdg.rooms import build
from stdg.rooms.build import make_rooms
from stdg.testing import loud, toy_database
from stdg.train import read_settings
from stdg.training import resume

try:
    import resource
except ImportError:
    resource = None  # Windows

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


def test_a_part_whose_folder_goes_while_it_is_written(tmp_path):
    """Another process has joined all parts meanwhile: what HDF5 says of a file that it has opened and cannot find
    is no error then; where nobody has, it is."""
    parts, other = (packed.Parts(tmp_path/'depth.h5', 'depth', [7, 8], size=1) for _ in range(2))
    lost = OSError("Unable to synchronously create file (can't retrieve stat info for file)")
    def fail(path): raise lost
    with pytest.raises(OSError, match='retrieve stat info'): parts.put(0, fail)
    def fail_late(path):
        for k in (0, 1): other.write(k, [np.full(3, k, np.uint8)])
        other.merge()
        raise lost
    parts.put(0, fail_late)
    assert parts.joined and packed.Packed(tmp_path/'depth.h5', 'depth')[1].tolist() == [1, 1, 1]


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


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "Five pictures with depth, and their annotations."
    folder = tmp_path_factory.mktemp('raw')
    images, objects = [], []
    for i in range(1, 6):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{i}.png')
        write_pfm(folder/'maps'/f'{i}-other.pfm', np.linspace(1, 50, 48 * 64).reshape(48, 64) + i)
        boxes = [dict(object_id=10 * i + k, x=1 + 20 * k, y=5, w=18, h=30, names=[n])
                 for k, n in enumerate(('man', 'shirt'))]
        images.append(dict(image_id=i, width=64, height=48))
        objects.append(dict(image_id=i, objects=boxes))
    related = [dict(image_id=one['image_id'], relationships=[
        dict(predicate='wearing', subject=one['objects'][0], object=one['objects'][1])])
        for one in objects]
    for name, rows in zip(('image_data', 'objects', 'relationships'), (images, objects, related)):
        write_json(folder/f'{name}.json', rows)
    for i in range(1, 6): (folder/f'{i}.png').rename(folder/f'{i}.jpg')
    (folder/'object_list.txt').write_text('man\nshirt\n')
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    "Parts of one picture each, so that each shard has some."
    begin = packed.Parts.__init__
    def one(self, path, name, keys, size=32, *rest, **settings):
        begin(self, path, name, keys, 1, *rest, **settings)
    monkeypatch.setattr(packed.Parts, '__init__', one)


def prepared(folder, raw, *steps, shard=(0, 1)):
    return prepare.prepare(folder, raw, steps or prepare.STEPS[:-1], sizes=(64,), depth='maps', shard=shard,
                           workers=1, progress=False)


def ends(folder): return sorted(path.name for path in folder.iterdir() if path.is_file())


@needs_fork
def test_two_shards_of_prepare_all(tmp_path, raw, small_parts):
    "Begun together in an empty folder, and again for what needs the pictures; then `merge`."
    prepared(tmp_path/'alone', raw)
    for i in range(rounds):
        folder = tmp_path/str(i)
        def shard(k): return lambda: prepared(folder, raw, shard=(k, 2))
        for steps in ((), (), ('merge',), (), ('merge',)):
            works = [lambda: prepared(folder, raw, *steps)] * 2 if steps else [shard(0), shard(1)]
            assert together(*works) == [0, 0]
        last = () if i else prepare.STEPS  # with statistics, which take their time
        assert together(*[lambda: prepared(folder, raw, *last)] * 2) == [0, 0]
        for name in ends(tmp_path/'alone'):
            if name == 'check.json': continue
            assert (folder/name).read_bytes() == (tmp_path/'alone'/name).read_bytes(), name
        assert set(ends(folder)) - {'statistics.json'} == set(ends(tmp_path/'alone'))
        assert i or (folder/'statistics.json').exists()


@needs_fork
@pytest.mark.parametrize('owner, name', [(vg_files, '_write_dicts'), (vg_raw, '_summary')])
def test_a_database_cut_off_between_its_files_is_made_again(tmp_path, raw, owner, name):
    prepared(tmp_path, raw, 'check', 'database', 'images')
    whole = bytes_of(tmp_path)
    objects = read_json(raw/'objects.json')
    for one in objects: one['objects'][1]['names'] = ['trousers']
    other = shutil.copytree(raw, tmp_path/'other')
    write_json(other/'objects.json', objects)
    (other/'object_list.txt').write_text('man\ntrousers\n')
    killed_at(lambda: prepare.prepare(tmp_path, other, ('database',), sizes=(64,), depth='maps',
                                      remake=True, progress=False), owner, name)
    if name == '_write_dicts':
        with pytest.raises(ValueError, match='was written with other names than VG-SGG-dicts.json'):
            Database(tmp_path)
    with pytest.raises(ValueError, match='made from something else'):
        prepared(tmp_path, raw, 'database')  # never the old summary for the new numbers
    prepared(tmp_path, other, 'database')
    assert 'trousers' in Database(tmp_path).vocabulary.objects
    prepare.prepare(tmp_path, raw, ('database',), sizes=(64,), depth='maps', remake=True, progress=False)
    assert {name: bytes for name, bytes in bytes_of(tmp_path).items() if name[0] != '.'} == whole


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return loud(STDG('small', n_objects=2, n_predicates=2, pretrained=False)).eval()


@needs_fork
def test_stores_that_begin_together_hold_each_record_once(tmp_path, database, network):
    data = SceneGraphs(database, 'train')
    def store(folder, **how):
        return core.store(folder, network, data, ('predcls',), part=1, batch_size=1, progress=False, **how)
    def records(folder):
        return [{name: values.tolist() for name, values in record.items() if name != 'seconds'}
                for _, record in core.stored(folder/'records.h5')]
    wanted = records(store(tmp_path/'alone').parent)
    assert len({str(record) for record in wanted}) == len(data)
    for i in range(rounds):
        folder = tmp_path/str(i)
        shares = [(0, 2), (1, 2), (0, 1)]
        assert together(*[lambda s=s: store(folder, shard=s) for s in shares]) == [0] * 3
        assert records(store(folder).parent) == wanted
        assert ends(folder) == ['records.h5', 'records.json']


def test_another_process_that_takes_a_part_away_shifts_no_record(tmp_path, database, network, monkeypatch):
    "Between listing the parts and making them, another process writes one of them."
    data, listed = SceneGraphs(database, 'train'), packed.Parts.todo
    def todo(self, shard=(0, 1)):
        found = listed(self, shard)
        if len(found) == len(self) and not self.part(0).exists():
            other = core._records(network, data, ('predcls',), None, ('strict', 'reference'), [0],
                                  dict(batch_size=1, progress=False))
            self.write(0, [core._as_bytes(next(other))])
        return found
    monkeypatch.setattr(packed.Parts, 'todo', todo)
    how = dict(part=1, batch_size=1, progress=False)
    path = core.store(tmp_path/'a', network, data, ('predcls',), **how)
    monkeypatch.undo()
    alone = core.store(tmp_path/'b', network, data, ('predcls',), **how)
    for (_, a), (_, b) in zip(core.stored(path), core.stored(alone), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a if name != 'seconds')


@needs_fork
def test_a_checkpoint_killed_between_its_files_is_whole(tmp_path, network):
    path, old = tmp_path/'net.safetensors', Vocabulary(['cup', 'table'], ['near', 'on'])
    new, other = Vocabulary(['mug', 'shelf'], ['under', 'at']), copy.deepcopy(network)
    with torch.no_grad():
        for weights in other.parameters(): weights.add_(1)
    network.save(path, vocabulary=old.to_json())
    checkpoint.add_facts(path, thresholds=dict(objects=.5, triplets=.5))
    killed_at(lambda: other.save(path, vocabulary=new.to_json()), model, 'save_tensors')
    found, facts = checkpoint.load_with_facts(path, old)  # killed before anything: the old pair
    assert facts['thresholds']['objects'] == .5
    killed_at(lambda: other.save(path, vocabulary=new.to_json()), model, 'write_json')
    with pytest.warns(UserWarning, match='belongs to other tensors'):
        found, facts = checkpoint.load_with_facts(path, new)
    assert 'thresholds' not in facts and torch.equal(*[next(m.parameters()) for m in (found, other)])
    with pytest.warns(UserWarning, match='belongs to other tensors'):
        assert Model.load(path).vocabulary == new
    path.with_suffix('.json').unlink()
    assert checkpoint.vocabulary(path) == new, 'a lost JSON costs nothing'
    shared = tmp_path/'shared'
    Model.load(path).save_pretrained(shared)
    assert Model.from_pretrained(shared).vocabulary == new
    one, two = (tmp_path/f'{n}.safetensors' for n in 'ab')
    for file in (one, two): other.save(file, vocabulary=new.to_json())
    assert one.read_bytes() == two.read_bytes(), 'equal networks are equal files'


@needs_fork
def test_states_and_kept_batches_killed_between_their_files(tmp_path):
    def save(value): resume.save_state(tmp_path, 'student', 5, dict(w=torch.full((2,), value)), dict(value=value))
    save(1.)
    killed_at(lambda: save(2.), resume, 'write_json')
    with pytest.warns(UserWarning, match='belongs to other tensors'):
        tensors, facts = resume.load_state(tmp_path/'student-00000005.json')
    assert facts['value'] == tensors['w'][0] == 2
    save(3.)
    assert resume.load_state(tmp_path/'student-00000005.json')[1]['value'] == 3


@needs_fork
def test_all_files_have_the_mode_that_the_umask_says(tmp_path, network):
    def write():
        os.umask(0o027)
        network.save(tmp_path/'net.safetensors')
        resume.save_state(tmp_path, 'student', 5, dict(w=torch.zeros(2)), {})
        packed.write_packed(tmp_path/'a.h5', 'x', [b'1'])
        write_pfm(tmp_path/'maps'/'a.pfm', np.ones((2, 2)))
        made = small_rooms(tmp_path/'rooms', 1)
        hha(Database(made))
    assert together(write) == [0]
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob('*')}
    wrong = {str(path): oct(mode) for path, mode in modes.items()
             if mode != (0o750 if (tmp_path/path).is_dir() else 0o640)}
    assert len(modes) >= 12 and not wrong
    weights = tmp_path/'net.safetensors'
    weights.chmod(0o664)
    network.save(weights)
    assert stat.S_IMODE(weights.stat().st_mode) == 0o664, 'as the file it replaces'


@needs_fork
@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid(), reason='only the superuser may become another')
def test_permission_denied_is_named_by_all_readers(tmp_path, network):
    "Read by another user: none of them is told to fetch the file again."
    closed = {folder: folder.stat().st_mode for folder in (tmp_path, *tmp_path.parents)
              if not folder.stat().st_mode & 0o001}
    for folder, mode in closed.items(): folder.chmod(mode | 0o055)
    network.save(tmp_path/'a.safetensors')
    packed.write_packed(tmp_path/'a.h5', 'x', [b'1'])
    write_json(tmp_path/'a.json.txt', {})
    write_pfm(tmp_path/'a.pfm', np.ones((2, 2)))
    for end in ('png', 'jpg'): Image.new('RGB', (8, 8)).save(tmp_path/f'a.{end}')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as archive: archive.writestr('a', 'a')
    for name in ('a.yaml', 'a.pth'): (tmp_path/name).write_text('name: x')
    for path in tmp_path.iterdir(): path.chmod(0)
    (tmp_path/'closed').mkdir(mode=0)
    readers = {'a.safetensors': [checkpoint.load, checkpoint.facts, checkpoint.read_tensors],
               'a.json.txt': [read_json], 'a.h5': [lambda path: files.open_h5(path, {}),
                                                   lambda path: packed.Packed(path, 'x')],
               'a.pfm': [read_pfm, read_depth], 'a.png': [read_depth, lambda path: read_png(path, path, '')],
               'a.jpg': [read_image], 'a.zip': [lambda path: open_sources([path])],
               'a.yaml': [read_settings], 'a.pth': [read_released], 'closed': [lambda path: open_sources([path])],
               'closed/a.json': [read_json], 'closed/a.h5': [lambda path: files.open_h5(path, {})],
               'closed/a.safetensors': [checkpoint.load, checkpoint.facts]}
    def read():
        os.setgid(65534)
        os.setuid(65534)
        for name, functions in readers.items():
            for function in functions:
                try: function(tmp_path/name)
                except (OSError, ValueError) as error: said = str(error)
                else: said = 'no error'
                good = name in said and 'ermission denied' in said
                assert good and 'again' not in said and '\n' not in said, f'{name}: {said}'
        try: write_json(tmp_path/'closed'/'b.json', {})
        except OSError as error: assert 'nothing can be written in' in str(error) and 'disk' not in str(error)
    try: assert together(read) == [0]
    finally:
        for folder, mode in closed.items(): folder.chmod(mode)


def limited(work, megabytes=300):
    "Run `work` in a process that may take so much more memory; its exit code."
    def body():
        used = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
        work()
    return together(body)[0]


needs_limit = pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')


def sparse(path, name, shape, dtype, **how):
    "Replace dataset `name` by one that claims much and holds nothing."
    with h5py.File(path, 'r+') as file:
        if name in file: del file[name]
        file.create_dataset(name, shape, dtype, chunks=tuple(min(n, 2**10) for n in shape), **how)


@needs_fork
@needs_limit
def test_files_that_claim_much_take_little(tmp_path, database):
    said = r"(claims [\d,]+ bytes, the file holds|holds complex|rows, |rows for|is needed|whole numbers)"
    cases = [('VG-SGG.h5', 'labels', (2**31, 1), 'i8'), ('VG-SGG.h5', 'boxes_64', (2**30, 4), 'f8'),
             ('VG-SGG.h5', 'split', (2**31,), 'i8'), ('VG-SGG.h5', 'relationships', (2**20, 2**12), 'i8'),
             ('VG-SGG.h5', 'predicates', (1, 1), 'c16'), ('VG-SGG.h5', 'labels', (12, 1), 'f8'),
             ('imdb_64.h5', 'image_ids', (2**31,), 'i8'), ('imdb_64.h5', 'images', (6, 3, 2**15, 2**15), 'u1'),
             ('imdb_64.h5', 'images', (6, 3, 64, 64), 'f8'), ('imdb_64.h5', 'depth', (6, 2**15, 2**15), 'f2'),
             ('imdb_64.h5', 'camera', (2**28, 3, 3), 'f8')]
    def work():
        for i, (name, dataset, shape, dtype) in enumerate(cases):
            folder = shutil.copytree(database.folder, tmp_path/f'db{i}')
            sparse(folder/name, dataset, shape, dtype)
            assert (folder/name).stat().st_size < 2**20
            with pytest.raises(ValueError, match=f'{name}.*{said}') as caught: Database(folder)
            assert '\n' not in str(caught.value)
        for name, kind in (('png', 'u1'), ('png_end', 'i8'), ('image_ids', 'i8')):
            path = hha(copy_of(database, tmp_path/f'hha-{name}'))
            sparse(path, name, (2**33,), kind)
            with pytest.raises(ValueError, match='claims'): HHAFile(path, database.image_ids)
        packed.write_packed(tmp_path/'depth_x.h5', 'depth', [np.ones(4, 'f2')], 'f2', image_ids=[7],
                            shape=np.array([[2**32, 2**32]]), metric=[1], camera=np.eye(3)[None])
        with pytest.raises(ValueError, match='the map of image 7 does not have'): DepthFile(tmp_path/'depth_x.h5')
        for name, shape in (('camera', (2**28, 3, 3)), ('shape', (2**30, 2)), ('metric', (2**33,))):
            sparse(tmp_path/'depth_x.h5', name, shape, 'i8')
            with pytest.raises(ValueError, match='claims'): DepthFile(tmp_path/'depth_x.h5')
        write_json(tmp_path/'records.json', {})
        packed.write_packed(tmp_path/'records.h5', 'record', [b'x'])
        sparse(tmp_path/'records.h5', 'record', (2**35,), 'u1')
        with pytest.raises(ValueError, match='claims'): list(core.stored(tmp_path/'records.h5'))
        parts = packed.Parts(tmp_path/'p.h5', 'x', [7])
        parts.write(0, [b'x'], more=[1])
        sparse(parts.part(0), 'more', (2**33,), 'i8')
        with pytest.raises(ValueError, match="part-000000.h5: dataset 'more' claims"): parts.merge()
    assert limited(work) == 0


@needs_fork
@needs_limit
def test_checkpoints_that_ask_for_much_or_for_nonsense(tmp_path, network):
    network.save(tmp_path/'a.safetensors')
    record = read_json(tmp_path/'a.json')
    header = json.dumps(dict(x=dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42]))).encode()
    (tmp_path/'claims.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header)
    (tmp_path/'header.safetensors').write_bytes((2**62).to_bytes(8, 'little') + b'{}')
    changes = [('config', name, value) for name, value in dict(
        channels=200_000, n_objects=99_999, n_predicates=-1, layers=[1], transformer='no', prior=7,
        backbone=['small'], mode='x', mode2=1, stride=2.5, fpn=10**30, timm_name='vit_giant_patch14_224',
        head_norm={}, frozen=float('inf'), pretrained='http://x').items()]
    changes += [(None, 'config', None), (None, 'size', 10**9), (None, 'vocabulary', [1]), (None, 'version', '1'),
                (None, 'thresholds', dict(objects='x')), (None, 'training', 'long')]
    def work():
        for where, name, value in changes:
            changed = copy.deepcopy(record)
            (changed[where] if where else changed)[name] = value
            (tmp_path/'a.json').write_text(json.dumps(changed))
            with pytest.raises(ValueError, match='a.(json|safetensors)') as caught:
                checkpoint.load(tmp_path/'a.safetensors')
            assert '\n' not in str(caught.value) and len(str(caught.value)) < 600
        for name in ('claims', 'header'):
            with pytest.raises(ValueError, match=f'{name}.safetensors is not a whole safetensors file'):
                checkpoint.load(tmp_path/f'{name}.safetensors')
    assert limited(work, 500) == 0
    write_json(tmp_path/'a.json', record)
    assert checkpoint.load(tmp_path/'a.safetensors').config == network.config
