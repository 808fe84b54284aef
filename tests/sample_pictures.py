"Pictures and archives that several tests make."
import io
import multiprocessing
import warnings
import zipfile

import numpy as np
import pytest
import skimage.data
from PIL import Image

CAT = Image.fromarray(skimage.data.chelsea())
CAN_FORK = 'fork' in multiprocessing.get_all_start_methods()
FORK = multiprocessing.get_context('fork') if CAN_FORK else None


def forks(test):
    "Mark a test that needs to fork."
    test = pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')(test)
    return pytest.mark.skipif(FORK is None, reason='this system cannot fork')(test)


def saved(picture, kind='JPEG', **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def small(i, size=(40, 30)):
    "A smooth picture that no other number has."
    rows, cols = np.mgrid[:size[1], :size[0]]
    channels = rows * 4 + i, cols * 3 + 5 * i, 200 - 2 * rows + i
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def zipped(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w', method) as file:
        warnings.simplefilter('ignore')  # of a name that occurs twice
        for name, data in members: file.writestr(name, data)
    return path
