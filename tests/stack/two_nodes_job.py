"""One actor on each of two nodes writes; the driver shows progress."""

import os
import subprocess

import ray

LINES = 3000


class Writer:
    def write(self, name: str) -> str:
        for n in range(LINES):
            print(f"{name} line {n}")
        subprocess.run(["sh", "-c", f"echo {name} child >&2"], check=True)
        return os.uname().nodename


def main() -> None:
    ray.init(address="auto")
    writers = {
        name: ray.remote(num_cpus=0, resources={name: 1})(Writer).options(name=f"writer-{name}").remote()
        for name in ("one", "two")
    }
    where = ray.get([writer.write.remote(name) for name, writer in writers.items()])
    print("written on", *where, flush=True)


if __name__ == "__main__":
    main()
