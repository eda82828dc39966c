"""`make bench`: what a move costs, measured on a lab of hosts; see docs/performance.md."""
