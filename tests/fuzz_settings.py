"""Settings of the fuzz tests: a small derandomized number of inputs in the suite, as many as are asked for outside it.

``NTPSEG_FUZZ_EXAMPLES=N`` gives every fuzz test N inputs and a seed of its own at each run (``--hypothesis-seed=S``
repeats one); ``make fuzz EXAMPLES=N`` spreads N over all of them.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = "NTPSEG_FUZZ_EXAMPLES"


def fuzz_settings(in_suite: int) -> settings:
    """For ``@fuzz_settings(200)`` above ``@given(...)``.

    Args:
        in_suite: number of inputs where ``NTPSEG_FUZZ_EXAMPLES`` is not set; then always the same ones.
    """
    asked = os.environ.get(EXAMPLES)
    return settings(
        max_examples=int(asked) if asked else in_suite,
        derandomize=not asked,
        database=None,
        deadline=None,
        # a drawn tensor is large by hypothesis's measure, and a refused input is a result here, not a waste
        suppress_health_check=list(HealthCheck),
    )
