"""One process per node and run: reads the spool, makes OTLP records of it, sends them, forgets them on the receiver's 2xx.

Standard library only, so that the package Ray ships with the job is enough on any node.
"""
