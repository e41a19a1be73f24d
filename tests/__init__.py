"""Tests, and the harness that runs them in real ranks."""
