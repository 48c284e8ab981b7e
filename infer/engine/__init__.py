"""The engine: many requests at once, their keys and values in shared pages.

    request.py    what is asked, and how far it is
    pages.py      which pages are free, in use, or kept for the next prompt that begins alike
    scheduler.py  what the next step does, for whom
    runner.py     the step on the device
    engine.py     the loop between them
    llm.py        the door

Only the runner, and what builds it, knows JAX.
"""
