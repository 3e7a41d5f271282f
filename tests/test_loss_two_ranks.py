"""Two real processes that share a batch learn what one process learns from all of it.

This file is also the program of each rank: `python tests/test_loss_two_ranks.py RANK FOLDER`.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from grpo.loss import OBJECTIVES, batch_counts, policy_loss

# Six sequences, dealt unevenly; and so that the second rank has nothing, yet takes part.
SHARES = {"uneven": ([0, 1, 2, 3], [4, 5]), "nothing": ([0, 1, 2, 3, 4, 5], [])}
VOCABULARY = 7


def random_batch(generator):
    """Tokens [S, T] that an older table of logits sampled, and what the loss needs besides."""
    shape = (6, 5)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0] = True

    def noisy(logp):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (logp + 0.3 * noise).masked_fill(~mask, float("nan"))

    token_ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    logp = policy_logits().detach().log_softmax(dim=0)[token_ids]
    advantages = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return {
        "token_ids": token_ids,
        "old_logp": noisy(logp),
        "ref_logp": noisy(logp),
        "advantages": advantages,
        "mask": mask,
    }


def policy_logits():
    """The policy, [V]: every token of every rank sends its gradient to every parameter."""
    return torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64, requires_grad=True)


def loss_gradient_stats(batch, rows, objective, token_count=None, sequence_count=None):
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    logits = policy_logits()
    loss, stats = policy_loss(
        logits.log_softmax(dim=0)[batch["token_ids"]],
        batch["old_logp"],
        batch["ref_logp"],
        batch["advantages"],
        batch["mask"],
        objective=objective,
        max_completion_tokens=9,
        kl_coef=0.3,
        token_count=token_count,
        sequence_count=sequence_count,
    )
    loss.backward()
    return loss.detach(), logits.grad, stats


def main(rank, folder):
    """What a rank does: sum the counts, one backward, sum gradients and statistics."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    batch = torch.load(folder / "batch.pt")
    results = {}
    for share, rows_of_ranks in SHARES.items():
        rows = rows_of_ranks[rank]
        counts = torch.stack(batch_counts(batch["mask"][rows]))
        dist.all_reduce(counts)
        for objective in OBJECTIVES:
            loss, gradient, stats = loss_gradient_stats(batch, rows, objective, *counts)
            for tensor in (loss, gradient, *stats.values()):
                dist.all_reduce(tensor)
            results[share, objective] = loss, gradient, stats
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def run_two_ranks(folder):
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), folder], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(folder / "results.pt")


def test_two_processes_equal_one(tmp_path):
    """Summed over ranks, with global counts: the loss, gradient and statistics of one process.

    The mean over ranks of each rank's own mean is what data parallelism gives if nobody thinks of
    it. The last assertion checks that it differs here, so that this test could fail.
    """
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"TEST_SEED={seed}")
    batch = random_batch(torch.Generator().manual_seed(seed))
    torch.save(batch, tmp_path / "batch.pt")
    results = run_two_ranks(tmp_path)
    everything = list(range(6))
    for (_, objective), result in results.items():
        expected = loss_gradient_stats(batch, everything, objective)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    assert results.keys() == {(share, objective) for share in SHARES for objective in OBJECTIVES}

    local = [loss_gradient_stats(batch, rows, "dapo")[1] for rows in SHARES["uneven"]]
    whole = loss_gradient_stats(batch, everything, "dapo")[1]
    assert not torch.allclose(torch.stack(local).mean(dim=0), whole, rtol=1e-3)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
