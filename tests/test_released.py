"""Released files: whole pickled networks, read exactly; hostile and broken ones, refused with one
line or read harmlessly, with nothing executed."""
import argparse
import collections
import copyreg
import enum
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stdg.checkpoint import facts, from_released, load, released_layout, released_name, vocabulary
from stdg.graph import Vocabulary
from stdg.model import STDG
from stdg.released import convert, main, read_released

golden = Path(__file__).parent/'golden'
layouts = json.loads((golden/'state_dicts.json').read_text())
pytestmark = pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code',
                                        'ignore:invalid escape sequence')


# Whole networks of a package that is not here when they are read

PACKAGE = ('openpifpaf', 'openpifpaf.network', 'openpifpaf.network.nets')


def make_package(monkeypatch):
    "Classes of a package that `gone()` removes."
    def gone():
        for name in PACKAGE: monkeypatch.delitem(sys.modules, name)

    made = types.SimpleNamespace(gone=gone)
    for name in PACKAGE: monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class Shell(nn.Module): pass
    class Kind(enum.Enum): DETECTION = 1
    class Lookup(dict): pass
    for kind in (Shell, Kind, Lookup):
        kind.__module__, kind.__qualname__ = PACKAGE[-1], kind.__name__
        setattr(sys.modules[PACKAGE[-1]], kind.__name__, kind)
        setattr(made, kind.__name__, kind)
    return made


@pytest.fixture
def package(monkeypatch): return make_package(monkeypatch)


def meta(package):
    "What a trainer might note beside the network."
    named = dict(args=argparse.Namespace(lr=1e-3), kind=package.Kind.DETECTION,
                 lookup=package.Lookup(a=1), counts=collections.defaultdict(list, a=[1]),
                 number=np.float32(2), array=np.arange(3), names={'a', 'b'}, bytes=b'\x00\xff',
                 large=1 << 70, layer=functools.partial(nn.ReLU, inplace=True))
    return named | {3: (1, 2), (4, 5): None}


def nested(package, state):
    "Modules that have exactly the tensors of `state`."
    root = package.Shell()
    for name, tensor in state.items():
        module, (*path, last) = root, name.split('.')
        for part in path:
            if part not in module._modules: module.add_module(part, package.Shell())
            module = module._modules[part]
        if tensor.is_floating_point() and not last.startswith('running'):
            module.register_parameter(last, nn.Parameter(tensor))
        else: module.register_buffer(last, tensor)
    return root


def save(path, network, zipped, package, **more):
    torch.save({'model': network, 'epoch': 60, 'meta': meta(package), **more}, path,
               _use_new_zipfile_serialization=zipped)
    package.gone()
    return path


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('config', sorted(layouts))
def test_every_layout(tmp_path, package, config, zipped):
    "Every name and type of the layouts, with small tensors."
    torch.manual_seed(0)
    state = {}
    for name, (shape, dtype) in layouts[config].items():
        small = [min(n, 3) for n in shape]
        state[name] = torch.randint(9, small) if 'int' in dtype else torch.randn(small)
    network = nested(package, state)
    found = read_released(save(tmp_path/'a.pkl', nn.DataParallel(network), zipped, package))
    assert found['epoch'] == 60
    assert_same({k.removeprefix('module.'): v for k, v in found['state_dict'].items()},
                network.state_dict())
    assert found['state_dict'].keys() == {f'module.{k}' for k in state}


