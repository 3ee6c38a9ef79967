"""A Ray program whose output is always the same: a driver, its own task, a nested task, actors with a child."""

import os
import subprocess
import sys

import ray


class Talker:
    def __init__(self, number: int) -> None:
        self.number = number

    def talk(self) -> None:
        for n in range(50):
            print(f"talker {self.number} says {n}")
        print(f"talker {self.number} warns", file=sys.stderr)
        os.write(1, f"talker {self.number} writes\n".encode())
        subprocess.run(["sh", "-c", f"echo talker {self.number} child"], check=True)


@ray.remote(num_cpus=0)
def nested() -> None:
    print("nested task")


@ray.remote(num_cpus=0)
def entrypoint() -> None:
    print("progress begins")
    talkers = [ray.remote(num_cpus=0)(Talker).options(name=f"talker-{n}").remote(n) for n in range(2)]
    ray.get([talker.talk.remote() for talker in talkers])
    ray.get(nested.remote())
    print("progress ends", file=sys.stderr)


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    print("driver begins")
    ray.get(entrypoint.remote())
    print("driver ends", flush=True)


if __name__ == "__main__":
    main()
