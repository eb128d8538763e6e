"""torchrun, all but the starting of its processes: those are forks of it (forked.py)."""

import forked
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

subprocess_handler.Popen = forked.Rank
run.main()