@pytest.mark.parametrize('zipped', [True, False])
def test_what_modules_hold(tmp_path, package, zipped):
    "Shared, frozen, half, absent, hidden and strided tensors, and layers of torch."
    net = package.Shell()
    net.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4),
                             nn.MultiheadAttention(4, 2))
    net.body[1].num_batches_tracked += 7
    net.low = nn.Linear(4, 2).half()
    net.frozen, net.none = nn.Linear(4, 2).requires_grad_(False), None
    net.tied = net.low
    net.view = nn.Parameter(net.frozen.weight.data.t()[1:])
    net.low.bias.note = 'a parameter with an attribute'
    net.register_buffer('scratch', torch.zeros(2), persistent=False)
    net.register_buffer('flags', torch.tensor([True, False]))
    net.flags.note = 'so has a buffer'
    net.register_buffer('scalar', torch.tensor(3., dtype=torch.bfloat16))
    found = read_released(save(tmp_path/'a.pkl', net, zipped, package))['state_dict']
    assert_same(found, net.state_dict())
    assert found['tied.weight'].data_ptr() == found['low.weight'].data_ptr()
    assert not {'scratch', 'none', 'body.0.bias'} & found.keys()


@pytest.mark.parametrize('kind', ['zip', 'stream'])
def test_files_of_torch_1_7(kind):
    "Written by torch 1.7.1 on Python 3.8."
    found = read_released(golden/f'torch_1_7_{kind}.pkl')
    arrays = np.load(golden/'torch_1_7.npz')
    assert found['epoch'] == dict(zip=60, stream=3)[kind]
    expected = {name.removeprefix(f'{kind}/'): torch.from_numpy(arrays[name])
                for name in arrays if name.startswith(kind)}
    assert_same(found['state_dict'], expected)


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 4},
                                  lambda s: {'model': s},
                                  lambda s: collections.OrderedDict(model=s)])
def test_a_bare_state_dict(tmp_path, wrap):
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    for zipped in (True, False):
        torch.save(wrap(state), tmp_path/'a.pkl', _use_new_zipfile_serialization=zipped)
        assert_same(read_released(tmp_path/'a.pkl')['state_dict'], state)


def test_saved_on_a_gpu(tmp_path):
    "The device is ignored; a GPU's storages have other type names in old files."
    torch.save({'w': torch.arange(3.)}, tmp_path/'a.pkl', _use_new_zipfile_serialization=False)
    data = (tmp_path/'a.pkl').read_bytes()
    data = data.replace(b'ctorch\nFloat', b'ctorch.cuda\nFloat')
    data = data.replace(b'X\x03\x00\x00\x00cpu', b'X\x06\x00\x00\x00cuda:0')
    assert b'cuda:0' in data and b'torch.cuda' in data
    (tmp_path/'a.pkl').write_bytes(data)
    assert read_released(tmp_path/'a.pkl')['state_dict']['w'].tolist() == [0, 1, 2]


# Hostile pickles, written instruction by instruction

def text(s): return b'X' + struct.pack('<I', len(s.encode())) + s.encode()
def named(module, name): return f'c{module}\n{name}\n'.encode()
def number(n): return b'\x8a' + bytes([len(pickle.encode_long(n))]) + pickle.encode_long(n)
def tuple_of(*items): return b'(' + b''.join(items) + b't'
def call(module, name, *args): return named(module, name) + tuple_of(*args) + b'R'
def entries(**items): return b'}(' + b''.join(text(k) + v for k, v in items.items()) + b'u'


def tensor(offset=0, shape=(4,), stride=(1,), key='0', count=4, kind='storage',
           dtype='FloatStorage', view=b'', made=('torch._utils', '_rebuild_tensor_v2')):
    storage = tuple_of(text(kind), named('torch', dtype), text(key), text('cpu'), number(count),
                       view) + b'Q'
    return call(*made, storage, number(offset), tuple_of(*map(number, shape)),
                tuple_of(*map(number, stride)), b'\x89', call('collections', 'OrderedDict'))


def write(path, body, zipped=True, numbers=(0., 1., 2., 3.)):
    "A file of `torch.save` around the instructions `body`, with one storage if they mention any."
    data = struct.pack(f'<{len(numbers)}f', *numbers)
    code = b'\x80\x02' + body + b'.'
    if zipped:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', code)
            archive.writestr('archive/data/0', data)
    else:
        system = dict(protocol_version=1001, little_endian=True)
        start = b''.join(pickle.dumps(part, 2) for part in (0x1950a86a20f9469cfc6c, 1001, system))
        stored = b'storage' in body
        end = pickle.dumps(['0'] if stored else [], 2)
        if stored: end += struct.pack('<q', len(numbers)) + data
        path.write_bytes(start + code + end)
    return path


