"""The page for one's own pictures: the command in a process of its own, requests of strangers, what is too long or
never comes, and a visit with a real browser where there is one ($STDG_SCREENSHOTS: the folder for pictures of it)."""
import http.client
import io
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import _become
from PIL import Image

from stdg.graph import Vocabulary
from stdg.inference import demo
from stdg.inference.demo import Album, DemoServer
from stdg.inference.predictor import load_predictor
from stdg.model import STDG
from stdg.testing import loud, toy_scene

NAMES = Vocabulary(['<script>document.title="hacked"</script>', '"><img src=x onerror=alert(1)>', 'cup'],
                   ['</style><b>on', 'by'])
KIND = {'Content-Type': 'multipart/form-data; boundary=edge'}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    torch.manual_seed(0)
    network = loud(STDG('small', n_objects=3, n_predicates=2, pretrained=False, fpn=16, channels=16))
    network.save(folder/'net.safetensors', vocabulary=NAMES.to_json(), size=64,
                 thresholds=dict(objects=.2, triplets=.01))
    for i, name in enumerate(('first.png', 'a <b>&"\u202e.png')):
        Image.fromarray(toy_scene(i)[1]['image']).resize((320, 320)).save(folder/name)
    return folder


@pytest.fixture(scope='module')
def server(work):
    with DemoServer(Album(load_predictor(work/'net.safetensors'), [work/'first.png'], keep=3)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(port, path, method='GET', body=None, **headers):
    "(status, headers, text) of an answer."
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
    link.request(method, path, body, {name.replace('_', '-'): value for name, value in headers.items()})
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    return answer.status, answer.headers, text


def form(data, name='a.png'):
    head = f'Content-Disposition: form-data; name="picture"; filename="{name}"\r\nContent-Type: image/png'
    return f'--edge\r\n{head}\r\n\r\n'.encode() + data + b'\r\n--edge--\r\n'


def send(server, data, name='a.png', **headers):
    return ask(server.server_port, f'/{server.token}/', 'POST', form(data, name), **KIND, **headers)


def wrong(text):
    "The one line in a page that says what is wrong."
    line, = re.findall('<p class="wrong">([^\n]*?)</p>', text)
    return line


def _listening(pid):
    "Addresses at which a process listens."
    inodes = {os.readlink(fd) for fd in Path(f'/proc/{pid}/fd').glob('*')}
    lines = [line for table in ('tcp', 'tcp6') for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]]
    rows = [line.split() for line in lines]
    return {row[1].split(':')[0] for row in rows if row[3] == '0A' and f'socket:[{row[9]}]' in inodes}


@pytest.mark.skipif(not Path('/proc/net/tcp').exists(), reason='the list of sockets is in /proc, on Linux')
def test_the_command(work):
    "Its address, its socket, a picture from the beginning, one too large, and Ctrl-C."
    (out, into), errors = os.pipe(), open(work/'errors', 'wb')
    pid = os.fork()
    if pid == 0:
        _become(['-m', 'stdg.cli', 'demo', 'first.png', '-c', 'net.safetensors', '--no-browser'], work,
                dict(os.environ), into, errors.fileno())
    os.close(into)
    try:
        with os.fdopen(out, encoding='utf-8') as said:
            url = said.readline().strip()
            port, token, number = re.fullmatch(r'http://127\.0\.0\.1:(\d+)/([\w-]{32})/(\d)', url).groups()
            assert 'for you alone' in said.readline() and number == '1'
            assert _listening(pid) == {'0100007F'}
            status, headers, text = ask(int(port), f'/{token}/1')
            assert status == 200 and 'first.png' in text and text.count('<tr>') > 3
            assert ask(int(port), f'/{"x" * 32}/1')[0] == 404
            status, _, text = ask(int(port), f'/{token}/', 'POST', bytes(demo.MAX_UPLOAD + 1), **KIND)
            assert status == 413 and wrong(text) == 'this file is larger than 32 MB. Scale it down first'
            os.kill(pid, signal.SIGINT)
            assert said.read() == 'stdg demo: ended\n'
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert status == 0 and (work/'errors').read_bytes() == b''


