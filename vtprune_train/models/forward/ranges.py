"""Names of the ranges that the forward pass marks with ``torch.profiler.record_function``.

A profiler shows the time of each; without one a mark costs a few microseconds of host time.
"""

TOWER = "vtprune::tower"  # vision tower and projector
RANK = "vtprune::rank"  # queries and keys of the ranking layer
CHOOSE = "vtprune::choose"  # scores, and the rows that stay
GATHER = "vtprune::gather"  # the stream of the next stage
HEAD = "vtprune::head"  # language-model head and loss

SELECTOR = (RANK, CHOOSE)  # what dropping adds; the shorter stages pay for the gather
RANGES = (TOWER, RANK, CHOOSE, GATHER, HEAD)
