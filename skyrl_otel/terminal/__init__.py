"""What the user sees during a run: `skyrl-otel run -- CMD…` from the spawn of CMD to the summary.

The launcher stands between CMD's output and the terminal and must not be noticed there: CMD keeps its controlling
terminal, its stdin, its foreground process group and its exit code.
"""
