"""Plans of runs, without the chips: memory, FLOPs, collectives, lower bounds on time."""
