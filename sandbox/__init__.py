"""Private surroundings in which the product runs for real on one machine, for its tests, its demo and its developers.

Nothing here is deployed, and nothing that is deployed imports it.
"""
