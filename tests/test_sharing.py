"""Sharing: a folder without a network, a Hub that is a folder, pickles, and cards of hostile names
as a browser would get them."""
import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import mistune
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin

from stdg import checkpoint
from stdg.graph import Vocabulary
from stdg.inference.hub import Model, check_facts
from stdg.inference.model_card import escaped
from stdg.model import STDG

FILES = ['README.md', 'config.json', 'model.json', 'model.safetensors']
FACTS = dict(vocabulary=Vocabulary(['cup', 'table', 'lamp'], ['near', 'on']).to_json(), size=96,
             training=dict(stage='student', step=240, epochs=120., seed=3),
             metrics={'sgdet/R@50': .5, 'AP50': .25},
             thresholds=dict(objects=.3, triplets=.12, images=200), license='cc-by-4.0',
             data=dict(name='rooms', license='cc0-1.0'), notes=['Größe ☕'], pretrained=True)
picture = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)


def tiny(facts=FACTS, n_objects=3, n_predicates=2, mode='rgb', seed=0):
    torch.manual_seed(seed)
    return Model(STDG('small', mode, n_objects=n_objects, n_predicates=n_predicates,
                      pretrained=False, fpn=16, channels=16).eval(), facts)


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shared')/'model'
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(shared, tmp_path):
    "A copy of the shared folder."
    return Path(shutil.copytree(shared, tmp_path/'model'))


def test_everything_comes_back(shared):
    model, again = tiny(), Model.from_pretrained(shared)
    assert names(shared) == FILES and again.facts == FACTS and again.size == 96
    assert again.network.config == model.network.config
    mine, theirs = model.network.state_dict(), again.network.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    a, b = model.predict(picture), again.predict(picture)
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.predicates, b.predicates)
    assert a.size == (80, 120)
    # it is a checkpoint like any other
    assert checkpoint.load(shared/'model.safetensors').config == model.network.config
    assert checkpoint.facts(shared/'model.safetensors')['thresholds'] == FACTS['thresholds']


OFFLINE = """
import sys
def refuse(event, args):
    if event.startswith('socket.'): raise AssertionError(f'{event}: the network was asked for')
sys.addaudithook(refuse)
from stdg.inference.hub import Model
model = Model.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
again = Model.from_pretrained(sys.argv[2])
assert again.facts == model.facts and again.network.config == model.network.config
try: Model.from_pretrained('owner/name')
except FileNotFoundError as error: print(error)
"""


def test_round_trip_without_a_network(shared, tmp_path):
    done = subprocess.run([sys.executable, '-c', OFFLINE, str(shared), str(tmp_path/'again')],
                          env=dict(os.environ, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'home')),
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('owner/name is no folder here, and nothing of that name could be '
                                  'read from the Hub')
    for name in FILES:
        assert (shared/name).read_bytes() == (tmp_path/'again'/name).read_bytes(), name


def test_saving_is_the_same_twice(shared, tmp_path):
    tiny().save_pretrained(tmp_path)
    for name in FILES: assert (shared/name).read_bytes() == (tmp_path/name).read_bytes(), name


class Hub:
    "In place of `HfApi`: what would be sent is kept in `folder`."
    calls = []
    def __init__(self, token=None): self.calls.append(('token', token))

    def create_repo(self, repo_id, **how):
        self.calls.append(('create', repo_id, how))
        return type('Url', (), dict(repo_id=repo_id))

    def upload_folder(self, repo_id, folder_path, **how):
        self.calls.append(('upload', repo_id, how))
        shutil.copytree(folder_path, self.folder)
        return f'https://hub/{repo_id}/commit/1'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    Hub.calls, Hub.folder = [], tmp_path/'hub'
    monkeypatch.setattr(hub_mixin, 'HfApi', Hub)
    return Hub


def test_push_sends_four_files_and_no_more(hub, shared):
    url = tiny().push_to_hub('owner/rooms', private=True, branch='v1', commit_message='first',
                             token='hf_x')
    assert url == 'https://hub/owner/rooms/commit/1' and names(hub.folder) == FILES
    for name in FILES: assert (hub.folder/name).read_bytes() == (shared/name).read_bytes(), name
    token, create, upload = hub.calls
    assert token == ('token', 'hf_x')
    assert create == ('create', 'owner/rooms', dict(private=True, exist_ok=True))
    assert upload[2]['revision'] == 'v1' and upload[2]['commit_message'] == 'first'
    assert upload[2]['repo_type'] == 'model'
    assert Model.from_pretrained(hub.folder).facts == FACTS


def test_a_bad_licence_is_found_before_anything_is_sent(hub):
    with pytest.raises(ValueError, match='an identifier of the Hub is needed'):
        tiny(dict(FACTS, license='Mine, all mine')).push_to_hub('owner/rooms')
    assert not hub.folder.exists() and not any(call[0] == 'upload' for call in hub.calls)


def test_no_teacher_is_shared(tmp_path):
    model = tiny(mode='combine')
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.network.mode == 'rgb'
    assert not any(k.startswith('teacher') for k in again.network.state_dict())
    assert torch.equal(again.predict(picture).boxes, model.predict(picture).boxes)
    assert model.network.teacher is not None
    model.save(tmp_path/'whole.safetensors')
    # a checkpoint keeps it
    assert Model.load(tmp_path/'whole.safetensors').network.mode == 'combine'


