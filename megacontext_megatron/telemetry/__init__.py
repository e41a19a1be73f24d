"""What was seen: the table of metrics, how they are collected without host syncs, where they go, and reports."""
