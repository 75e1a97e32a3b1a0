"""Tests, and the processes that they start, look for garbage rarely.

Tracing makes many small objects, few of them in cycles. Looking for those was a fifth of what tests took beside
compiling; `free_programs` in `conftest.py` looks once a module.
"""

import gc

gc.set_threshold(100_000, 20, 20)
