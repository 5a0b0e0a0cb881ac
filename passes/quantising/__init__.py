"""Which experts are stored in which format when all of them must fit a size: sensitivity measured, budget divided."""
