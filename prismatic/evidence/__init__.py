"""What runs leave behind, and how it is read: whole files, hashes, episode records, statistics, paired comparison.

One of each, for training, evaluation and tables alike. Needs numpy at most.
"""
