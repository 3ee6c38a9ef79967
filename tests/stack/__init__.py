"""Tests that need more than this machine's Python and Ray: namespaces, real collectors, real engines."""
