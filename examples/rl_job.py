"""A reinforcement-learning job in small, with every kind of output that a large one has.

    skyrl-otel run -- python examples/rl_job.py

An entrypoint task drives two policy ranks (a small torch model, gradients averaged by gloo), a reference rank, a rollout
engine with a native child, and two environment workers of which one is killed by SIGKILL in the middle. Only what the
entrypoint prints belongs on the terminal; everything else is what one wants to find afterwards.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import ray

RANKS, STEPS, KILLED_AT = 2, 8, 4

# Stands in for a native inference server: C's buffered stdio, and write(2) on the descriptor behind it.
NATIVE_CHILD = """
import ctypes, os
libc = ctypes.CDLL(None)
for n in range(200):
    libc.puts(b"[engine] block %d allocated" % n)
    libc.fflush(None)
    os.write(2, b"[engine] warning: cache line %d evicted\\n" % n)
"""


class PolicyWorker:
    """A trainer rank: forward, backward, all-reduce, step."""

    def __init__(self, rank: int, port: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        import torch
        import torch.distributed as dist

        torch.manual_seed(0)
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.torch, self.dist = rank, torch, dist
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.03)
        print(f"rank {rank} of {RANKS} is ready, {sum(p.numel() for p in self.model.parameters())} parameters")

    def train(self, step: int, rewards: list[float]) -> float:
        """One update; returns the loss."""
        torch = self.torch
        inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        target = inputs.sum(dim=1, keepdim=True) * 0.1 + sum(rewards) / len(rewards)
        loss = torch.nn.functional.mse_loss(self.model(inputs), target)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.model.parameters():
            self.dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
        self.optimizer.step()
        logging.getLogger("policy").info("step %d: loss %.4f on rank %d", step, loss.item(), self.rank)
        return float(loss)


class RefWorker:
    """The reference model: only ever reads."""

    def __init__(self) -> None:
        os.environ.update(RANK="0", WORLD_SIZE="1")

    def log_probs(self, step: int) -> None:
        for chunk in range(20):
            print(f"ref: step {step} chunk {chunk} scored")


class RolloutWorker:
    """An inference engine with a native child process."""

    def generate(self, step: int) -> int:
        subprocess.run([sys.executable, "-c", NATIVE_CHILD], check=True)
        print(f"rollout: step {step}: 64 samples generated", file=sys.stderr)
        return 64


class EnvWorker:
    """Plays episodes in a thread of its own, and talks about them."""

    def __init__(self, number: int) -> None:
        self.number = number
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self) -> None:
        episode = 0
        while True:
            print(f"env {self.number}: episode {episode} reward {episode % 7 / 7:.2f}")
            episode += 1
            time.sleep(0.002)

    def rewards(self, step: int) -> list[float]:
        return [(step + n) % 5 / 5 for n in range(8)]

    def pid(self) -> int:
        return os.getpid()


def actor(cls: type, *args: Any) -> Any:
    return ray.remote(num_cpus=0)(cls).remote(*args)


@ray.remote(num_cpus=0)
def entrypoint() -> float:
    """The training loop; what it prints is progress."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print("starting 2 policy ranks, 1 reference rank, 1 rollout engine, 2 environments")
    policies = [actor(PolicyWorker, rank, port) for rank in range(RANKS)]
    reference, rollout = actor(RefWorker), actor(RolloutWorker)
    environments = [actor(EnvWorker, number) for number in range(2)]
    loss = 0.0
    for step in range(1, STEPS + 1):
        began = time.monotonic()
        if step == KILLED_AT:
            os.kill(ray.get(environments[1].pid.remote()), signal.SIGKILL)
        rewards = []
        for environment in list(environments):
            try:
                rewards += ray.get(environment.rewards.remote(step))
            except ray.exceptions.RayActorError:
                environments.remove(environment)
                print(f"step {step}: an environment worker died, going on with {len(environments)}")
        ray.get([reference.log_probs.remote(step), rollout.generate.remote(step)])
        loss = max(ray.get([policy.train.remote(step, rewards) for policy in policies]))
        took = time.monotonic() - began
        print(f"step {step}/{STEPS}  loss {loss:.4f}  reward {sum(rewards) / len(rewards):.2f}  {took:.1f} s")
    return loss


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    print(f"training done, loss {ray.get(entrypoint.remote()):.4f}")


if __name__ == "__main__":
    main()
