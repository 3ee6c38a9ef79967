"""What our parts cost next to a peer, measured in the same run; numbers in the docs come from here.

A benchmark is one module with `run(quick: bool) -> dict[str, object]` and one line in `BENCHMARKS`.
Its result says under `rounds` how many rounds it took.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One line of the table: the name on the command line, the module that measures, what it answers."""

    name: str
    module: str
    question: str


BENCHMARKS = (
    Benchmark("fd", "benchmarks.fd", "what a write to a captured fd costs next to a plain redirect"),
    Benchmark(
        "agent", "benchmarks.agent", "how many lines a second the agent reads, next to the stock collector's tailer"
    ),
    Benchmark("latency", "benchmarks.latency", "how long a line is under way from write(2) to the receiver"),
    Benchmark("idle", "benchmarks.idle", "what the agent costs with 1,000 writers, quiet and active"),
    Benchmark("attach", "benchmarks.attach", "what attaching adds to a worker's start"),
    Benchmark("handler", "benchmarks.handler", "what a logging record costs next to files, loguru and the SDK"),
    Benchmark("redact", "benchmarks.redact", "what redaction takes from the agent's throughput"),
)
