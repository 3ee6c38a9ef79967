"""Inside the user's process: where its output goes, and who it is.

Standard library only, and nothing here may raise into the host, hold it up at exit, or survive a fork half alive.
"""
