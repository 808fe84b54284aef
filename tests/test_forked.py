"""Processes that the tests fork from their own."""
import os
import threading

import pytest
import torch


def _computed_at_once(threads=4):
    "Whether several threads at once can begin to compute with torch."
    failed, gate = [], threading.Barrier(threads)
    def compute():
        gate.wait()
        try: torch.ones(100000).add_(1).sum()
        except RuntimeError as error: failed.append(error)
    working = [threading.Thread(target=compute) for _ in range(threads)]
    for thread in working: thread.start()
    for thread in working: thread.join()
    return not failed


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_threads_of_a_forked_process_have_one_pool():
    "One of seven such processes ended with a thread that had no pool, before `conftest` made it."
    torch.set_num_threads(torch.get_num_threads())  # this process has a pool, which no child can use
    for _ in range(60):
        child = os.fork()
        if child == 0: os._exit(not _computed_at_once())
        assert os.waitpid(child, 0)[1] == 0, 'a thread had no pool to compute with'