def attacks(marker):
    """Name to instructions that leave `marker` when they are unpickled in the usual way; whether
    they are refused where a network does not need them."""
    shell, python = text(f'touch {marker}'), text(f'open({str(marker)!r}, "w").close()')
    touch = b'](' + text('touch') + text(str(marker)) + b'e'
    found = call('builtins', '__import__', text('os'))
    return {
        'system': (call('os', 'system', shell), False),
        'posix': (call('posix', 'system', shell), False),
        'eval': (call('builtins', 'eval', python), False),
        'exec': (call('builtins', 'exec', python), False),
        'python2': (call('__builtin__', 'eval', python), False),
        'subprocess': (call('subprocess', 'check_call', touch), False),
        'getattr': (call('builtins', 'getattr', found, text('system')) + tuple_of(shell) + b'R',
                    False),
        'partial': (call('functools', 'partial', named('os', 'system'), shell) + b')R', False),
        'new': (named('victim', 'New') + tuple_of(python) + b'\x81', False),
        'setstate': (named('victim', 'State') + b')\x81' + python + b'b', False),
        'import': (named('poisoned', 'thing'), False),
        'inst': (b'(S' + repr(f'touch {marker}').encode() + b'\nios\nsystem\n', True),
        'obj': (b'(' + named('subprocess', 'check_call') + touch + b'o', True),
        'stack global': (text('os') + text('system') + b'\x93' + tuple_of(shell) + b'R', True),
        'dotted': (text('shutil') + text('os.system') + b'\x93' + tuple_of(shell) + b'R', True),
        'extension': (b'\x82\xf0' + tuple_of(shell) + b'R', True),
    }


@pytest.mark.parametrize('attack', attacks(''))
def test_attacks(tmp_path, monkeypatch, attack):
    marker = tmp_path/'marker'
    (tmp_path/'poisoned.py').write_text(f'open({str(marker)!r}, "w").close()\nthing = None\n')
    (tmp_path/'victim.py').write_text('class State:\n    def __setstate__(self, code): eval(code)\n'
                                      'class New:\n    def __new__(cls, code): eval(code)\n')
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension('os', 'system', 0xf0)
    try:
        body, refused = attacks(marker)[attack]
        for zipped in (True, False):
            for place in (entries(model=body), entries(state_dict=entries(w=body)), body):
                with pytest.raises(ValueError) as error:
                    read_released(write(tmp_path/'hostile.pkl', place, zipped))
                message = str(error.value)
                assert 'hostile.pkl cannot be read as a released network: ' in message
                assert len(message) < 300 + len(str(tmp_path)) and '\n' not in message
            beside = write(tmp_path/'hostile.pkl', entries(meta=body, model=entries(w=tensor())),
                           zipped)
            if refused:
                with pytest.raises(ValueError, match='hostile.pkl'): read_released(beside)
            else: assert read_released(beside)['state_dict']['w'].tolist() == [0, 1, 2, 3]
        assert not marker.exists() and not {'poisoned', 'victim'} & sys.modules.keys()
        pickle.loads((b'\x80\x04' if attack == 'dotted' else b'\x80\x02') + body + b'.')
        assert marker.exists()  # the attack is real
    finally:
        copyreg.remove_extension('os', 'system', 0xf0)
        for name in ('poisoned', 'victim'): sys.modules.pop(name, None)


