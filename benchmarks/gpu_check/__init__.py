"""What is run where a GPU is lent for minutes: a kit that is built beforehand, and stages that each fit a short slot.

``make gpu-kit`` builds, on a machine without a GPU but with the software of the one that has it, what can travel: the
native operators, a warm Triton cache, the peers' packages. ``make gpu-check STAGE=1 OUT=DIR`` runs one stage there.
"""