def test_a_browser_is_opened_when_the_page_is_there(work, monkeypatch, capsys):
    seen = []

    def browse(url):
        port, path = re.fullmatch(r'http://127.0.0.1:(\d+)(/.*)', url).groups()
        seen.append(ask(int(port), path)[0])
        return False  # as if there were none

    def serve(server):
        server.timeout, end = .1, time.monotonic() + 100
        while time.monotonic() < end and not (seen and told()): server.handle_request()
        raise KeyboardInterrupt

    said = []

    def told():
        said.append(capsys.readouterr().err)
        return any(said)

    monkeypatch.setattr(demo.webbrowser, 'open', browse)
    monkeypatch.setattr(DemoServer, 'serve_forever', serve)
    demo.main([str(work/'first.png'), '-c', str(work/'net.safetensors')])
    assert seen == [200] and capsys.readouterr().out == 'stdg demo: ended\n'
    assert ''.join(said) == 'stdg demo: no browser opens here. Open the address yourself\n'


def test_pictures_and_their_faults(server, work):
    sound = (work/'first.png').read_bytes()
    status, headers, _ = send(server, sound, 'größe <b>.png')
    assert status == 303
    status, _, text = ask(server.server_port, headers['Location'])
    assert status == 200 and '<h1>größe &lt;b&gt;.png</h1>' in text and 'of a picture of 320 x 320 pixels' in text
    for sign in ('<script', '<b>', 'onerror=alert(1)>', '<img src=x', '</style><b'): assert sign not in text
    all_rows, few = text.count('<tr>'), ask(server.server_port, headers['Location'] + '?top=2')[2]
    assert all_rows > 3 == few.count('<tr>')
    assert 'no relations' in ask(server.server_port, headers['Location'] + '?min_score=1&min_object=1')[2]

    Image.new('1', (8001, 8001)).save(huge := io.BytesIO(), 'PNG', compress_level=1)
    Image.new('RGB', (8, 8)).save(gif := io.BytesIO(), 'GIF')
    for data, said in ((b'', 'no picture was sent, or an empty file'), (sound[:300], 'the picture is not read'),
                       (gif.getvalue(), 'none of JPEG, PNG, WEBP, BMP'), (huge.getvalue(), 'Scale it down first'),
                       (b'<svg onload=alert(1)>', 'none of JPEG, PNG, WEBP, BMP')):
        status, _, text = send(server, data, '<i>bad</i>')
        assert status == 400 and said in wrong(text) and '<i>' not in text, text
        assert 'bad' not in server.album.names.values()
    status, _, text = ask(server.server_port, f'/{server.token}/', 'POST', b'x=1',
                          Content_Type='application/x-www-form-urlencoded')
    assert status == 400 and 'Use the form of this page' in wrong(text)


def test_only_the_last_pictures_are_kept(server, work):
    sound = (work/'first.png').read_bytes()
    places = [send(server, sound, f'{i}.png')[1]['Location'] for i in range(4)]
    answers = [ask(server.server_port, place) for place in places]
    assert [status for status, *_ in answers] == [404, 200, 200, 200] and 'Send it again' in wrong(answers[0][2])
    assert len(server.album.found) == 3
    assert ask(server.server_port, f'/{server.token}/1')[0] == 200, 'a file is read again'


def test_strangers(server, work):
    port, own = server.server_port, f'http://127.0.0.1:{server.server_port}'
    home, sound = f'/{server.token}/', (work/'first.png').read_bytes()
    for host in ('evil.example', f'evil.example:{port}', f'127.0.0.1.evil.example:{port}', '127.0.0.1',
                 f'127.0.0.1:{port + 1}'):
        assert ask(port, home, Host=host)[0] == 421
        assert ask(port, home, 'POST', form(sound), Host=host, **KIND)[0] == 421
    assert ask(port, home, Host=f'localhost:{port}')[0] == 200
    for path in ('/', '//', f'/{server.token}', f'/{server.token}/1/2', f'/../{server.token}/', '/favicon.ico'):
        assert ask(port, path)[0] == 404
    before = dict(server.album.names)
    for headers in (dict(Origin='http://evil.example'), dict(Origin='null'), dict(Origin=f'http://localhost:{port}'),
                    dict(Sec_Fetch_Site='cross-site'), dict(Sec_Fetch_Site='same-site'), dict(Origin=own + '/')):
        status, _, text = send(server, sound, **headers)
        assert status == 403 and 'another page' in wrong(text), headers
    assert server.album.names == before
    assert send(server, sound, Origin=own, Sec_Fetch_Site='same-origin')[0] == 303
    assert ask(port, home + '1', 'POST', form(sound), **KIND)[0] == 404
    with socket.create_connection(('127.0.0.1', port), timeout=60) as raw:  # two names
        raw.sendall(f'GET {home} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\n\r\n'.encode())
        assert b' 421 ' in raw.recv(100)
    status, headers, text = ask(port, home)
    assert headers['Referrer-Policy'] == 'same-origin' and headers['X-Content-Type-Options'] == 'nosniff'
    policy = headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and 'script-src' not in policy
    assert not re.search(r'(src|href|action)="(?!/|data:)', text) and '<script' not in text


