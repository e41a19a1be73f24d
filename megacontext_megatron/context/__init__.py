"""What the rows are: gists of blocks, and the assembly of working contexts from tokens and gists."""