def test_nothing_here_is_changed(tmp_path):
    "BUILD sets attributes: of a class too, and of ours."
    for module, name in (('stdg.released', '_Object'), ('collections', 'OrderedDict'),
                         ('stdg.graph', 'Vocabulary'), ('torch._utils', '_rebuild_tensor_v2')):
        for change in (tuple_of(b'N', entries(hit=b'\x88', __defaults__=b'N')),
                       entries(__class__=named('os', 'system'), __dict__=b'N'),
                       entries(__setstate__=named('os', 'system'),
                               __init_subclass__=named('os', 'system'))):
            for target in (named(module, name), call(module, name)):
                body = entries(meta=target + change + b'b', model=entries(w=tensor()))
                found = read_released(write(tmp_path/'a.pkl', body))
                assert found['state_dict']['w'].tolist() == [0, 1, 2, 3]
    for untouched in (sys.modules['stdg.released']._Object, Vocabulary,
                      torch._utils._rebuild_tensor_v2):
        assert not hasattr(untouched, 'hit')


@pytest.mark.parametrize('change', [
    dict(shape=(5,)), dict(offset=1), dict(shape=(1 << 40, 1 << 20), stride=(0, 0)),
    dict(shape=(1 << 70,)), dict(stride=(1 << 61,)), dict(offset=-1), dict(stride=(-1,)),
    dict(shape=(2, 2)), dict(shape=(0,)), dict(shape=(1,) * 9, stride=(1,) * 9),
    dict(count=5), dict(count=3, shape=(3,)), dict(count=1 << 60), dict(count=1 << 70),
    dict(count=-1), dict(key='1'), dict(key='../data.pkl'), dict(key='/etc/passwd'),
    dict(kind='file'), dict(view=tuple_of(text('1'), number(0), number(2))), dict(kind='module'),
    dict(dtype='DoubleStorage'), dict(dtype='PathStorage'), dict(dtype='load'),
    dict(made=('torch._utils', '_rebuild_sparse_tensor')), dict(made=('torch', 'load')),
    dict(made=('torch.hub', 'load'))])
def test_tensors_outside_their_storage(tmp_path, change):
    for zipped in (True, False):
        with pytest.raises(ValueError, match=r'a\.pkl cannot be read as a released network'):
            read_released(write(tmp_path/'a.pkl', entries(w=tensor(**change)), zipped))
        doubles = tensor(count=2, shape=(2,), dtype='DoubleStorage')
        with pytest.raises(ValueError, match="its storage '0' has two types"):
            read_released(write(tmp_path/'a.pkl', entries(w=tensor(), x=doubles), zipped))
    inside = write(tmp_path/'a.pkl', entries(w=tensor(shape=(2, 2), stride=(1, 2))))
    assert read_released(inside)['state_dict']['w'].tolist() == [[0, 2], [1, 3]]


DEEP = 300_000  # a third of it is enough to crash the interpreter where such a tuple is hashed


