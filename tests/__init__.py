"""Tests, and the processes that they start, look for garbage rarely.

Tracing makes many small objects, few of them in cycles. Looking for those was a tenth of the CPU time of
`kivi_jax/generation/test_generate.py`; `free_programs` in `conftest.py` looks once a module.
"""

import gc

gc.set_threshold(100_000, 20, 20)
