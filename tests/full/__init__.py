"""What takes too long for every change: run with --full."""
