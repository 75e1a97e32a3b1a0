"""The papers' evaluations, on any model, against any cache. Read `command.py` for the list.

samples     longbench.py, longgenbench.py, needle.py, ruler.py, gsm8k.py, perplexity.py
computing   generating.py and likelihood.py; jobs.py resumes what was cut off
scoring     scoring.py, and each evaluation's own; statistics.py says what is noise
showing     report.py
adapter     lm_eval.py, for EleutherAI's lm-evaluation-harness
study       study.py: the quantizer's errors on real activations
"""
