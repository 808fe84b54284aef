"""Data sets of the Hub: repositories written by the library `datasets` and read by it again, through
the command line, killed twice on the way, shared by processes, and everything that can be wrong with
them; the same form as files."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from forked import forked
from hub_server import COMMIT, served
from PIL import Image
from test_processes import needs_fork, together

from stdg import prepare
from stdg.datasets import hub_data
from stdg.datasets.coco_relations import FILE
from stdg.datasets.hub_data import HubParts, fetch_parts, place_of
from stdg.datasets.visual_genome import Database
from stdg.io.files import write_json
from stdg.runbooks import check_parameters
from stdg.testing import TOY_VOCABULARY, toy_scene

os.environ['HF_HUB_OFFLINE'] = '1'
datasets = pytest.importorskip('datasets')

TRAIN, VAL, TEST = range(8), range(8, 10), range(10, 13)  # scenes of each split
SPLITS = dict(train=TRAIN, val=VAL, test=TEST)
names = dict(categories=TOY_VOCABULARY.objects, rel_categories=TOY_VOCABULARY.predicates)


def row(i, base=0, per_picture=False, **changed):
    "Scene `i` as a row; ids of objects count over the split or in the picture, of names from `base`."
    graph, record = toy_scene(i, (48, 64))
    Image.fromarray(record['image']).save(file := io.BytesIO(), 'PNG')
    first, things = 1 if per_picture else 2 * i + 1, []
    for k, (label, (x1, y1, x2, y2)) in enumerate(zip(graph.labels.tolist(), graph.boxes.tolist())):
        things.append(dict(id=first + k, category_id=base + label, bbox=[x1, y1, x2 - x1, y2 - y1],
                           area=1., iscrowd=0))
    relations = [dict(id=i, subject_id=first + s, object_id=first + o, predicate_id=base + p)
                 for s, o, p in graph.relations.tolist()]
    return dict(image=dict(bytes=file.getvalue(), path=None), image_id=i, width=64, height=48,
                file_name=f'{i}.png', objects=things, relations=relations) | changed


def schema(structs=False):
    "The columns, with lists of structs or, as older files have them, structs of lists."
    value, many = datasets.Value, datasets.List
    def records(**fields):
        return {name: many(kind) for name, kind in fields.items()} if structs else many(fields)
    whole = value('int64')
    things = dict(id=whole, category_id=whole, bbox=many(value('float64')), area=value('float32'), iscrowd=whole)
    ends = dict.fromkeys(('id', 'subject_id', 'object_id', 'predicate_id'), whole)
    return datasets.Features(image=datasets.Image(), image_id=whole, width=whole, height=whole,
                             file_name=value('string'), objects=records(**things), relations=records(**ends))


def transposed(rows):
    "Lists of structs as structs of lists."
    def turn(records): return {name: [one[name] for one in records] for name in records[0]}
    return [one | dict(objects=turn(one['objects']), relations=turn(one['relations'])) for one in rows]


def repository(folder, rows, base=0, features=None, files=2, categories=True):
    "A repository: `rows` by split, those of train in several files, one row group for each two rows."
    (folder/'data').mkdir(parents=True)
    datasets.disable_progress_bars()
    for split, some in rows.items():
        whole, n = datasets.Dataset.from_list(some, features or schema()), files if split == 'train' else 1
        for k in range(n):
            path = folder/'data'/f'{split}-{k:05d}-of-{n:05d}.parquet'
            whole.shard(n, k).to_parquet(str(path), batch_size=2)
    lists = {kind: [dict(id=base + i, name=name) for i, name in enumerate(some)] for kind, some in names.items()}
    if categories: write_json(folder/'categories.json', lists)
    return folder


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return repository(tmp_path_factory.mktemp('hub')/'set', {s: [row(i) for i in some] for s, some in SPLITS.items()})


def command(*arguments, **environment):
    return forked(['-m', 'stdg.prepare', *map(str, arguments)], os.getcwd(), os.environ | environment)


def check_graphs(folder, scenes=range(13)):
    "The database in `folder` is that of the toy scenes."
    database = Database(folder, 64)
    assert database.image_ids.tolist() == list(scenes) and database.vocabulary == TOY_VOCABULARY
    for place, i in enumerate(scenes):
        graph, record = toy_scene(i, (48, 64))
        found = database.graph(place)
        assert abs(found.boxes - graph.boxes).max() <= 1 and found.labels.tolist() == [0, 1]
        assert found.relations.tolist() == graph.relations.tolist()
        assert abs(database.image(place).astype(int) - record['image']).mean() < 6
    return database


def test_the_whole_way(home, tmp_path, monkeypatch):
    "From a repository to a database with statistics by one command; then nothing is asked of it again."
    options = ('--raw', f'hub:{home}', '--folder', tmp_path, '--size', 64, '--depth', 'none')
    done = command('all', *options)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert re.match(rf'fetch: hub:{home} at [0-9a-f]{{12}}: train 8, val 2, test 3 pictures \(', said[0])
    assert said[1].startswith('check: 13 of 13 pictures are sound')
    assert said[2].startswith('database: 13 images, 26 objects, 13 relations')
    assert 'nothing was wrong' in done.stdout
    database = check_graphs(tmp_path)
    for split, some in SPLITS.items(): assert len(database.indices(split)) == len(some)
    assert json.loads((tmp_path/'statistics.json').read_text())['splits']['test']['images'] == 3
    for i in (0, 9):  # the files are those that were put in
        archive = zipfile.ZipFile(tmp_path/'hub'/('train-00000.zip' if i == 0 else 'val-00000.zip'))
        assert row(i)['image']['bytes'] in [archive.read(name) for name in archive.namelist()]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
    monkeypatch.setattr(hub_data, 'needed', lambda name: pytest.fail('it asked for the library'))
    again = prepare.prepare(tmp_path, f'hub:{home}', ('check', 'images'), sizes=(64,), progress=False)
    assert [*again] == ['fetch', 'check', 'images'] and again['fetch']['result'] in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}


@pytest.mark.parametrize('base, per_picture, structs', [(1, False, False), (0, True, True), (1, True, False)])
def test_ids_from_0_or_1_and_of_the_split_or_the_picture(tmp_path, base, per_picture, structs):
    rows = {s: [row(i, base, per_picture) for i in some] for s, some in SPLITS.items()}
    if structs: rows = {split: transposed(some) for split, some in rows.items()}
    home = repository(tmp_path/'set', rows, base, schema(structs), files=1)
    done = prepare.prepare(tmp_path/'db', f'hub:{home}', ('check', 'database', 'images'), sizes=(64,), progress=False)
    check_graphs(tmp_path/'db')
    told = done['database']['result'].split('\n', 1)[1]
    # in six parts a second picture has the two ids of the first
    assert told.startswith('12 x object ids that two pictures share') if per_picture else told == 'nothing was wrong'


def fetched(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != '.'}


def killed_at(work, owner, name, number):
    "Run `work` in a process that is killed by SIGKILL at the `number`-th call of `owner.name`."
    def body():
        left, real = [number], getattr(owner, name)
        def deadly(*args, **how):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **how)
        setattr(owner, name, deadly)
        work()
    assert together(body) == [-signal.SIGKILL]


@needs_fork
def test_killed_twice_and_gone_on(home, tmp_path):
    "In the middle of an archive, and between an archive and its records: what was there is kept."
    place, how = place_of(f'hub:{home}'), dict(workers=2, progress=False)
    def fetch(name): fetch_parts(HubParts(place, tmp_path/name), **how)
    assert together(lambda: fetch('whole')) == [0]
    parts = HubParts(place, tmp_path/'killed')
    assert len(HubParts(place, tmp_path/'whole').parts()) == 7
    killed_at(lambda: fetch('killed'), zipfile.ZipFile, 'writestr', 4)  # of two a part
    assert len(parts.todo()) == 6
    first = {path: path.stat().st_mtime_ns for path in parts.folder.glob('train-00000.*')}
    assert len(first) == 3
    killed_at(lambda: fetch('killed'), hub_data, 'write_json', 5)  # after the archive of the fourth part
    assert len(parts.todo()) == 4 and len(list(parts.folder.glob('[!.]*.zip'))) == 4
    with pytest.raises(FileNotFoundError, match='4 of 7 parts of hub:.* are not there yet'): parts.files()
    assert together(lambda: fetch('killed')) == [0] and parts.complete
    assert fetched(parts.folder) == fetched(tmp_path/'whole')
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())


@needs_fork
def test_two_shards_at_once(home, tmp_path, capfd):
    "Begun together in an empty folder; then the same share twice. The parts are those of one process."
    place, how = place_of(f'hub:{home}'), dict(workers=2, progress=False)
    def shard(name, *share):
        return lambda: fetch_parts(HubParts(place, tmp_path/name), share, **how)
    assert together(shard('two', 0, 2), shard('two', 1, 2)) == [0, 0]
    assert together(shard('one', 0, 1), shard('one', 0, 1)) == [0, 0]
    assert HubParts(place, tmp_path/'two').complete and fetched(tmp_path/'two') == fetched(tmp_path/'one')
    done = [command('fetch', 'check', '--raw', f'hub:{home}', '--folder', tmp_path/'db', '--shard', f'{i}/2')
            for i in range(2)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert 'this share is done; when all are, give this command again' in done[0].stdout
    assert 'check' not in done[0].stdout
    assert 'train 8, val 2, test 3 pictures' in done[1].stdout and 'check: 13 of 13' in done[1].stdout


def test_bad_rows_are_left_out_and_counted(tmp_path):
    rows = [row(i) for i in range(9)]
    rows[1]['image']['bytes'] = rows[1]['image']['bytes'][:200]  # cut off
    rows[2]['image'] = dict(bytes=b'<svg/>', path='/etc/passwd')
    rows[3]['objects'][1]['id'] = rows[4]['objects'][1]['id'] = 90  # an id that two pictures share
    for i in (3, 4): rows[i]['relations'][0]['object_id'] = 90
    rows[5]['relations'][0]['object_id'] = rows[6]['objects'][0]['id']  # another picture's
    rows[6]['objects'][0]['category_id'] = 7  # none of the list
    rows[7]['relations'][0]['predicate_id'] = -1
    rows[7]['objects'][0]['bbox'][2] = float('nan')
    rows[8]['image_id'] = 7
    rows += [row(i) for i in (10, 11)]
    rows[-2].update(objects=None, relations=None, width=None, height=None)
    rows[-1].update(width=65)  # it says so; the picture has 64
    home = repository(tmp_path/'set', dict(train=rows, test=[row(12)]), files=1)
    done = prepare.prepare(tmp_path/'db', f'hub:{home}', ('check', 'database'), sizes=(64,), progress=False)
    assert 'train 9, test 1 pictures; left out: 2 x pictures that cannot be read: image 1: ' in done['fetch']['result']
    assert '1 wrong size: image 11: train' in done['check']['result']
    told = done['database']['result'].splitlines()
    assert told[0] == '8 images, 12 objects, 4 relations'
    for said in ('1 x images: an id twice', '1 x splits that are missing: val',
                 '1 x annotations: an id that is not among the categories',
                 '1 x annotations: the box is not 4 numbers', '2 x pictures that cannot be read: image 1'):
        assert any(line.startswith(said) for line in told), (said, told)


def refused(done, status, *said):
    "A program that ended with `status` and one line that says it, whatever bars were before."
    last = done.stderr.splitlines()[-1]
    assert done.returncode == status and 'Traceback' not in done.stderr, done.stderr
    for text in said: assert text in last, last


def test_what_is_said_of_other_repositories(home, tmp_path, monkeypatch):
    "One line each: what is wrong, where, and what to do. Nothing is begun in the folder."
    def fetch(raw, *more): return command('all', '--raw', raw, '--folder', tmp_path/'db', '--depth', 'none', *more)
    def changed(change):
        shutil.rmtree(tmp_path/'other', ignore_errors=True)
        change(shutil.copytree(home, tmp_path/'other')/'data')
        return f"hub:{tmp_path/'other'}"
    def cut(data): (data/'train-00001-of-00002.parquet').write_bytes(b'PAR1')
    def other_rows(data):
        for path in data.iterdir(): path.unlink()
        table = datasets.Dataset.from_dict(dict(image=[b''], label=[3]))
        table.to_parquet(str(data/'train-00000-of-00001.parquet'))
    def no_bbox(data):
        rows = [one | dict(objects=[dict(id=1, category_id=0)]) for one in (row(0), row(1))]
        table = datasets.Dataset.from_list(rows).cast_column('image', datasets.Image())
        table.to_parquet(str(data/'train-00000-of-00002.parquet'))
    def csv(data):
        for path in data.iterdir(): path.unlink()
        (data/'train.csv').write_text('image,image_id\n1,2\n')
    for change, said in (
            (lambda data: (data.parent/'categories.json').unlink(), 'it has no names of classes and predicates: '),
            (lambda data: [path.unlink() for path in data.glob('train*')], 'it has no split train (it has '),
            (other_rows, "split train: it has no column 'image_id' (it has image, label): it is a data set of another"),
            (no_bbox, "split train: its column 'objects' has no 'bbox' (it has "),
            (csv, 'its files are no Parquet files, and others are not read'),
            (cut, 'it is no data set that can be read (')):
        refused(fetch(changed(change)), 1, f"fetch: hub:{tmp_path/'other'}", said)
    def script(data): (data.parent/'other.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w').close()")
    done = command('fetch', '--raw', changed(script), '--folder', tmp_path/'code')
    assert 'Traceback' not in done.stderr and not (tmp_path/'ran').exists(), 'the code of a repository was run'
    refused(fetch('hub:nowhere'), 2, 'hub:nowhere: after hub: there is neither a folder that is there nor the name')
    refused(fetch(f'hub:{home}', '--kind', 'psg'), 2, 'a data set of the Hub brings its annotations', 'Leave kind')
    refused(command('fetch', '--raw', home, '--folder', tmp_path/'db'), 1, 'only data sets of the Hub are fetched')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    said = "needs datasets, which is not installed; it comes with pip install 'stdg[hub]'"
    refused(fetch(f'hub:{home}'), 1, said)
    assert [path.name for path in (tmp_path/'db').rglob('*')] in ([], ['hub'])


def test_names_in_the_description_and_a_file_that_is_damaged_inside(home, tmp_path):
    other = shutil.copytree(home, tmp_path/'other')
    lists = (other/'categories.json').read_text()
    (other/'categories.json').unlink()
    write_json(other/'dataset_infos.json', dict(default=dict(description=lists)))
    path = other/'data'/'train-00001-of-00002.parquet'
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3:])
    parts = HubParts(place_of(f'hub:{other}'), tmp_path/'hub')
    with pytest.raises(ValueError, match=r'split train: part 2 cannot be read \(.*The same command goes on') as error:
        fetch_parts(parts, progress=False)
    assert '\n' not in str(error.value) and parts.plan['names'] == json.loads(lists)
    assert parts.parts()[:2] == [part for part in parts.parts() if part not in parts.todo()]
    path.write_bytes(whole)  # another file, by its date
    with pytest.raises(ValueError, match='holds parts of something else: commit.* or remove'):
        fetch_parts(HubParts(parts.place, parts.folder), progress=False)


@needs_fork
def test_a_full_disk_in_the_middle(tmp_path, capfd):
    "A process whose files may have 4,096 bytes: the third part does not fit, the two before it are kept."
    resource, noise = pytest.importorskip('resource'), np.random.default_rng(0)
    rows = [row(i) for i in range(6)]
    Image.fromarray(noise.integers(0, 255, (48, 64, 3), np.uint8)).save(file := io.BytesIO(), 'PNG')
    rows[4]['image']['bytes'] = file.getvalue()
    home = repository(tmp_path/'set', dict(train=rows), files=1)
    parts = HubParts(place_of(f'hub:{home}'), tmp_path/'hub')
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        fetch_parts(parts, progress=False)
    assert together(full) == [1]
    said = capfd.readouterr().out
    assert 'train-00002.zip could not be written: File too large. Is the disk full? What was there before' in said
    assert parts.todo() == [('train', 2)] and not list(parts.folder.glob('.*partial*'))
    fetch_parts(parts, progress=False)
    assert parts.complete and parts.counts()[0] == dict(train=6)


def test_a_hub_that_is_asked(home, tmp_path):
    """Names of a Hub of our own on this machine: one that is there, one that asks for consent, one for a token,
    one that is not there, an unknown revision, and the one for a token with it."""
    environment = {name: value for name, value in os.environ.items() if name not in ('HF_HUB_OFFLINE', 'HF_TOKEN')}
    with served(home) as (address, asked):
        environment |= dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path/'home'), NO_PROXY='*')
        done = subprocess.run([sys.executable, '-c', ASK, tmp_path], env=environment, text=True,
                              capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    said = done.stdout.splitlines()
    for line, wanted in zip(said, (
            "me/toy: {'train': 8, 'val': 2, 'test': 3} " + COMMIT,
            'me/gated: PermissionError hub:me/gated: its owners ask for consent (',
            'me/none: FileNotFoundError hub:me/none: no folder has this name here, and the Hub shows no such data set',
            'me/private: FileNotFoundError hub:me/private: no folder has this name here',
            'me/toy@v9: FileNotFoundError hub:me/toy@v9: there is no such revision',
            "me/private: {'train': 8, 'val': 2, 'test': 3}")):
        assert line.startswith(wanted), line
    assert len(said) == 6 and any('train-00001' in line for line in asked)
    place, parts = place_of('hub:me/toy'), tmp_path/'me'/'toy'
    assert fetched(parts).keys() == fetched(tmp_path/'me'/'private').keys()
    assert HubParts(place, parts).complete, 'and nothing is asked for any more'


ASK = """
import os, sys
from stdg.datasets.hub_data import HubParts, fetch_parts, place_of
def ask(name):
    place = place_of('hub:' + name)
    parts = HubParts(place, f'{sys.argv[1]}/{name}')
    try: fetch_parts(parts, progress=False)
    except (OSError, ValueError) as error: return print(f'{name}: {type(error).__name__} {error}')
    print(f"{name}: {parts.counts()[0]} {parts.plan['commit']}")
