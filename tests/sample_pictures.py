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
FORK = multiprocessing.get_context(
    'fork') if 'fork' in multiprocessing.get_all_start_methods() else None


def forks(test):
    return pytest.mark.skipif(FORK is None,
                              reason='this system cannot fork')(
        pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')(test))


def saved(picture, kind='JPEG', **options):
    picture.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def small(i, size=(40, 30)):
    "A smooth picture that no other number has."
    rows, cols = np.mgrid[:size[1], :size[0]]
    return Image.fromarray(np.stack([rows * 4 + i, cols * 3 + 5 * i, 200 - 2 * rows + i],
                                    -1).astype(np.uint8))


def zipped(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w', method) as file:
        warnings.simplefilter('ignore')  # of a name that occurs twice
        for name, data in members: file.writestr(name, data)
    return path
