"""The embedded collector: OTLP/HTTP in, one SQLite store and two text files out, on the driver's node.

It is for those who run no collector of their own; agents cannot tell it from one. `python -m skyrl_otel.collector`.
Data goes one way: `receiver` (HTTP) → `decode` (bytes to rows) → `committer` (one thread: `dedup`, `store`, `text`).
"""
