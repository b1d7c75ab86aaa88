"""Laws: what holds for every policy, schedule and order of calls, and the checks that say so."""
