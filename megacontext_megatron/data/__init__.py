"""Stage 1, what arrives: text becomes an indexed data set, samples of C+1 tokens, a batch."""
