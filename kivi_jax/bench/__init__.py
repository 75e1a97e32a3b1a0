"""Measurements that anyone can repeat: each command prints what the documentation quotes."""
