"""The contract between writers and the agent: folders, locks, frames, identity, decisions, checkpoint.

Both sides import it and nothing else of each other; the byte layouts are in `docs/contracts.md`, section 1.
Standard library only: one half of it runs inside the user's training process.
"""