@pytest.mark.parametrize('body', [b')' + b'\x85' * DEEP, b'}' + b')' + b'\x85' * DEEP + b'Ns',
                                  b']' * DEEP + b'a' * (DEEP - 1),
                                  b'(' + named('os', 'system') + b'q\x01)R'
                                  + b'q\x00h\x01h\x00\x85R' * (DEEP // 3) + b'q\x001h\x00',
                                  b'N' + b'N0' * 500_000],
                         ids=['tuples', 'key', 'lists', 'calls', 'many'])
def test_pickles_that_are_deep_or_long(tmp_path, body):
    with pytest.raises(ValueError, match=r'a\.pkl cannot be read as a released network: '
                       r'it(s pickle)? has') as error:
        read_released(write(tmp_path/'a.pkl', entries(meta=body, model=b']')))
    assert ('more than 1,000,000 instructions' in str(error.value)) == (len(body) > 1_000_000)


@pytest.mark.parametrize('body', [
    b'N' + b'q\x00](h\x00h\x00e' * 100,  # each list holds the last one twice
    # these announce more than there is
    b'Nr\xff\xff\xff\xff', b'X\xff\xff\xff\xff', b'\x8b\xff\xff\xff\x7f', b'\x8d' + b'\xff' * 8,
    b'R', b't', b'u', b'b', b'Q', b'a', b'h\x07', b'(((', b'}Nb', b'NNR', b']NQ', b'}(Nu', b'\x97',
    b'\x98'])
def test_senseless_pickles(tmp_path, body):
    """An error, at once and without the memory that they ask for; beside a network some are
    ignored."""
    for zipped in (True, False):
        for place in (body, entries(model=body)):
            with pytest.raises(ValueError, match=r'a\.pkl cannot be read as a released network'):
                read_released(write(tmp_path/'a.pkl', place, zipped))
        beside = write(tmp_path/'a.pkl', entries(model=entries(w=tensor()), meta=body), zipped)
        try: assert read_released(beside)['state_dict']['w'].tolist() == [0, 1, 2, 3]
        except ValueError as error: assert 'a.pkl cannot be read' in str(error)


def test_a_parameter_made_of_itself(tmp_path):
    body = named('torch._utils', '_rebuild_parameter') + b']q\x00Rq\x01h\x00h\x01a0'
    with pytest.raises(ValueError, match='makes an object of something that is no class'):
        read_released(write(tmp_path/'a.pkl', entries(w=body)))


def module(parameters=b'', children=b'', store=b''):
    "A module with that many entries, put into the memo by `store`."
    state = entries(_parameters=b'}(' + parameters + b'u', _buffers=b'}',
                    _modules=b'}(' + children + b'u')
    return named('x', 'Shell') + b')\x81' + store + state + b'b'


WEIGHT = text('w') + tensor()
ITS_OWN_CHILD = module(WEIGHT, children=text('a') + b'h\x00', store=b'q\x00')
TWO_OF_THE_LAST = module(children=text('a') + b'h\x00' + text('b') + b'h\x00', store=b'q\x01')
DOUBLED = b'(' + module(WEIGHT, store=b'q\x00') + (TWO_OF_THE_LAST + b'h\x01q\x00') * 60 + b'1h\x00'
LIST_OF_PARAMETERS = (named('x', 'Shell') + b')\x81'
                      + entries(_parameters=b']', _modules=b'}') + b'b')


@pytest.mark.parametrize('message,body', {
    'longer than': ITS_OWN_CHILD,
    'without end': DOUBLED,
    'longer': module(children=text('a' * 600) + module(WEIGHT)),
    "'a' is no module": module(children=text('a') + b']'),
    "'w' is no dense tensor but 'os.system'": module(text('w') + call('os', 'system')),
    "'w' is no tensor but str": module(text('w') + text('rm')),
    'it has list where a dictionary belongs': LIST_OF_PARAMETERS}.items())
def test_broken_modules(tmp_path, message, body):
    for zipped in (True, False):
        expected = r'a\.pkl cannot be read as a released network: .*' + message
        with pytest.raises(ValueError, match=expected):
            read_released(write(tmp_path/'a.pkl', entries(model=body), zipped))


def test_modules_by_hand(tmp_path):
    "Parameters first, then children in their order; what is None is skipped."
    children = text('b') + module(text('v') + tensor()) + text('a') + module(text('u') + tensor())
    body = module(WEIGHT + text('none') + b'N', children + text('none') + b'N')
    for place in (body, entries(model=body, epoch=text('sixty')),
                  entries(state_dict=body, epoch=b'\x88')):
        found = read_released(write(tmp_path/'a.pkl', place))
        assert list(found['state_dict']) == ['w', 'b.v', 'a.u'] and found['epoch'] is None


# Broken files

def test_broken_zip_archives(tmp_path):
    path, code = tmp_path/'a.pkl', b'\x80\x02' + entries(w=tensor()) + b'.'

    def archive(compression=zipfile.ZIP_STORED, **files):
        with zipfile.ZipFile(path, 'w', compression) as file:
            for name, data in files.items():
                file.writestr(name.replace('__', '/').replace('_pkl', '.pkl'), data)

    good = dict(a__data_pkl=code, a__data__0=bytes(16))
    for change, message in ((dict(a__data__1=bytes(1 << 24), compression=zipfile.ZIP_DEFLATED),
                             'longer than the file: compressed'),
                            (dict(b__data_pkl=code), 'not of torch.save'),
                            (dict(a__constants_pkl=code), 'TorchScript'),
                            (dict(a__byteorder=b'big'), 'big-endian'),
                            (dict(a__data__0=bytes(15)),
                             "its storage '0' has 15 bytes instead of 16"),
                            (dict(a__data_pkl=b''), 'exhausted')):
        archive(**{**good, **change})
        with pytest.raises(ValueError, match=message): read_released(path)
    archive(**good, a__byteorder=b'little', a__version=b'3')
    assert read_released(path)['state_dict']['w'].tolist() == [0] * 4
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a/data.pkl', code)
        file.filelist *= 10  # the same bytes ten times
    with pytest.raises(ValueError, match='longer than the file'): read_released(path)
    archive(**good)
    path.write_bytes(path.read_bytes().replace(bytes(16), b'\1' * 16))
    with pytest.raises(ValueError, match='Bad CRC'): read_released(path)


def test_other_files(tmp_path):
    path = tmp_path/'a.pkl'
    with tarfile.open(path, 'w') as file: file.addfile(tarfile.TarInfo('pickle'), io.BytesIO())
    with pytest.raises(ValueError, match='a.pkl .*tar archive'): read_released(path)
    for data, message in ((b'', 'torch.save did not write it'), (b'PK\x03\x04', 'not a zip file'),
                          (b'<html>', 'torch.save did not write it'),
                          (pickle.dumps({'model': 1}, 2), 'not of torch.save')):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message): read_released(path)
    little = (golden/'torch_1_7_stream.pkl').read_bytes()
    big = little.replace(b'little_endianq\x02\x88', b'little_endianq\x02\x89')
    assert path.write_bytes(big) and big != little
    with pytest.raises(ValueError, match='big-endian'): read_released(path)
    with pytest.raises(FileNotFoundError, match='none.pkl is missing'):
        read_released(tmp_path/'none.pkl')


