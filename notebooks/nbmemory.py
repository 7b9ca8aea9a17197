"""`python nbmemory.py FOLDER`: MiB loaded and MiB that the process grew by, after each tensor of a checkpoint.

Linux only. Pages of a mapped file that are in memory count as memory of the process, as they should.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deepseek_v3 as ds  # noqa: E402

def resident():
    """MiB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

def watch(folder):
    """Load the checkpoint and print a line after each tensor."""
    loaded, before, copy = 0.0, None, ds.Checkpoint.copy_to

    def noted(self, name, weight, scale):
        nonlocal loaded, before
        copy(self, name, weight, scale)
        loaded += (weight.nbytes + (0 if scale is None else scale.nbytes)) / 2**20
        before = resident() - loaded if before is None else before  # what was there before the first tensor
        print(f"{loaded:.3f} {resident() - before:.3f}")

    ds.Checkpoint.copy_to = noted
    return ds.DeepseekV3ForCausalLM.from_pretrained(folder)

if __name__ == "__main__":
    watch(sys.argv[1])
