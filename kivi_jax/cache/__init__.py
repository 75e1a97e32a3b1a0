"""How tokens are held: strategies, segments, pools, and who is kept. Start with `strategy.py`."""