@pytest.mark.parametrize('kind', ['zip', 'stream', 'pickle'])
def test_cut_and_changed_files(tmp_path, kind):
    "Cut anywhere: refused. Any byte changed: refused, or read as tensors."
    path, rng = tmp_path/'a.pkl', np.random.default_rng(0)
    name = 'torch_1_7_stream.pkl' if kind == 'stream' else 'torch_1_7_zip.pkl'
    whole = (golden/name).read_bytes()
    with zipfile.ZipFile(golden/'torch_1_7_zip.pkl') as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if kind == 'pickle': whole = files['archive/data.pkl']

    def put(data):
        if kind != 'pickle': return path.write_bytes(data)
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in files.items():
                archive.writestr(name, data if name == 'archive/data.pkl' else content)

    if kind == 'stream':
        put(whole[:-1])
        with pytest.raises(ValueError, match="its storage '[0-9]+' is cut off"): read_released(path)
    for end in rng.integers(0, len(whole), 50):
        put(whole[:end])
        with pytest.raises(ValueError, match=r'a\.pkl cannot be read as a released network'):
            read_released(path)
    read = 0
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        put(changed)
        try: found = read_released(path)['state_dict']
        except ValueError as error: assert str(path) in str(error)
        else: read += all(isinstance(t, torch.Tensor) and t.sum() is not None for t in found.values())
    assert 0 < read < 200


# From theirs to ours

@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    "A whole network of full size, and what the command makes of it."
    folder = tmp_path_factory.mktemp('released')
    state = {k: torch.zeros(shape, dtype=torch.int64) if 'int' in dtype else torch.zeros(shape)
             for k, (shape, dtype) in layouts['resnet50_rgb'].items()}
    for i, tensor in enumerate(state.values()): tensor += i
    with pytest.MonkeyPatch.context() as patch:
        package = make_package(patch)
        save(folder/'epoch060.pkl', nn.DataParallel(nested(package, state)), True, package)
    main([str(folder/'epoch060.pkl'), str(folder/'student.safetensors')])
    return folder, state


