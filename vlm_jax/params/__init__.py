"""Parameters by name: the first-match table, masks, averages, optimizer, schedules, sharding."""
