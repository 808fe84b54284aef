"""What holds for every test."""
import os

import torch


def _whole_pool():
    """A forked process gets its thread pool here, while it has one thread. Otherwise the first two threads that compute
    with torch make it at once, and one of them may find none ("Invalid thread pool!")."""
    torch.set_num_threads(torch.get_num_threads())


if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=_whole_pool)