def test_a_depth_teacher_says_what_it_reads(tmp_path):
    model = tiny(mode='depth')
    model.save_pretrained(tmp_path)
    card = (tmp_path/'README.md').read_text()
    assert 'It reads HHA' in card and 'model.predict' not in card
    with pytest.raises(ValueError, match='reads HHA, not RGB'):
        Model.from_pretrained(tmp_path).predict(picture)


def cached(cache, revisions):
    "A cache as huggingface_hub keeps it, of 'owner/rooms' with models at named revisions."
    home = cache/'models--owner--rooms'
    for name, model in revisions.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        model.save_pretrained(home/'snapshots'/commit)
        (home/'refs').mkdir(exist_ok=True)
        (home/'refs'/name).write_text(commit)


def test_a_revision_is_pinned(tmp_path):
    cached(tmp_path, dict(main=tiny(dict(FACTS, size=128)), v1=tiny()))
    how = dict(cache_dir=tmp_path, local_files_only=True)
    assert Model.from_pretrained('owner/rooms', **how).size == 128
    assert Model.from_pretrained('owner/rooms', revision='v1', **how).size == 96
    assert Model.from_pretrained('owner/rooms', revision=hashlib.sha1(b'v1').hexdigest(),
                                 **how).size == 96
    with pytest.raises(FileNotFoundError, match='owner/rooms is no folder here'):
        Model.from_pretrained('owner/rooms', revision='v2', **how)


def test_only_three_files_are_asked_for(monkeypatch, shared):
    asked = []
    def fetch(name, **how): return asked.append((name, how)) or str(shared)
    there = [type('File', (), dict(rfilename=name)) for name in (*FILES, 'run_me.py')]
    def info(self, name, **how): return asked.append((name, how)) or type('Info', (), dict(siblings=there))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('stdg.inference.hub_files.HfApi.model_info', info)
    monkeypatch.setattr('stdg.inference.hub_files.snapshot_download', fetch)
    Model.from_pretrained('owner/rooms', revision='abc', token='hf_x')
    assert asked.pop(0) == ('owner/rooms', dict(revision='abc', timeout=20))
    assert asked == [('owner/rooms',
                      dict(allow_patterns=['model.safetensors', 'model.json', 'config.json'],
                           revision='abc', token='hf_x'))]


class Bomb:
    "A pickle that leaves a file behind when it is opened."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pkl', 'student.pt', 'model.ckpt'])
def test_a_pickle_is_refused(tmp_path, name):
    folder, trace = tmp_path/'model', tmp_path/'trace'
    folder.mkdir()
    (folder/name).write_bytes(pickle.dumps(Bomb(trace)))
    for named in ((), ('config.json', 'model.json')):
        for other in named: (folder/other).write_text('{}')
        with pytest.raises(ValueError, match=f'{name}, a pickle, which can run code'):
            Model.from_pretrained(folder)
    assert not trace.exists()


