"""A network of the Hub in the place of a checkpoint, over real HTTP with a Hub on this machine: names, revisions,
tokens, downloads that are cut off, and the cache alone; and what a card says before others get a network."""
import json
import os
import shutil
import socket
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import COMMIT, Hub
from huggingface_hub import ModelCard, constants
from PIL import Image

import stdg
from stdg import cli
from stdg.explore import explore
from stdg.graph import Vocabulary
from stdg.inference import export_command, hub_files
from stdg.inference.hub import Model
from stdg.inference.model_card import run_figures
from stdg.inference.predictor import load_predictor, network_file, network_files
from stdg.io.files import write_json
from stdg.model import STDG
from stdg.runbooks import check_parameters
from stdg.testing import loud, toy_scene

FILES = ['config.json', 'model.json', 'model.safetensors']


class Models(Hub):
    "The same Hub with models: `me/toy`, `me/private`, `me/gated`. Of the first `cut` tensor files half is sent."
    cut, broken = 0, False

    def answer(self):
        self.path = (self.path.replace('/api/models/', '/api/datasets/') if self.path.startswith('/api/')
                     else f'/datasets{self.path}')
        super().answer()

    def file(self, path):
        mine, kind = path.name == 'model.safetensors' and self.command == 'GET', type(self)
        if mine and self.headers.get('Range'): self.asked.append(f"Range {self.headers['Range']}")
        if mine and kind.broken: return self.say(503)
        if not mine or not kind.cut: return super().file(path)
        kind.cut, data = kind.cut - 1, path.read_bytes()
        kind.broken = not kind.cut
        self.say(200, data[:len(data) // 2], len(data), ETag='"half"', X_Repo_Commit=COMMIT, Accept_Ranges='bytes')


@contextmanager
def served(folder):
    "Within it such a Hub has the repository `folder`; yields its class, address, and what it is asked."
    handler = type('Handler', (Models,), dict(folder=Path(folder), asked=[]))
    for method in ('do_GET', 'do_HEAD', 'do_POST'): setattr(handler, method, Models.answer)
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f'http://127.0.0.1:{server.server_port}'
    try: yield handler
    finally:
        server.shutdown()
        server.server_close()


def at(monkeypatch, address, cache, offline=False):
    "From now on the Hub is at `address`, and the cache is in `cache`."
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.delenv('HF_TOKEN', raising=False)
    for name, value in dict(ENDPOINT=address, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE=offline,
                            HF_TOKEN_PATH=str(cache/'no_token'),
                            HUGGINGFACE_CO_URL_TEMPLATE=address + '/{repo_id}/resolve/{revision}/{filename}').items():
        monkeypatch.setattr(constants, name, value)


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    "The folder of a shared network, with what strangers put beside it."
    folder = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    network = loud(STDG('small', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16))
    facts = dict(vocabulary=Vocabulary(['disc', 'box'], ['on', 'by']).to_json(), size=64, license='mit',
                 thresholds=dict(objects=.2, triplets=.01))
    Model(network, facts).save_pretrained(folder)
    (folder/'pytorch_model.bin').write_bytes(b'\x80\x04.')
    (folder/'modeling.py').write_text('raise SystemExit')
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    with served(repository) as handler:
        at(monkeypatch, handler.address, tmp_path/'cache')
        monkeypatch.chdir(tmp_path)
        Image.fromarray(toy_scene(0)[1]['image']).save('photo.png')
        yield handler


def command(capsys, *arguments, code=2):
    "What a command says; of one that is refused the one line."
    capsys.readouterr()
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    if not code: return said.out
    assert said.err.count('\n') == 1 and said.err.startswith('stdg ') and 'Traceback' not in said.err, said.err
    return said.err


def test_a_name_in_the_place_of_a_checkpoint(hub, repository, tmp_path, capsys):
    command(capsys, 'predict', 'photo.png', '-c', 'me/toy', '-o', 'graph.json', code=0)
    command(capsys, 'predict', 'photo.png', '-c', str(repository), '-o', 'own.json', code=0)
    assert json.loads(Path('graph.json').read_text()) == json.loads(Path('own.json').read_text())
    assert len(json.loads(Path('graph.json').read_text())['relations'])
    got = [line for line in hub.asked if '/resolve/' in line]
    assert {line.split('/')[-1] for line in got} == set(FILES), 'neither the pickle nor the program'
    assert COMMIT in got[0], 'the three files are of one commit'
    folder = tmp_path/'cache'/'models--me--toy'/'snapshots'/COMMIT
    assert sorted(path.name for path in folder.iterdir()) == FILES

    before = len(hub.asked)
    ready = load_predictor('me/toy')
    assert ready.path == folder/'model.safetensors' and load_predictor('me/toy').model is ready.model
    found, own = (stdg.predict('photo.png', network) for network in ('me/toy', repository))
    assert torch.equal(found.boxes, own.boxes) and torch.equal(found.predicates, own.predicates)
    assert len(hub.asked) == before, 'a name is asked for once in a process'
    stdg.predict('photo.png', f'me/toy@{COMMIT}')
    assert len(hub.asked) == before, 'a commit that is in the cache is not asked for'
    assert network_files('me/toy') == [] and network_files(ready) == [ready.path, folder/'model.json']
    assert Model.from_pretrained('me/toy').facts == Model.from_pretrained(repository).facts
    command(capsys, 'predict', 'photo.png', '-c', 'hub:me/toy', '--revision', 'main', code=0)


def test_the_explorer_and_the_runbook_take_a_name(hub, repository):
    "`checkpoints` of the explorer and `checkpoint` of predict.ipynb; a shared folder, too."
    explorer = explore(['hub:me/toy', repository], pictures='photo.png')
    names = list(explorer.records.checkpoints)
    assert names == ['me/toy', repository.name] and [n for n, _ in explorer.controls.network.options] == names
    assert explorer.view.graph['triplets'] and explorer.controls.network.value == 'me/toy'
    explorer.close()
    with pytest.raises(FileNotFoundError, match='me/private is no folder here.* it shows no such network'):
        explore('hub:me/private', pictures='photo.png')
    asked = dict(checkpoint='hub:me/toy', _ih=['', "# Parameters\ncheckpoint = 'hub:me/toy'\n"])
    check_parameters('predict', asked)
    assert asked['checkpoint'] == 'hub:me/toy' and network_file('hub:me/toy').name == 'model.safetensors'
    assert (load_predictor(asked['checkpoint']).path.read_bytes()
            == load_predictor(repository).path.read_bytes())


def test_what_the_hub_refuses(hub, capsys, monkeypatch, tmp_path):
    ask = lambda *more: command(capsys, 'predict', 'photo.png', '-c', *more)
    assert 'it shows no such network' in ask('me/none') and 'HF_TOKEN' in ask('me/private')
    assert 'ask for consent' in ask('me/gated')
    assert 'no revision v9 of me/toy' in ask('me/toy', '--revision', 'v9') and 'v9' in ask('me/toy@v9')
    assert 'can be no branch' in ask('me/toy', '--revision', '../../x')
    assert 'two revisions' in ask('me/toy@main', '--revision', 'main')
    assert 'nothing of me/toy is in the cache' in ask('me/toy', '--local-files-only')
    assert not (tmp_path/'cache'/'models--me--none').exists()
    monkeypatch.setenv('HF_TOKEN', 'secret')
    command(capsys, 'predict', 'photo.png', '-c', 'me/private', code=0)
    for program in ('video', 'export'):
        arguments = [program] + ['photo.png', '--jsonl', 'a.jsonl'] * (program == 'video') + ['-c', 'me/none']
        if program == 'video': assert 'it shows no such network' in command(capsys, *arguments)
        else:
            with pytest.raises(SystemExit): cli.main(arguments)
            assert 'it shows no such network' in capsys.readouterr().err


def test_a_repository_of_another_kind(hub, repository, tmp_path, capsys, monkeypatch):
    other = tmp_path/'other'
    ask = lambda: command(capsys, 'predict', 'photo.png', '-c', 'me/toy')
    for gone, said in ((['model.json'], 'me/toy has no model.json'),
                       (FILES, 'pytorch_model.bin, a pickle, which can run code')):
        shutil.copytree(repository, other)
        for name in gone: (other/name).unlink()
        monkeypatch.setattr(hub, 'folder', other)
        assert said in ask() and 'nothing was downloaded' in ask()
        shutil.rmtree(other)
    assert not [line for line in hub.asked if '/resolve/' in line]


def test_a_download_that_is_cut_off(hub, repository, tmp_path, capsys, monkeypatch):
    "The line breaks in the middle, then the Hub is down; what is there is said, and the same command fetches the rest."
    monkeypatch.setattr('huggingface_hub.file_download.time.sleep', lambda seconds: None)
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 2 ** 16)
    monkeypatch.setattr(hub, 'cut', 1)
    ask = ('predict', 'photo.png', '-c', 'me/toy')
    said = command(capsys, *ask)
    assert 'could be read from the Hub: it cannot be read' in said and 'fetches what is not there yet' in said
    half = (repository/'model.safetensors').stat().st_size // 2
    begun = [int(line.split('=')[1].split('-')[0]) for line in hub.asked if line.startswith('Range')]
    assert begun and half - 2 ** 16 <= begun[0] <= half, 'it was taken up in the middle'
    said = command(capsys, *ask, '--local-files-only')
    assert 'model.safetensors of it is not in the cache' in said and 'config.json' not in said
    assert 'hf download me/toy' in said and str(tmp_path/'cache') in said
    assert not list((tmp_path/'cache').rglob('*.incomplete*')), 'no half of a file is left'
    monkeypatch.setattr(hub, 'broken', False)
    hub.asked.clear()
    command(capsys, *ask, code=0)
    got = [line for line in hub.asked if line.startswith('GET') and '/resolve/' in line]
    assert [line.rpartition('/')[2] for line in got] == ['model.safetensors'], 'what is there is not fetched again'
    kept = tmp_path/'cache'/'models--me--toy'/'snapshots'/COMMIT/'model.safetensors'
    assert kept.read_bytes() == (repository/'model.safetensors').read_bytes()


def test_without_a_network(hub, tmp_path, capsys, monkeypatch):
    ask = ('predict', 'photo.png', '-c', 'me/toy')
    command(capsys, *ask, code=0)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        nobody = f'http://127.0.0.1:{free.getsockname()[1]}'
    at(monkeypatch, nobody, tmp_path/'cache')
    said = command(capsys, *ask)
    assert 'cannot be read (Connect' in said and 'earlier copy: HF_HUB_OFFLINE=1 takes it' in said
    command(capsys, *ask, '--revision', COMMIT, code=0)
    command(capsys, *ask, '--local-files-only', code=0)
    at(monkeypatch, nobody + '/', tmp_path/'cache', offline=True)
    command(capsys, *ask, code=0)
    said = command(capsys, *ask, '--revision', 'v2')
    assert 'HF_HUB_OFFLINE is set' in said and 'revision v2 is not in the cache' in said and 'has main' in said
    assert '--revision v2' in said, 'what to do'
    at(monkeypatch, nobody, tmp_path/'empty', offline=True)
    assert 'nothing of me/toy is in the cache' in command(capsys, *ask)
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE is set, and nothing of me/toy'):
        Model.from_pretrained('me/toy')


def test_a_path_of_the_same_name_wins(hub, repository, capsys):
    said = command(capsys, 'predict', 'photo.png', '-c', 'me/toyy')
    assert 'it shows no such network' in said and hub.asked
    asked = len(hub.asked)
    shutil.copytree(repository, 'me/toy')
    command(capsys, 'predict', 'photo.png', '-c', 'me/toy', code=0)
    said = command(capsys, 'predict', 'photo.png', '-c', 'me/toyy')
    assert 'me/toyy is missing. Is the path right? A network of the Hub is hub:owner/name' in said
    assert '--revision is for a network of the Hub' in command(capsys, 'predict', 'photo.png', '-c', 'me/toy',
                                                              '--revision', 'main')
    assert Model.from_pretrained('me/toy').size == 64
    assert len(hub.asked) == asked, 'no stranger is asked for a slip'
    command(capsys, 'predict', 'photo.png', '-c', 'hub:me/toy', code=0)
    assert len(hub.asked) > asked


def test_an_exported_file_lies_here_and_not_in_the_cache(hub, capsys, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(export_command, 'export_fields', lambda model, target, size: written.append((target, size)))
    cli.main(['export', '-c', f'me/toy@{COMMIT}'])
    assert written == [(Path('toy.onnx'), 64)]
    cli.main(['export', '-c', 'me/toy', '--revision', 'main', '-o', 'other.onnx'])
    assert written[1:] == [(Path('other.onnx'), 64)]


# The card

def record(**more):
    "A results.json."
    row = {'sgdet': {'R@50': .4333, 'intervals': {'R@50': [.4071, .4586]}}, 'AP50': .5, 'images': 400}
    return dict(settings=dict(data='toys', split='test', images=[20, 2, 4]), date='2026-01-01',
                rows={'untrained': {}, 'frequency prior': {}, 'student (RGB, taught)': row}) | more


def test_hostile_data_and_figures_are_text(repository, tmp_path):
    from test_sharing import HOSTILE, page
    model = Model.from_pretrained(repository)
    bare = record(rows={'student <b>': record()['rows']['student (RGB, taught)']})
    calm = run_figures(bare, dict(training=dict(stage='student')))
    for worst in HOSTILE:
        figures = dict(calm, row=worst, data=worst, split=worst, date=worst)
        data = dict(name=worst, version=worst, source=worst, pictures={worst: 7}, license='mit')
        cards = [Model(model.network, model.facts | dict(figures=f, data=d)).generate_model_card() for f, d in (
            (figures, data), (dict(calm, split='x', data='x', date='x'),
                              dict(name='x', version='x', source='x', pictures=dict(x=7), license='mit')))]
        mine, theirs = (page(card.text) for card in cards)
        assert mine.tags == theirs.tags and mine.links == theirs.links == [], worst
        assert cards[0].data.to_dict() == cards[1].data.to_dict()
    for wrong in (dict(data=['x']), dict(data=dict(license='mine all')), dict(figures=dict(values=dict(AP50='<b>')))):
        with pytest.raises(ValueError): Model(model.network, model.facts | wrong).save_pretrained(tmp_path/'wrong')


def test_figures_of_the_run_go_into_the_card(repository, tmp_path):
    model = Model.from_pretrained(repository)
    facts = dict(model.facts, training=dict(stage='student'), reading=dict(relations='votes'))
    model = Model(model.network, facts)
    model.save(tmp_path/'student.safetensors')
    write_json(tmp_path/'results.json', record(readings=dict(student=dict(relations='votes'))))
    trained = Model.load(tmp_path/'student.safetensors')
    trained.save_pretrained(tmp_path/'shared', data_license='cc0-1.0')
    card = ModelCard.load(tmp_path/'shared'/'README.md')
    assert '| R@50 | 43.3 [40.7, 45.9] |' in card.text and '400 pictures of the split test of toys' in card.text
    assert '**toys**, 20 pictures for training, 2 pictures for validation, 4 pictures for tests' in card.text
    assert 'objects of at least **0.200** and triplets above **0.010**' in card.text
    again = Model.from_pretrained(tmp_path/'shared')
    again.save_pretrained(tmp_path/'again')
    assert (tmp_path/'again'/'README.md').read_bytes() == (tmp_path/'shared'/'README.md').read_bytes()

    write_json(tmp_path/'results.json', record(readings=dict(student=dict(relations='lines'))))
    with pytest.raises(ValueError, match='results.json was made with another reading of this network'):
        trained.save_pretrained(tmp_path/'stale')
    assert not (tmp_path/'stale').exists(), 'nothing is written'
    trained.save_pretrained(tmp_path/'stale', results=False)
    assert 'None are on record' in (tmp_path/'stale'/'README.md').read_text()
    rows = {'my network': record()['rows']['student (RGB, taught)'], 'other': {}}
    write_json(tmp_path/'mine.json', dict(record(rows=rows), readings={}))
    with pytest.raises(ValueError, match='which row is of this network.*my network, other'):
        trained.described(results=tmp_path/'mine.json')
    assert trained.described(results=tmp_path/'mine.json', row='my network').facts['figures']['row'] == 'my network'


def test_nothing_is_published_without_licences(repository, monkeypatch):
    model = Model.from_pretrained(repository)
    sent = []
    monkeypatch.setattr('huggingface_hub.hub_mixin.HfApi', lambda token=None: sent.append(token))
    for how, missing in ((dict(), 'data_license (of the training data), data (the name'),
                         (dict(data='toys'), 'data_license (of'), (dict(data_license='mit'), 'data (the name')):
        with pytest.raises(ValueError) as said: model.push_to_hub('me/toy', **how)
        assert missing in str(said.value) and '\n' not in str(said.value)
    for how in (dict(license='Mine'), dict(data_license='a b')):
        with pytest.raises(ValueError, match='an identifier of the Hub is needed'):
            model.push_to_hub('me/toy', **(dict(data='toys', data_license='mit') | how))
    with pytest.raises(ValueError, match='push_to_hub: data_license'):
        model.save_pretrained('never', push_to_hub=True, repo_id='me/toy')
    assert not sent and not os.path.exists('never')


def test_boxes_of_a_picture_are_the_same_by_array(hub, repository):
    "A name is taken where a `Predictor` is made, and with its other arguments."
    picture = np.asarray(Image.open('photo.png'))
    found = stdg.predict([picture] * 2, 'me/toy', size=96, boxes=[[[4, 4, 30, 30]]] * 2, labels=[['disc']] * 2)
    own = stdg.predict([picture] * 2, repository, size=96, boxes=[[[4, 4, 30, 30]]] * 2, labels=[['disc']] * 2)
    assert [len(one) for one in found] == [1, 1] and torch.equal(found[1].scores, own[1].scores)
    assert hub_files.network_folder(hub_files.HubName('me/toy')).is_dir()
