"""Frameworks that own the training loop. ``gradfold.hf`` and ``gradfold.lightning`` are what users import.

None of these modules imports its framework until it is used.
"""
