"""Which block is where: tiers, pools, flushing, recovery, events and reasons."""
