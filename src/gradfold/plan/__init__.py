"""How much memory a training step takes: counted while it runs, or predicted on fake tensors, and drawn.

trace.py counts live bytes; step.py runs one step under it; fake.py and masks.py let a fake step stand for a real one;
plot.py draws two steps, one above the other.
"""
