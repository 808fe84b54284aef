"The `stdg` command: what it refuses to overwrite, what is odd about pictures, and one line for each mistake."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stdg
from stdg import cli
from stdg.draw.style import drawn_here
from stdg.explore.networks import arguments
from stdg.graph import Vocabulary
from stdg.inference import predictor
from stdg.inference.display import PicturePrediction
from stdg.io.archives import open_sources
from stdg.model import STDG
from stdg.testing import loud

NAMES = Vocabulary(['disc', '\x1b[31mred\n'], ['beside', 'on'])


def picture(path, seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, 'PNG')


def write_network(path):
    torch.manual_seed(0)
    model = STDG('small', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)
    loud(model).save(path, vocabulary=NAMES.to_json(), size=96,
                     thresholds=dict(objects=.6, triplets=.2))


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('net')/'net.safetensors'
    write_network(path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A working folder with one picture and an album of two."
    monkeypatch.chdir(tmp_path)
    for name in ('photo.png', 'album/a.png', 'album/b.png'): picture(tmp_path/name)
    return tmp_path


@pytest.fixture
def run(network, capsys):
    "Runs the command in this process: (exit code, stdout, stderr)."
    def run(*arguments):
        # few things are drawn fast
        more = [] if '--top' in arguments else ['--top', 2]
        more += [] if '--min-object' in arguments else ['--min-object', .99]
        more += [] if '-c' in arguments else ['-c', network]
        try: code = cli.main([*arguments, *more])
        except SystemExit as ended: code = ended.code
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return code, said.out, said.err
    return run


@pytest.fixture
def quick(monkeypatch):
    "Drawings that take no time."
    text = '<svg><dc:title>stdg</dc:title></svg>'
    monkeypatch.setattr(PicturePrediction, 'svg', lambda self, *args, **options: text)


@pytest.fixture
def refused(run):
    "Runs a command that is wrong: the one line that answers it."
    def refused(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and out == '' and len(err.splitlines()) == 1, (code, out, err)
        return err
    return refused


def lines(path): return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tree(folder):
    "All files below a folder and what they hold."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*'))
            if p.is_file()}


# Output over input


def test_no_output_over_an_input(home, refused, network):
    shutil.copy(network, 'net.safetensors')
    shutil.copy(network.with_suffix('.json'), 'net.json')
    os.link('photo.png', 'second.json')
    Path('link.json').symlink_to('photo.png')
    Path('link.svg').symlink_to('photo.png')
    with zipfile.ZipFile('album.zip', 'w') as archive: archive.write('photo.png')
    shutil.copy('album.zip', 'packed')
    before = tree(home)
    net = '-c', 'net.safetensors'
    for given in (['photo.png', '-o', 'photo.png'], ['photo.png', '--draw', 'photo.png'],
                  ['photo.png', '-o', 'second.json'], ['photo.png', '-o', 'link.json'],
                  ['photo.png', '--draw', 'link.svg'], ['photo.png', '--jsonl', 'photo.png'],
                  ['photo.png', '--draw', f'../{home.name}/album/../photo.png'],
                  ['photo.png', '-o', 'net.json'], ['photo.png', '-o', 'net.safetensors'],
                  ['photo.png', '--jsonl', 'second.json'],
                  ['photo.png', '--jsonl', 'o.jsonl', '--draw', 'link.svg'],
                  ['album', '--jsonl', 'album/a.png'], ['album', '--jsonl', 'album'],
                  ['album', '--jsonl', 'net.json'],
                  ['album', '--jsonl', 'o.jsonl', '--draw', 'photo.png'],
                  ['album.zip', '--jsonl', 'album.zip'], ['packed', '--jsonl', 'packed'],
                  ['photo.png', 'album/a.png', '--jsonl', 'second.json'],
                  ['photo.png', '-o', 'album'], ['photo.png', '--draw', 'album'],
                  ['photo.png', '-o', 'same.json', '--draw', 'same.json'],
                  ['photo.png', '-o', 'photo.png/x.json'], ['photo.png', '-o', '/dev/null'],
                  ['photo.png', '-o', 'x' * 300]):
        refused('predict', *given, *net)
        assert tree(home) == before, given
    assert Path('link.json').is_symlink() and Path('/dev/null').is_char_device()


def test_no_output_over_what_others_wrote(home, refused):
    Image.new('RGB', (9, 9)).save('theirs.png')
    Path('notes.txt').write_text('milk, bread')  # no end of line
    Path('half.txt').write_text('{"file')
    Path('numbers.json').write_text('{"a": 1}')
    Path('deep.json').write_text('[' * 100_000)
    Path('theirs.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Path('theirs.pdf').write_bytes(b'%PDF-1.4 theirs')
    Path('binary.bin').write_bytes(bytes(range(256)))
    Path('rows.jsonl').write_text('{"file": ["a"]}\n')
    Path('alien.jsonl').write_text('{"file": "a.png"}\n')
    before = tree(home)
    for name in ('notes.txt', 'half.txt', 'numbers.json', 'deep.json', 'binary.bin', 'alien.jsonl'):
        said = refused('predict', 'photo.png', '-o', name)
        assert f'{name} exists and is not a graph of stdg' in said and 'remove it' in said
        assert name in refused('predict', 'album', '--jsonl', name)
        assert name in refused('predict', 'photo.png', '--jsonl', name)
    assert 'no line of `stdg predict`' in refused('predict', 'album', '--jsonl', 'rows.jsonl')
    for name in ('theirs.png', 'theirs.svg', 'theirs.pdf'):
        assert 'is not a drawing of stdg' in refused('predict', 'photo.png', '--draw', name)
        refused('predict', 'photo.png', '--jsonl', 'o.jsonl', '--draw', name)
    assert 'JSON is written there' in refused('predict', 'album', '--jsonl', 'new.svg')
    assert 'drawn into a folder' in refused('predict', 'album', '--jsonl', 'o.jsonl', '--draw',
                                            'theirs.svg')
    assert tree(home) == before


def test_the_same_command_may_be_given_again(home, run):
    one = 'predict', 'photo.png', '-o', 'graph.json', '--draw'
    for drawing in ('graph.svg', 'graph.png', 'graph.pdf'):
        assert run(*one, drawing)[0] == run(*one, drawing)[0] == 0 and drawn_here(drawing)
    assert run('predict', 'album/a.png', *one[2:], 'graph.svg')[0] == 0
    assert json.loads(Path('graph.json').read_text())['file'] == 'album/a.png'
    many = 'predict', 'album', '--jsonl', 'o.jsonl', '--draw', 'drawn'
    assert run(*many)[0] == 0
    Path('o.jsonl').unlink()
    assert run(*many)[0] == 0 and len(lines('o.jsonl')) == 2
    # what earlier versions drew has no mark
    text = Path('drawn/a.png.svg').read_text()
    Path('drawn/a.png.svg').write_text(text.replace('<dc:title>stdg<', '<dc:title>Matplotlib<'))
    assert drawn_here('drawn/a.png.svg')
    # an empty file holds nothing; behind a link is the file
    Path('deep').mkdir()
    for name in ('deep/empty.json', 'deep/empty.jsonl'): Path(name).touch()
    Path('to.json').symlink_to('deep/empty.json')
    assert run('predict', 'photo.png', '-o', 'to.json')[0] == 0 and Path('to.json').is_symlink()
    assert json.loads(Path('deep/empty.json').read_text())['file'] == 'photo.png'
    Path('to.jsonl').symlink_to('deep/empty.jsonl')
    assert run('predict', 'album', '--jsonl', 'to.jsonl')[0] == 0 and Path('to.jsonl').is_symlink()
    assert len(lines('deep/empty.jsonl')) == 2


def test_one_picture_with_lines_and_a_drawing(home, run, quick):
    "The drawing is a file if it is named like one, else it lies in a folder."
    assert run('predict', 'photo.png', '--jsonl', 'o.jsonl', '--draw', 'out.svg')[0] == 0
    assert Path('out.svg').is_file() and drawn_here('out.svg')
    assert run('predict', 'photo.png', '--jsonl', 'p.jsonl', '--draw', 'drawn')[0] == 0
    assert Path('drawn/photo.png.svg').is_file()


def test_drawings_stay_in_their_folder(home, run, quick):
    (home/'work').mkdir()
    os.chdir('work')
    given = ['../photo.png', str(home/'photo.png'), '../album/../photo.png', '../album/a.png',
             'sub/a.png', '../sub/a.png']
    picture('sub/a.png')
    picture('../sub/a.png')
    before = tree(home)
    assert run('predict', *given, '--jsonl', 'o.jsonl', '--draw', 'drawn')[0] == 0
    new = set(tree(home)) - set(before) - {'work/o.jsonl'}
    assert len(new) == len(given) and all(name.startswith('work/drawn/') for name in new)
    # a link in the folder leads out of it, and a file of others is left alone
    shutil.rmtree('drawn')
    Path('o.jsonl').unlink()
    Path('drawn').mkdir()
    Path('drawn/sub').symlink_to(home/'album')
    Path('drawn/photo.png.svg').write_text('mine')
    code, _, err = run('predict', '../photo.png', 'sub/a.png', '../album/a.png', '--jsonl',
                       'o.jsonl', '--draw', 'drawn')
    assert code == 1 and 'leads out of' in err and 'is not a drawing of stdg' in err
    assert Path('drawn/photo.png.svg').read_text() == 'mine'
    assert sorted(p.name for p in (home/'album').iterdir()) == ['a.png', 'b.png']
    assert [record['file'] for record in lines('o.jsonl') if 'error' not in record] == [
        '../album/a.png']


def test_a_video_is_not_drawn_over(home, run, refused):
    cv2 = pytest.importorskip('cv2')
    clip = cv2.VideoWriter('d.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 10., (96, 64))
    for _ in range(2): clip.write(np.zeros((64, 96, 3), np.uint8))
    clip.release()
    shutil.copy('d.mp4', 'theirs.mp4')
    shutil.copy('d.mp4', 'd.jsonl')
    os.link('d.mp4', 'again.mp4')
    Path('notes.jsonl').write_text('{"file": "a.png"}\n')
    before = tree(home)
    for given in (['--draw', 'd.mp4'], ['--draw', 'again.mp4'], ['--draw', './album/../d.mp4'],
                  ['--jsonl', 'd.mp4'], ['--draw', 'theirs.mp4'], ['--jsonl', 'd.jsonl'],
                  ['--jsonl', 'notes.jsonl'], ['--draw', 'album'], ['--draw', 'x.gif'],
                  ['--jsonl', 'x.jsonl', '--draw', 'theirs.mp4'],
                  ['--draw', 'new.mp4', '--every', '0'], ['--draw', 'new.mp4', '--over', '-1'],
                  ['--draw', 'new.mp4', '--over', 'inf']):
        refused('video', 'd.mp4', *given)
        assert tree(home) == before, given
    assert 'stdg predict for a folder' in refused('video', 'album', '--jsonl', 'x.jsonl')
    assert 'photo.png is no video' in refused('video', 'photo.png', '--jsonl', 'x.jsonl')
    assert tree(home) == before
    for _ in range(2):
        assert run('video', 'd.mp4', '--jsonl', 'v.jsonl', '--draw', 'v.mp4')[0] == 0
    assert 'is read here' in refused('video', 'v.mp4', '--draw', 'v.mp4')
    assert 'v.jsonl, line 1: no line' in refused('predict', 'album', '--jsonl', 'v.jsonl')


# Half lines and whole ones


def test_a_whole_last_line_without_its_end_stays(home, run):
    assert run('predict', 'album', '--jsonl', 'o.jsonl')[0] == 0
    whole = Path('o.jsonl').read_text()
    first, second = whole.splitlines(True)
    for text, kept in ((whole[:-1], 2), (first[:-1], 1), (first + second[:-9], 1), (first + '{', 1),
                       (first[:50], 0), (first + '\0\0\0', 1), (whole + '\n', 2)):
        Path('o.jsonl').write_text(text)
        assert run('predict', 'album', '--jsonl', 'o.jsonl')[1].endswith(
            f'{2 - kept} pictures done\n')
        assert Path('o.jsonl').read_text() == whole
    Path('o.jsonl').write_text(whole.replace('\n', '\r\n'))  # saved by an editor
    assert '0 pictures done' in run('predict', 'album', '--jsonl', 'o.jsonl')[1]
    assert lines('o.jsonl') == [json.loads(first), json.loads(second)]


# One odd thing


def test_odd_names_do_not_stop_the_rest(home, run, quick):
    album = os.fsencode(home/'album')
    for name in (b'\xff\xfe.png', b'two\nlines.png', b'BIG.PNG', b'\xe2\x98\x95.png',
                 b'n' * 246 + b'.png', b'\x1b[31m.png'):
        shutil.copy(b'photo.png', album + b'/' + name)
    Path('album/empty.png').touch()
    Path('album/loop.png').symlink_to('loop.png')
    Path('album/dangling.png').symlink_to('nowhere.png')
    Path('album/outside.png').symlink_to(home/'photo.png')
    Path('album/pipe.jpg').symlink_to('/dev/null')
    Path('album/ring').symlink_to('.')
    os.mkfifo('album/fifo.png')
    for name in ('notes.txt', 'c.heic', 'D.HEIC', 'README'): Path('album', name).write_text('x')
    code, out, err = run('predict', 'album', '--jsonl', 'o.jsonl', '--draw', 'drawn')
    good = {'a.png', 'b.png', 'two\nlines.png', 'BIG.PNG', '☕.png', 'n' * 246 + '.png',
            '\x1b[31m.png'}
    records = lines('o.jsonl')
    done = {record['file'] for record in records if 'error' not in record}
    assert done - {'\udcff\udcfe.png'} == good
    assert code == 1 and 'left out: 2 .heic, 1 .txt, 1 without an ending' in err
    failed = len(records) - len(done)
    assert f'{len(done)} pictures done, {failed} failed' in out
    for name in ('empty.png', 'loop.png', 'dangling.png', 'outside.png', 'pipe.jpg', 'ring',
                 'fifo.png'):
        assert [r['file'] for r in records if 'error' in r].count(name) == 1 and f'{name}:' in err
    assert '\x1b' not in err.replace('\x1b[A', '') and len(list(Path('drawn').rglob('*.svg'))) == len(done)
    assert '0 pictures done' in run('predict', 'album', '--jsonl', 'o.jsonl')[1]
    # given by name, whatever the name
    odd = os.fsdecode(album + b'/\xff\xfe.png')
    code, _, err = run('predict', odd, 'album/two\nlines.png', 'album/empty.png', 'none.png',
                       '--jsonl', 'p.jsonl', '--draw', 'drawn2')
    assert code == 1 and [record['file'] for record in lines('p.jsonl') if 'error' not in record] == [
        odd, 'album/two\nlines.png']
    assert run('predict', odd, '-o', 'odd.json')[0] == 0
    assert json.loads(Path('odd.json').read_text())['file'] == odd
    assert run('predict', odd)[0] == 0


def test_an_unreadable_subfolder_is_reported(home, run, monkeypatch):
    picture('album/deeper/c.png')
    listing = os.scandir
    def scandir(path):
        if str(path).endswith('deeper'): raise PermissionError(13, 'Permission denied', str(path))
        return listing(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    code, out, err = run('predict', 'album', '--jsonl', 'o.jsonl')
    assert code == 1 and '2 pictures done, 1 failed' in out
    assert 'deeper: it is refused: it cannot be listed (Permission denied)' in err


def test_a_folder_without_pictures_fails(home, refused):
    Path('none').mkdir()
    assert 'none holds no pictures' in refused('predict', 'none', '--jsonl', 'o.jsonl')
    for name in ('a.heic', 'b.HEIC', 'c.txt'): Path('none', name).touch()
    assert 'left out: 2 .heic, 1 .txt' in refused('predict', 'none', '--jsonl', 'o.jsonl')
    with zipfile.ZipFile('none.zip', 'w') as archive:
        archive.writestr('x.txt', 'x')
        archive.writestr('__MACOSX/._a.jpg', 'x')
    assert 'left out: 1 .txt' in refused('predict', 'none.zip', '--jsonl', 'o.jsonl')
    Path('links').mkdir()
    Path('links/a.png').symlink_to(home/'photo.png')
    said = refused('predict', 'links', '--jsonl', 'o.jsonl')
    assert 'holds no pictures' in said and '1 refused (a.png: it lies outside' in said
    with pytest.raises(ValueError, match='left out: 2 .heic, 1 .txt'): stdg.predict('none', STDG('small'))
    assert not Path('o.jsonl').exists()


def test_an_archive_with_odd_members(home, run, quick):
    with zipfile.ZipFile('odd.ZIP', 'w') as archive:
        for name in ('a.png', 'deep/B.PNG', 'a//c.png', 'x' * 300 + '.png'):
            archive.write('photo.png', name)
        archive.write('photo.png', '../out.png')
        archive.writestr('empty.jpg', '')
        archive.writestr('__MACOSX/._a.png', 'resource')
        archive.writestr('notes.txt', 'x')
    code, out, err = run('predict', 'odd.ZIP', '--jsonl', 'o.jsonl', '--draw', 'drawn')
    assert code == 1 and '4 pictures done, 2 failed' in out and 'left out: 1 .txt' in err
    assert len(list(Path('drawn').rglob('*.svg'))) == 4 and not Path('out.png.svg').exists()


def test_archives_that_are_none(home, refused, run, network):
    Path('x.tar').write_bytes(b'x' * 512)
    Path('tarred').write_bytes(b'x' * 512)
    with pytest.raises(ValueError, match='tarred is neither a folder nor a zip archive'):
        open_sources('tarred')
    assert [source.path.name for source in open_sources('album')] == ['album']  # no list of letters
    Path('cut.zip').write_bytes(b'PK\x03\x04')
    assert 'not a whole zip archive' in refused('predict', 'cut.zip', '--jsonl', 'o.jsonl')
    with zipfile.ZipFile('odd.zip', 'w') as archive:
        archive.write('photo.png', 'é.png')
        link = zipfile.ZipInfo('linked')
        link.external_attr = 0o120777 << 16
        archive.writestr(link, '/etc')
    code, out, err = run('predict', 'odd.zip', '--jsonl', 'o.jsonl')
    assert code == 1 and '1 pictures done, 1 failed' in out
    assert 'linked: it is refused: it is a link' in err and 'left out' not in err
    with pytest.warns(UserWarning, match='linked: it is refused'):
        assert [p.name for p in stdg.predict('odd.zip', network)] == ['é.png']
    data = Path('odd.zip').read_bytes().replace('é'.encode(), b'\xff\xff')
    Path('odd.zip').write_bytes(data)
    said = refused('predict', 'odd.zip', '--jsonl', 'p.jsonl')
    assert 'is marked as UTF-8 and is not. Unpack it' in said


def test_what_fails_in_any_way_is_one_picture(home, run, monkeypatch, network):
    "A reader, the network or the writing may fail in ways that nobody foresaw."
    for name in ('c.png', 'd.png'): picture(f'album/{name}')
    read, ask, graph = predictor.read_member, predictor.Predictor.__call__, PicturePrediction.graph
    def odd_read(source, name):
        if name == 'a.png': raise MemoryError('a million layers')
        return read(source, name)
    def odd_ask(self, pictures, names=None):
        if 'b.png' in (names or ()): raise RuntimeError('out of memory')
        return ask(self, pictures, names)
    def odd_graph(self, *args, **options):
        if self.name == 'c.png': raise ZeroDivisionError('a box without area')
        return graph(self, *args, **options)
    monkeypatch.setattr(cli, 'read_member', odd_read)
    monkeypatch.setattr(predictor.Predictor, '__call__', odd_ask)
    monkeypatch.setattr(PicturePrediction, 'graph', odd_graph)
    code, out, err = run('predict', 'album', '--jsonl', 'o.jsonl')
    assert code == 1 and '1 pictures done, 3 failed' in out
    assert 'a.png: it cannot be read (a million layers)' in err
    assert 'b.png: the network fails on it (out of memory)' in err
    assert 'c.png: its graph cannot be drawn or written (a box without area)' in err
    assert [r['file'] for r in lines('o.jsonl') if 'error' not in r] == ['d.png']
    with pytest.warns(UserWarning, match='1 could not be read and are left out, 3 are predicted; b.png'):
        assert [p.name for p in stdg.predict('album', network)] == ['a.png', 'c.png', 'd.png']


# One line for a mistake


@pytest.mark.parametrize('option, values', [
    ('--size', ('-5', '0', '1', '31', '100000', '96.5', 'big', '', 'nan')),
    ('--top', ('-1', '0', 'nan', '2.5')),
    ('--batch-size', ('0', '-3', 'x')),
    ('--min-score', ('2', 'nan', '-.1', 'inf', 'high')), ('--min-object', ('1.5', 'nan'))])
def test_numbers(home, refused, option, values):
    for value in values:
        said = refused('predict', 'album', '--jsonl', 'o.jsonl', option, value)
        assert option in said and repr(value) in said, said
    assert not Path('o.jsonl').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='it asks for a GPU where there is none')
@pytest.mark.parametrize('device', ['cuda', 'cuda:0', 'gpu', '0', 'tpu', 'cuda:-1'])
def test_devices(home, refused, device):
    said = refused('predict', 'photo.png', '--device', device)
    assert 'device' in said.lower() or 'gpu' in said.lower() or 'cuda' in said.lower()


def test_advice(home, refused, run, network, tmp_path):
    Image.new('RGB', (40, 30)).save('photo.tif')
    Path('x.tar.gz').write_bytes(b'\x1f\x8b')
    Path('clip.mp4').write_bytes(b'0000ftyp')
    code, _, err = run('predict', 'photo.tif', '--jsonl', 'tif.jsonl')
    assert code == 1 and 'photo.tif: ' in err and 'none of JPEG' in err and 'zip' not in err
    for more in ((), ('--jsonl', 'o.jsonl')):
        assert 'of archives only .zip is read' in refused('predict', 'x.tar.gz', *more)
        assert 'for these there is stdg video' in refused('predict', 'clip.mp4', *more)
        assert 'nowhere is missing. Is the path right?' in refused('predict', 'nowhere', *more)
        said = refused('predict', 'photo.png', '-c', 'wrong.safetensors', *more)
        assert 'wrong.safetensors is missing. Is the path right?' in said and 'copy' not in said
    assert 'is a folder. Give the name of a file in it' in refused('predict', 'photo.png', '-o', 'album')
    assert 'give one folder or archive, or several pictures' in refused(
        'predict', 'photo.png', 'album', '--jsonl', 'o.jsonl')
    shutil.copy(network, 'net.safetensors')
    assert 'is a folder without model.safetensors. Give one of its files: net.safetensors' in refused(
        'predict', 'photo.png', '-c', '.')
    assert 'net.safetensors meant' in refused('predict', 'photo.png', '-c', 'net')
    assert 'nothing can be written in' in refused('predict', 'album', '--jsonl', 'o.jsonl', '--draw',
                                                  '/proc/drawn')
    assert 'nothing can be written in' in refused('predict', 'album', '--jsonl', '/proc/x/o.jsonl')
    for command in ('predict', 'video', 'train', 'prepare', 'released'):
        assert command in refused('frobnicate')
    for empty in (['', '--jsonl', 'o.jsonl'], ['photo.png', '-o', ''], ['photo.png', '-c', ''],
                  ['album', '--jsonl', ''], ['photo.png', '--draw', '']):
        assert 'the name is empty' in refused('predict', *empty)
    assert 'two\\nlines' in refused('predict', 'two\nlines') or 'two lines is missing' in refused(
        'predict', 'two\nlines')


def test_text_where_a_list_is_meant(home, network):
    "One path or name is not as many as it has letters."
    for one in (str(network), network, [network], {'name': network}):
        assert arguments(checkpoints=one)[1] == '1 network.'
    assert cli.listed('photo.png')[0] == cli.listed(['photo.png'])[0] == ['photo.png']
    assert cli.listed('album')[0] == cli.listed(Path('album'))[0] == ['a.png', 'b.png']
    writer = cli.Writer(predictor.load_predictor(network), top=2)
    assert cli.predict_many('album', predictor.load_predictor(network), 'o.jsonl', writer,
                            progress=False) == (2, 0)
    for names in (('cup', ['on']), (['cup'], 'on')):
        with pytest.raises(ValueError, match='a list of names is needed'): Vocabulary(*names)


def test_two_that_write_the_same_lines_take_turns(home, network):
    "Real processes, begun together: every picture stands there once, and no lock is left."
    command = [sys.executable, '-m', 'stdg.cli', 'predict', 'album', '--jsonl', 'o.jsonl', '-c',
               str(network), '--top', '1', '--min-object', '.99']
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(record['file'] for record in lines('o.jsonl')) == ['a.png', 'b.png']
    assert sorted(out.split(': ')[1].split()[0] for out, _ in said) == ['0', '2']
    assert not list(home.glob('.*'))


def test_a_predictor_has_its_size_and_device(network):
    ready = predictor.load_predictor(network, device='cpu')
    assert predictor.load_predictor(ready, 96, 'cpu') is ready is predictor.load_predictor(ready)
    with pytest.raises(ValueError, match='this Predictor has size 96 on cpu'):
        predictor.load_predictor(ready, 64)


def test_names_and_labels_cannot_steer_a_terminal(home, run, network, capsys):
    code, out, _ = run('predict', 'photo.png', '--top', '50')
    assert code == 0 and '[31mred' in out and '\x1b' not in out
    shutil.copy('photo.png', '\x1b[2J.png')
    Path('\x1b[2J.png').write_bytes(b'')
    assert '\x1b' not in run('predict', '\x1b[2J.png')[2]
    assert '\x1b' not in run('predict', 'photo.png', '-o', '\x1b/\x1b.json')[1]
    shutil.copy('photo.png', '\x1b[31m.png')
    assert '\x1b' not in repr(stdg.predict('\x1b[31m.png', network))


# Processes


def test_pipes_and_interrupts(home, network):
    "A reader that goes away, Ctrl-C, and a terminal that cannot show every letter."
    env = dict(os.environ, PYTHONIOENCODING='ascii', PYTHONUNBUFFERED='')
    command = [sys.executable, '-m', 'stdg.cli', 'predict', '-c', str(network)]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.Popen([*command, 'photo.png'], stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert gone.communicate(timeout=100)[1] == b'' and gone.returncode == 141
    for i in range(300): picture(f'album/more{i:03}.png')
    stopped = subprocess.Popen([*command, 'album', '--jsonl', 'o.jsonl', '--batch-size', '1'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
                               # a shell starts what it puts into the background deaf to Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while stopped.poll() is None and not (Path('o.jsonl').exists()
                                          and Path('o.jsonl').stat().st_size):
        time.sleep(.01)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=100)
    assert stopped.returncode == 130 and 'Traceback' not in err and 'stdg predict: stopped' in err
    assert 0 < len(lines('o.jsonl')) < 302
