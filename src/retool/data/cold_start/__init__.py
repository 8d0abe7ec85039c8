"""Cold-start trajectories from a teacher: ask for a solution with code in it, check it three times, keep what holds.

``prompt`` says what is asked, ``teacher`` asks, ``journal`` remembers every answer, ``checks`` judges one, ``report``
counts, and ``generate`` is the whole of it.
"""
