"""Prefixes: continued as if just read, by every cache; read once, asked often; on disk and back."""

import kivi_jax as kj

SLIDE = kj.Slide(window=12, recent=4)
CACHES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 8, 16),
    "scope": kj.scope(prompt=kj.SnapKV(budget=20, window=4), decode=SLIDE),
    "kivi2+scope": kj.kivi(2, 8, 16, prompt=kj.PyramidKV(budget=20, window=4), decode=SLIDE),
    "packed pool": kj.scope(decode=SLIDE, pool=kj.PoolQuantization(bits=4, group_size=8)),
    "discontinuous": kj.scope(decode=kj.Discontinuous(window=12, recent=4, max_new_tokens=64)),
    "unified": kj.scope(prompt=kj.H2O(budget=16, recent=4), decode=kj.H2O(budget=24, recent=4)),
    "selected kivi": kj.kivi(2, 8, 8, prompt=kj.SnapKV(budget=20, window=4)),
}
CASES = [(name, None) for name in CACHES] + [("full", 24), ("kivi2", 24), ("full", 200)]
P, Q, NEW = 40, 11, 12
