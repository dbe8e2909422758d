"""Plans of runs before there are chips for them: memory, FLOPs, collectives, bounds on time."""
