"""Real text: what collapsed history is worth for documents that are longer than the window.

    python -m examples.real_text --input FOLDER... --out runs/real_text --seeds 1,2,3 --jobs 3
    python -m examples.real_text --input FOLDER... --out runs/real_text --seeds 1 --source-length 16384

Trains models with mean gists, with GistNet and with the whole context as rows, on the same raw tokens in as many steps,
and compares the loss of the last rows on held-out files.
"""