def test_convert(converted):
    folder, state = converted
    model, record = load(folder/'student.safetensors'), facts(folder/'student.safetensors')
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[released_name(name, 'rgb')]), name
    assert record['training'] == dict(epoch=60, source='epoch060.pkl')
    assert record['config']['colour_order'] == 'BGR' and record['size'] == 512
    assert vocabulary(folder/'student.safetensors') == Vocabulary.visual_genome()


def test_another_vocabulary(tmp_path, converted, capsys):
    folder, _ = converted
    names = dict(objects=['cup', 'table'], predicates=['on'])
    (tmp_path/'names.json').write_text(json.dumps(names))
    with pytest.raises(SystemExit) as end:
        main([str(folder/'epoch060.pkl'), str(tmp_path/'a.safetensors'), '--vocabulary',
              str(tmp_path/'names.json')])
    assert end.value.code == 1
    message = ('epoch060.pkl: it knows 150 object classes and 50 predicates, '
               'the vocabulary has 2 and 1. Give the vocabulary')
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob('a.*'))


@pytest.mark.parametrize('counts', [(1 << 30, 50), (150, 7 << 30)])
def test_counts_are_checked_before_the_network_is_built(tmp_path, counts):
    """A tensor's first dimension says how large the network will be; the vocabulary must say the
    same."""
    state = {'head_nets.0.hm.1.weight': torch.empty(counts[0], device='meta'),
             'head_nets.1.raf_head.bias': torch.empty(counts[1] * 7, device='meta')}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('stdg.released.read_released',
                      lambda path: dict(state_dict=state, epoch=None))
        with pytest.raises(ValueError, match=f'a.pkl: it knows {counts[0]} object classes '
                           f'and {counts[1]} predicates'):
            convert(tmp_path/'a.pkl', tmp_path/'a.safetensors')


@pytest.mark.parametrize('config', sorted(layouts))
def test_what_does_not_fit_a_layout_is_named(monkeypatch, config):
    """One key missing, one too many, one of another shape: each is named.

    The network is built once, without memory, as nothing is loaded."""
    state = {}
    for name, (shape, dtype) in layouts[config].items():
        kind = getattr(torch, dtype.removeprefix('torch.'))
        state[name] = torch.empty(shape, dtype=kind, device='meta')
    with torch.device('meta'): model = STDG(**released_layout(state), pretrained=False)

    def built(pretrained, **wanted):
        return model if wanted.items() <= model.config.items() else None

    monkeypatch.setattr('stdg.checkpoint.STDG', built)
    for key in (next(iter(state)), next(k for k in reversed(state) if k.endswith('deform.weight'))):
        without = {k: v for k, v in state.items() if k != key}
        for changed, message in (
                (without, f'missing: ..{key}'),
                ({**state, f'{key}.more': state[key]}, f'unknown: ..{key}.more'),
                ({**state, key: state[key][1:]}, f'wrong shape: {key} is .* instead of')):
            with pytest.raises(ValueError, match=message): from_released(changed)


@pytest.mark.parametrize('shape', [(), (3,)])
def test_not_the_layout(tmp_path, shape):
    torch.save({'model': {'head_nets.0.hm.1.weight': torch.zeros(shape),
                          'head_nets.1.raf_head.bias': torch.zeros(shape)}}, tmp_path/'a.pkl')
    with pytest.raises(ValueError, match='a.pkl: (this is no released state dict|'
                       'it knows 3 object classes)'):
        convert(tmp_path/'a.pkl', tmp_path/'b.safetensors')


def test_command_from_a_shell(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'stdg.released', 'none.pkl', 'a.safetensors'],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(golden.parent.parent)})
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == 'none.pkl is missing. Is the path right?'