def test_what_is_too_short_or_never_comes(server, work, monkeypatch):
    "It does not hold up others."
    monkeypatch.setattr(demo._Handler, 'timeout', .5)
    port, home = server.server_port, f'/{server.token}/'
    head = f'POST {home} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n'
    idle = socket.create_connection(('127.0.0.1', port), timeout=60)  # as browsers open ahead
    slow = socket.create_connection(('127.0.0.1', port), timeout=60)
    slow.sendall(f'{head}Content-Length: 1000\r\n\r\nhalf'.encode())
    assert ask(port, home)[0] == 200
    answer = slow.makefile('rb').read().decode()
    assert ' 408 ' in answer and wrong(answer) == 'the picture did not arrive whole. Send it again'
    assert idle.recv(100) == b'', 'it is hung up'
    with socket.create_connection(('127.0.0.1', port), timeout=60) as short:
        short.sendall(f'{head}Content-Length: 1000\r\n\r\nhalf'.encode())
        short.shutdown(socket.SHUT_WR)
        assert b' 408 ' in short.recv(100)
    for more, status in (('', 411), ('Content-Length: -1\r\n', 411), ('Content-Length: x\r\n', 411),
                         ('Transfer-Encoding: chunked\r\nContent-Length: 3\r\n', 411)):
        with socket.create_connection(('127.0.0.1', port), timeout=60) as raw:
            raw.sendall(f'{head}{more}\r\n'.encode())
            assert f' {status} '.encode() in raw.recv(100)
    for one in (idle, slow): one.close()
    with socket.create_connection(('127.0.0.1', port), timeout=60) as gone:
        gone.sendall(f'GET {home}1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n'.encode())
    assert ask(port, home)[0] == 200, 'and one that has gone away'


def test_the_network_fails(work, monkeypatch):
    album = Album(load_predictor(work/'net.safetensors'))
    monkeypatch.setattr(album, 'network', lambda pictures, names: 1 / 0)
    with DemoServer(album) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status, _, text = send(server, (work/'first.png').read_bytes())
        assert status == 400 and 'division by zero' in wrong(text) and not album.names
        server.shutdown()


def test_a_visit_with_a_browser(server, work, tmp_path):
    "A file is chosen and sent, thresholds are changed; no name of a stranger runs; on a wide and a narrow window"
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium or not shutil.which('chromedriver'): pytest.skip('no Chromium with chromedriver is here')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ('headless=new', 'no-sandbox', 'disable-gpu', 'window-size=1100,1000', 'no-first-run',
                     'disable-sync', 'disable-background-networking', 'disable-component-update',
                     'disable-dev-shm-usage', f'user-data-dir={tmp_path}'): options.add_argument(f'--{argument}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    shots = Path(os.environ.get('STDG_SCREENSHOTS') or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    one = lambda css: driver.find_element('css selector', css)

    def until(ready, seconds=120):
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, driver.page_source
            time.sleep(.1)
    try:
        driver.get(server.url)
        driver.save_screenshot(str(shots/'demo_home.png'))
        one('input[type=file]').send_keys(str(work/'a <b>&"\u202e.png'))
        one('button').click()
        until(lambda: re.search(r'/\d+$', driver.current_url))
        width = "const i = document.querySelector('img'); return i ? i.naturalWidth : 0"
        until(lambda: driver.execute_script(width) > 300)
        assert one('h1').text.startswith('a <b>&') and driver.title.endswith(': scene graph')
        rows = len(driver.find_elements('css selector', 'tbody tr'))
        assert rows > 3 and driver.execute_script('return document.scripts.length') == 0
        driver.save_screenshot(str(shots/'demo_picture.png'))
        field = one('input[name=top]')
        field.clear()
        field.send_keys('2')
        field.submit()
        until(lambda: 'top=2' in driver.current_url)
        assert len(driver.find_elements('css selector', 'tbody tr')) == 2
        driver.set_window_size(500, 1000)
        assert driver.execute_script('return document.body.scrollWidth <= window.innerWidth')
        driver.save_screenshot(str(shots/'demo_narrow.png'))
        odd = [entry['message'] for entry in driver.get_log('browser')
               if entry['level'] == 'SEVERE' and 'favicon' not in entry['message']]
        assert not odd, odd
    finally: driver.quit()
