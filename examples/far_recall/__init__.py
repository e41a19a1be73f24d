"""Recall from collapsed history: what a model can still answer once the answer's block has become one gist.

python -m examples.far_recall --tier cpu --arms gistnet,mean,recency,shuffled --seeds 1,2,3 --out runs/far_recall
"""
