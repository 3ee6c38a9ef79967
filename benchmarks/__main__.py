"""The command line of the benchmarks: `python -m benchmarks NAME [--json] [--quick]`, `all`, `--list`."""

import argparse
import contextlib
import importlib
import json
import os
import sys

from benchmarks import BENCHMARKS, Benchmark


def measure(benchmark: Benchmark, quick: bool) -> dict[str, object]:
    """Runs one benchmark and returns its result.

    Raises:
        ModuleNotFoundError: its module, or one that it imports, is not there.
        TypeError: its result does not say how many rounds it took.
    """
    result: dict[str, object] = importlib.import_module(benchmark.module).run(quick)
    if not isinstance(result.get("rounds"), int):
        raise TypeError(f"{benchmark.module}.run() must return 'rounds' as an int, got {result.get('rounds')!r}")
    return result


def show(name: str, result: dict[str, object]) -> None:
    """Prints one result as a table for people."""
    width = max(map(len, result))
    print(name)
    for key, value in result.items():
        print(f"  {key:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[*(b.name for b in BENCHMARKS), "all"])
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object; for 'all', one key a name")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it runs, not to quote")
    parser.add_argument("--list", action="store_true", help="print the names and what each answers")
    args = parser.parse_args()
    if args.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:<10} {benchmark.question}")
        return
    if args.name is None:
        parser.error("which one? --list shows the names")

    chosen = [b for b in BENCHMARKS if args.name in (b.name, "all")]
    # Only the result may reach stdout: what a benchmark or a child of it prints there goes to stderr.
    stdout_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            results = {b.name: measure(b, args.quick) for b in chosen}
    finally:
        os.dup2(stdout_fd, 1)
        os.close(stdout_fd)
    if args.json:
        print(json.dumps(results if args.name == "all" else results[args.name]))
        return
    for name, result in results.items():
        show(name, result)


if __name__ == "__main__":
    main()
