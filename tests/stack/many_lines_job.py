"""Two hundred thousand lines from two nodes, a quarter of them the same line from eight ranks within a second."""

import os
import sys
import time

import ray

RANKS = 8
SAME = "nan in gradients, step skipped"
SAME_EACH, OWN_EACH, ROLLOUT_EACH = 6_250, 15_000, 15_000
PROGRESS = 50
TOTAL = RANKS * (SAME_EACH + OWN_EACH) + 2 * ROLLOUT_EACH


class PolicyWorker:
    def __init__(self, rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
        self.rank = rank
        time.sleep(3)  # a model loads; a rank that speaks before its rank is known speaks without it

    def same(self, at: float) -> tuple[float, float]:
        """All ranks at once; when it began and ended."""
        time.sleep(max(0.0, at - time.time()))
        began = time.time()
        sys.stdout.write(f"{SAME}\n" * SAME_EACH)
        sys.stdout.flush()
        return began, time.time()

    def own(self) -> str:
        for n in range(OWN_EACH):
            print(f"stack-line policy {self.rank} {n} loss=0.{n:05d}")
        return os.uname().nodename


class RolloutEngine:
    def own(self, name: str) -> str:
        for n in range(ROLLOUT_EACH):
            print(f"stack-line rollout {name} {n} tokens={n * 7}", file=sys.stderr)
        return os.uname().nodename


def main() -> None:
    ray.init(address="auto")
    nodes = ("one", "two")
    ranks = [
        ray.remote(num_cpus=0, resources={nodes[rank % 2]: 1})(PolicyWorker).options(name=f"policy-{rank}").remote(rank)
        for rank in range(RANKS)
    ]
    engines = {
        name: ray.remote(num_cpus=0, resources={name: 1})(RolloutEngine).options(name=f"engine-{name}").remote()
        for name in nodes
    }
    for step in range(PROGRESS):
        print(f"step {step} reward 0.{step:02d}", flush=True)
    ray.get([worker.own.remote() for worker in ranks] + [engine.own.remote(name) for name, engine in engines.items()])
    times = ray.get([worker.same.remote(time.time() + 2.0) for worker in ranks])
    took = max(end for _, end in times) - min(began for began, _ in times)
    print(f"the same {RANKS * SAME_EACH} lines took {took:.3f} s", flush=True)


if __name__ == "__main__":
    main()