def test_a_pickle_beside_the_tensors_is_not_opened(changed, tmp_path):
    (changed/'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path/'trace')))
    (changed/'modeling.py').write_text(f'open({str(tmp_path/"trace")!r}, "w")')
    assert Model.from_pretrained(changed).facts == FACTS and not (tmp_path/'trace').exists()


def test_a_pickle_in_place_of_the_tensors(changed, tmp_path):
    (changed/'model.safetensors').write_bytes(pickle.dumps(Bomb(tmp_path/'trace')))
    with pytest.raises(ValueError, match='model.safetensors is not a whole safetensors file'):
        Model.from_pretrained(changed)
    assert not (tmp_path/'trace').exists()


def test_damaged_folders(changed):
    def broken(name, content, error, message):
        whole = (changed/name).read_bytes()
        (changed/name).unlink() if content is None else (changed/name).write_bytes(content)
        with pytest.raises(error, match=message): Model.from_pretrained(changed)
        (changed/name).write_bytes(whole)
    for name in FILES[1:]:
        broken(name, None, FileNotFoundError, f'{name} is missing. A shared model has')
    broken('model.safetensors', (changed/'model.safetensors').read_bytes()[:-10], ValueError,
           'not a whole safetensors file')
    broken('config.json', b'[]', ValueError, 'config.json is not the JSON of a model')
    broken('config.json', b'{', ValueError, 'config.json is not whole JSON')
    broken('model.json', b'[' * 10**5, ValueError, 'model.json is not whole JSON')
    broken('model.json', b'{"format": "other"}', ValueError, 'model.json is not the JSON of a '
           'checkpoint')
    record = json.loads((changed/'model.json').read_text())
    def facts(message, **change):
        broken('model.json', json.dumps(record | change).encode(), ValueError, message)
    facts('2 objects and 2 predicates are named, the network knows 3 and 2',
          vocabulary=dict(objects=['a', 'b'], predicates=['c', 'd']))
    facts('vocabulary needs lists', vocabulary=7)
    facts('every name must be non-empty text',
          vocabulary=dict(objects=['a', 'b', ['c']], predicates=['c', 'd']))
    facts('size is 100000000', size=10**8)
    facts('size is True', size=True)
    facts('training must be', training='long')
    facts('does not describe a network', config=dict(record['config'], pretrained='http://x'))
    facts('does not fit the network', config={})
    facts("'hf-hub:owner/body' is not a model of timm",
          config=dict(record['config'], timm_name='hf-hub:owner/body'))
    facts('does not fit the network', config=dict(record['config'], channels=32))
    assert Model.from_pretrained(changed).facts == FACTS


def test_a_config_cannot_slip_facts_in(changed):
    (changed/'config.json').write_text(json.dumps(dict(facts=dict(size=1), network='x',
                                                       config=dict(a=1))))
    assert Model.from_pretrained(changed).facts == FACTS


def test_unknown_words_are_no_argument(shared):
    with pytest.raises(TypeError, match='strict'): Model.from_pretrained(shared, strict=False)


def test_a_card_somebody_wrote_stays(changed):
    (changed/'README.md').write_text('mine')
    tiny().save_pretrained(changed)
    assert (changed/'README.md').read_text() == 'mine'
    assert Model.from_pretrained(changed).facts == FACTS


def test_copies():
    model = tiny()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.facts == FACTS
        assert torch.equal(other.predict(picture).boxes, model.predict(picture).boxes)


HOSTILE = ['<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '</p></body>', ']]>',
           '<!--', '"', "'", '`', '```', '``a``', '*a*', '_a_', '~~a~~', '# a', '- a', '1. a',
           '> a', '| a | b |', '[a](javascript:alert(1))',
           '[a]: http://x.y', '![a](http://x.y)', '<http://x.y>', 'http://x.y', 'www.x.y', 'a@x.y',
           'a\nb', 'a\r\n\r\n# b', '\n---\nlicense: mit\n---\n', '\u202egnp', '\u200f', '\ufeff',
           '\x00\x1b[31m', '\\', 'a\\', '&lt;b&gt;', '&#60;b&#62;',
           '{{ 7*7 }}', '{model}', '$$x$$', ':smile:', '\u2028b', 'x' * 10_000, '<' * 10_000, '名前',
           '☕']


class Seen(HTMLParser):
    "Tags, links and text of a page."
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ''
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('href', 'src')
                       or name.startswith('on')]
    def handle_data(self, data): self.text += data


def page(text):
    "What a browser gets of Markdown whose HTML is passed through and whose addresses become links."
    seen = Seen()
    seen.feed(mistune.create_markdown(escape=False,
                                      plugins=['table', 'strikethrough', 'url', 'footnotes',
                                               'task_lists', 'math'])(text))
    return seen


def test_hostile_names_are_text(tmp_path):
    record = dict(vocabulary=dict(objects=HOSTILE, predicates=HOSTILE[::-1]),
                  metrics={name: .5 for name in HOSTILE},
                  training={name: HOSTILE for name in HOSTILE}, notes=HOSTILE)
    plain = dict(vocabulary=dict(objects=[f'o{i}' for i in range(len(HOSTILE))],
                                 predicates=[f'p{i}' for i in range(len(HOSTILE))]),
                 metrics={f'm{i}': .5 for i in range(len(HOSTILE))},
                 training={f't{i}': 'x' for i in range(len(HOSTILE))}, notes='x')
    model, calm = (tiny(facts, len(HOSTILE), len(HOSTILE)) for facts in (record, plain))
    model.save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).facts == record  # files keep what they are given
    card = ModelCard.load(tmp_path/'README.md')
    # nothing got into the header
    assert card.data.to_dict() == calm.generate_model_card().data.to_dict()
    mine, theirs = page(card.text), page(calm.generate_model_card().text)
    assert mine.tags == theirs.tags and mine.links == theirs.links == []
    for name in ('<script>alert(1)</script>', ']]>', '```', '[a](javascript:alert(1))',
                 'http://x.y', '{{ 7*7 }}', '&lt;b&gt;', '☕'):
        assert name in mine.text, name
    assert not any(c in card.text for c in '\u202e\u200f\x00\x1b\u2028')
    assert len(card.text) < 100_000


@pytest.mark.parametrize('name', HOSTILE)
def test_each_name_alone(name):
    seen = page(f'before {escaped(name)} after')
    assert seen.tags == ['p'] and not seen.links and seen.text.startswith('before ')
    assert seen.text.rstrip().endswith(' after')


def test_many_names():
    many = [f'class {i}' for i in range(3000)]
    text = tiny(dict(vocabulary=dict(objects=many, predicates=['on'])), 3000,
                1).generate_model_card().text
    assert 'class 999 and 2000 more' in text and 'class 1000,' not in text


@pytest.mark.parametrize('wrong', [[], dict(objects='high'), dict(triplets=-.1),
                                   dict(objects=[.1])])
def test_thresholds_are_numbers(wrong):
    with pytest.raises(ValueError, match='thresholds must be numbers from 0 to 1'):
        check_facts(dict(thresholds=wrong), dict(n_objects=1, n_predicates=1))
