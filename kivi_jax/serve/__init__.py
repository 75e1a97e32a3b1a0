"""OpenAI's HTTP interface on compressed caches (extra `serve`). Start with `app.py`."""