for name in ('me/toy', 'me/gated', 'me/none', 'me/private', 'me/toy@v9'): ask(name)
os.environ['HF_TOKEN'] = 'secret'
ask('me/private')
"""


def test_no_network(tmp_path, monkeypatch):
    "The Hub cannot be reached, or is not to be: one line, and the way round it."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    refused(command('all', '--raw', 'hub:maelic/IndoorVG-coco-format', '--folder', tmp_path), 1,
            'fetch: hub:maelic/IndoorVG-coco-format: the Hub cannot be read (OfflineModeIsEnabled: ',
            'Is there a network, and HF_HUB_OFFLINE not set? Else download the repository elsewhere')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    api = type('Api', (hub_data.import_module('huggingface_hub').HfApi,), dict(
        __init__=lambda self: super(type(self), self).__init__(endpoint=f'http://127.0.0.1:{port}')))
    monkeypatch.setattr('huggingface_hub.HfApi', api)
    with pytest.raises(ConnectionError, match=r'hub:a/b: the Hub cannot be read \(Connect') as error:
        fetch_parts(HubParts(place_of('hub:a/b'), tmp_path), progress=False)
    assert '\n' not in str(error.value)


def test_the_same_as_files(tmp_path):
    "A folder for each split, pictures beside its file, their names the same in two of them."
    for split, some in SPLITS.items():
        write_split(tmp_path/'raw'/('valid' if split == 'val' else split), some)
    options = ('--raw', tmp_path/'raw', '--folder', tmp_path/'db', '--kind', 'coco_relations', '--size', 64)
    done = command('check', 'database', 'images', *options)
    assert done.returncode == 0 and '13 of 13 pictures are sound' in done.stdout, done.stderr
    assert '13 images, 26 objects, 13 relations\nnothing was wrong' in done.stdout
    check_graphs(tmp_path/'db')
    shutil.rmtree(tmp_path/'raw'/'train')
    refused(command('check', *options), 2, 'test, val without train: nothing would be there to learn from')
    refused(command('check', *options, '--annotations', 'train=test/none.json'), 2, 'none.json is missing')
    done = command('check', 'database', *options[:2], '--folder', tmp_path/'alone', *options[4:],
                   '--annotations', f'test/{FILE}')
    assert 'splits drawn by a seed' in done.stdout and '3 images, 6 objects, 3 relations' in done.stdout, done.stderr


def write_split(folder, scenes):
    rows = [row(i, 1) for i in scenes]
    record = {kind: [dict(id=1 + i, name=name) for i, name in enumerate(some)] for kind, some in names.items()}
    record |= dict(images=[], annotations=[], rel_annotations=[])
    for k, one in enumerate(rows):
        record['images'].append(dict(id=one['image_id'], file_name=f'picture{k}.png', width=64, height=48))
        for name, column in (('annotations', 'objects'), ('rel_annotations', 'relations')):
            record[name] += [dict(thing, image_id=one['image_id']) for thing in one[column]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder/f'picture{k}.png').write_bytes(one['image']['bytes'])
    write_json(folder/FILE, record)


def test_a_runbook_takes_it(home):
    values = dict(raw=f'hub:{home}', steps=['fetch', 'check'])
    check_parameters('prepare', values)
    assert values['raw'] == f'hub:{home}'
