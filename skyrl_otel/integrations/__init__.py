"""One thin package or file per framework: how it names things, and where it has to be told of us."""
