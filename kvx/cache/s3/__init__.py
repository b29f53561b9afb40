"""The S3 tier: groups of blocks as objects that machines share.

store      what is asked of an object store, and how its calls fail
format     what an object holds and how it is named (pure)
effort     how hard a call is tried: deadlines, retries, hedges, concurrency, breaker
tier       which of it a cache uses
"""
