"""The commands. No logic: they parse, call, print. Each imports what it needs when it runs, so that --help is quick."""
