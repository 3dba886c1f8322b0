"""Three ranks train one codebook, and end with it whether they were interrupted or not.

Three, since two add their gradients in the same order whatever the grouping.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codebook_state import Progress, load_progress, save_progress
from perceptio.depth.codebook_training import PARALLEL, Plan, Share, learn

RANKS, HALF = 3, 15
CONFIG = CodebookConfig(image_size=32, codes=16, dim=32, channels=(64, 64), residual_blocks=2, dead_below=4.0)
PLAN = Plan(steps=2 * HALF, batch=6, learning_rate=1e-3, seed=0, checkpoint_every=HALF)


def one_rank(rank: int, folder: Path) -> None:
    """Trains twice, the second time from the first one's state at half-way, and notes both digests."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    maps = torch.rand(40, 32, 32, generator=torch.Generator().manual_seed(rank))
    maps_RSS = (maps * 65535).to(torch.uint16)
    share, digests, resumed_at = Share(maps_RSS[:30], maps_RSS[30:], ()), [], []
    for run in range(2):
        torch.manual_seed(0)
        codebook = DepthCodebook(CONFIG, synchronised=True)
        model, optimizer = DistributedDataParallel(codebook, **PARALLEL), torch.optim.Adam(codebook.parameters())

        def save(
            progress: Progress, codebook: DepthCodebook = codebook, optimizer: torch.optim.Adam = optimizer
        ) -> None:
            if rank == 0:
                save_progress(folder, codebook, optimizer, progress)

        progress = load_progress(folder, codebook, optimizer) if run else Progress()
        resumed_at += progress.resumed_at
        dist.barrier()  # nobody trains, and so saves, while another one still reads
        learn(codebook, model, optimizer, share, PLAN, progress, save)
        digests.append(codebook.digest)
        dist.barrier()
    (folder / f"rank-{rank}.json").write_text(json.dumps({"digests": digests, "resumed_at": resumed_at}))
    dist.destroy_process_group()


def test_three_ranks_end_with_one_codebook_also_after_a_resume(tmp_path: Path) -> None:
    mp.spawn(one_rank, (tmp_path,), nprocs=RANKS)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    assert [rank["resumed_at"] for rank in found] == [[HALF]] * RANKS
    assert len({digest for rank in found for digest in rank["digests"]}) == 1
