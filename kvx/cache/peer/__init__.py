"""Blocks of other processes: who holds what, and bringing it here.

tier        what the rest of the cache sees
publisher   tells peers which keys this cache holds      replica    what one peer told us
granting    lends peers blocks of this cache             fetching   borrows theirs for an onboard
messages    what travels                                 choice     whom to ask for which block
"""
